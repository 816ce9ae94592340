"""Configurations of models that `slicefine plan` counts: where they come from, and whether a recipe fits them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto import modeling_auto

from slicefine.benchmarking.models import BUILT_BY, CAUSAL_LM, IMAGE, MODELS, SMALL, TEXT, VIDEO
from slicefine.errors import SliceFineError, did_you_mean, first_line, raise_all
from slicefine.training.hub import model_problem
from slicefine.training.recipe import Recipe
from slicefine.training.shipped import shipped

CLASSIFIERS = {
    TEXT: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    IMAGE: modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    VIDEO: modeling_auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING,
    CAUSAL_LM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
}
ENDINGS = {
    "ForCausalLM": CAUSAL_LM, "LMHeadModel": CAUSAL_LM, "ForConditionalGeneration": CAUSAL_LM,
    "ForSequenceClassification": TEXT, "ForMaskedLM": TEXT, "ForPreTraining": TEXT,
    "ForImageClassification": IMAGE, "ForMaskedImageModeling": IMAGE, "ForVideoClassification": VIDEO,
}  # fmt: skip
"""How the class of a model ends, and what such a model is most often trained for."""
PARTS: dict[str, dict[str, Any]] = {
    "gemma-3-12b": {
        "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
        | {"image_size": 896, "patch_size": 14, "vision_use_head": False},
    },
    "gemma-3-12b-small": {
        "vision_config": {"hidden_size": 64, "intermediate_size": 240, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"image_size": 112, "patch_size": 14, "vision_use_head": False},
        "mm_tokens_per_image": 16,
    },
}  # fmt: skip
"""What a model of a public configuration has beside the text model that `slicefine bench` knows by its name."""


def read_config(name: str) -> Any:
    """The configuration of the model `name`: one that `slicefine bench` knows, a folder, or a model of the hub.

    Nothing but `config.json` is read. Raises `SliceFineError` if there is none, or one that transformers does not know.
    """
    if name in MODELS:
        known = MODELS[name]
        return getattr(transformers, known.config)(**known.sizes, dtype="bfloat16" if known.task == CAUSAL_LM else None)
    if problem := _place_problem(name):
        raise SliceFineError(problem)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        if not Path(name).exists() and huggingface_hub.is_offline_mode():
            raise SliceFineError(
                f"There is no network, no folder {name!r}, and no model of that name downloaded before.{_known(name)}"
            ) from error
        near = "" if Path(name).exists() else _near(name)
        raise SliceFineError(
            f"transformers {transformers.__version__} cannot read the configuration of {name!r}: {first_line(error)}.{near}"
        ) from error


def _place_problem(name: str) -> str | None:
    """What is wrong with the place of a configuration; None if it may be there."""
    if Path(name).is_file():
        folder = Path(name).parent
        return f"MODEL is a folder with a config.json, or a name; {name} is a file. Give its folder, {folder}."
    if Path(name).is_dir():
        return None if Path(name, "config.json").is_file() else f"There is no config.json in the folder {name}."
    problem = model_problem(name)
    return None if problem is None else f"{problem}{_known(name)}"


def _known(name: str) -> str:
    """What might have been meant, and what can be had without a network."""
    large = [known for known in MODELS if known not in SMALL]
    return f"{_near(name)} Without a network there are {', '.join(large)}, and each of them as a small model (roberta-base-small, say)."


def _near(name: str) -> str:
    return did_you_mean(name, [*MODELS, *shipped()])


def whole(recipe: Recipe, config: Any) -> Any:
    """The configuration of the model that `recipe` is for, where `config` is that of its text model alone.

    So it is with some names that `slicefine bench` knows; the recipe says in `model.architecture` that its model has more parts, which are
    loaded, and which its `slice.exclude_modules` may name.
    """
    kind = recipe.model.architecture
    if recipe.model.name not in PARTS or kind in (None, config.model_type) or kind not in CONFIG_MAPPING:
        return config
    made: Any = CONFIG_MAPPING[kind]
    if made.sub_configs.get("text_config") is not type(config):
        return config
    return made(text_config=config.to_dict(), dtype=config.dtype, **PARTS[recipe.model.name])


def guess_task(config: Any, name: str) -> str:
    """What a model with this configuration is most likely trained for. Raises `SliceFineError` if there is no task for it."""
    if name in MODELS:
        return MODELS[name].task
    known = [task for task, models in CLASSIFIERS.items() if type(config) in models]
    if CAUSAL_LM in known and not _goes_on(config):
        known.remove(CAUSAL_LM)
    if not known:
        raise SliceFineError(
            f"{name} is a {config.model_type}, for which there is none of the tasks {', '.join(BUILT_BY)}."
        )
    kinds = config.architectures or []
    found = next((task for kind in kinds for ending, task in ENDINGS.items() if kind.endswith(ending)), None)
    return next(task for task in (found, VIDEO, CAUSAL_LM, *known) if task in known)


def settle(recipe: Recipe, config: Any) -> None:
    """Put the settings of the recipe into the configuration of its model.

    Raises `SliceFineError` with all that does not fit.
    """
    problems = []
    if getattr(config, "quantization_config", None) is not None:
        problems.append(
            f"`model.name` {recipe.model.name} is quantized; slices are trained in bf16, fp16 or fp32. Name the model it was made from."
        )
    if type(config) not in CLASSIFIERS[recipe.task]:
        problems.append(
            f"`task` is {recipe.task}, for which transformers has no model of the architecture {config.model_type}."
        )
    elif recipe.task == CAUSAL_LM and not _goes_on(config):
        problems.append(
            f"`task` is causal-lm, for models that go on with a text; a {config.model_type} is or has an encoder, which reads a text as a whole."
        )
    elif recipe.task == VIDEO:
        config.num_frames = recipe.data.num_frames or getattr(config, "num_frames", None)
        if config.num_frames is None:
            problems.append(f"video-classification is for models with `num_frames`; this is a {config.model_type}.")
        elif config.num_frames % (tubelet := tubelet_frames(config)):
            problems.append(f"`data.num_frames` is a multiple of {tubelet}; got {config.num_frames}.")
    raise_all(problems, "Plan")
    config.problem_type = "single_label_classification"
    if recipe.data.label_kind == "number":
        config.num_labels, config.problem_type = 1, "regression"
    if recipe.task == TEXT and config.get_text_config().pad_token_id is None:  # as the task sets it, from the tokenizer
        config.pad_token_id = config.get_text_config().pad_token_id = 0


def tubelet_frames(config: Any) -> int:
    """Frames of a clip that a model takes as one; ViViT says so beside a height and a width."""
    size = getattr(config, "tubelet_size", 1)
    return size if isinstance(size, int) else size[0]


def _goes_on(config: Any) -> bool:
    """Whether a language model of this configuration goes on with a text: no encoder, whose tokens see what follows."""
    encoder = type(config) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", None) is False
    return not encoder and not getattr(config, "is_encoder_decoder", False)
