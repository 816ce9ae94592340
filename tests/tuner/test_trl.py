"""TRL's trainers, with `peft_config=` and with a PeftModel that was trained before, across moves of the slice.

Where a trainer needs a reference model it takes the policy with its adapter disabled, or, if it was handed a trained
PeftModel, a second adapter `ref` that is to be a copy of the first. Both are checked here at every step, bit by bit.
"""

import copy
import random
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny import differences, llama, outputs, tokens, trainable
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer.utils import add_fused_lm_head

from slicefine import SliceFineConfig, SliceFineWarning, touched_slices
from slicefine.slicing import Region
from slicefine.tuner.layer import SliceLayer

pytestmark = [
    # TRL 1.16 uses names that transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing(_enable|_disable)?` is deprecated:FutureWarning"),
]

STEPS = 6
BEFORE = 5
"""Steps that a trained PeftModel has made before it is handed to the trainer: two moves, and half an interval."""
WORDS = [f"w{number}" for number in range(47)]
IDS = tokens()

CONFIGS = {
    SFTTrainer: SFTConfig,
    DPOTrainer: DPOConfig,
    KTOTrainer: KTOConfig,
    GRPOTrainer: GRPOConfig,
    RLOOTrainer: RLOOConfig,
    RewardTrainer: RewardConfig,
}
WITH_REFERENCE = [DPOTrainer, KTOTrainer, GRPOTrainer, RLOOTrainer]
SAMPLING = [GRPOTrainer, RLOOTrainer]

starts = pytest.mark.parametrize("before", [0, BEFORE], ids=["peft_config", "trained"])
axes = pytest.mark.parametrize("axis", ["row", "alternate"])


def named(trainer_class):
    return trainer_class.__name__


# ---------------------------------------------------------------- what a run is made of


def tokenizer():
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def data_for(trainer_class, spread=3):
    """Eight examples; their lengths differ by up to `spread` words."""
    draw = random.Random(0)
    rows = []
    for number in range(8):
        text = [" ".join(draw.choices(WORDS, k=least + draw.randint(0, spread))) for least in (2, 3, 3)]
        rows.append(
            {
                SFTTrainer: {"text": text[2]},
                KTOTrainer: {"prompt": text[0], "completion": f" {text[1]}", "label": number % 2 == 0},
                GRPOTrainer: {"prompt": text[0]},
                RLOOTrainer: {"prompt": text[0]},
            }.get(trainer_class, {"prompt": text[0], "chosen": f" {text[1]}", "rejected": f" {text[2]}"})
        )
    return Dataset.from_list(rows)


def base_for(trainer_class):
    if trainer_class is not RewardTrainer:
        return llama()
    config = llama().config
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config)


def config_for(trainer_class, axis, bias="none"):
    task = "SEQ_CLS" if trainer_class is RewardTrainer else "CAUSAL_LM"
    return SliceFineConfig(r=2, slide_every=2, axis=axis, bias=bias, task_type=task)


def adapted(trainer_class, axis, before, base=None, bias="none"):
    """A PeftModel that has made `before` steps, which the next call gives bit by bit again.

    It was saved on the way, which writes into its configuration, and was trained on.
    """
    model = get_peft_model(base or base_for(trainer_class), config_for(trainer_class, axis, bias))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    labels = torch.arange(len(IDS)).float() if trainer_class is RewardTrainer else IDS
    for step in range(before):
        if step == 3:
            with TemporaryDirectory() as folder:
                model.save_pretrained(folder)
        model(input_ids=IDS, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def start_for(trainer_class, axis, before):
    """The plain model that the policy is before the trainer's first step."""
    return adapted(trainer_class, axis, before).merge_and_unload()


def trainer_for(trainer_class, axis, before, folder, *, model=None, data=None, **settings):
    """The trainer of a run of `STEPS` steps; what `settings` leave open is as small, plain and repeatable as can be.

    It gets `model`; or a PeftModel after `before` steps; or, if these are none, a plain model and a `peft_config`.
    """
    arguments = {name: settings.pop(name) for name in ("ref_model", "eval_dataset") if name in settings}
    if trainer_class in SAMPLING:
        arguments["reward_funcs"] = lambda completions, **_: [float(sum(map(ord, text)) % 7) for text in completions]
        settings = {"beta": 0.1, "num_generations": 2, "max_completion_length": 6} | settings
    args = CONFIGS[trainer_class](
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4 if trainer_class is KTOTrainer else 2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="adamw_torch",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
        **({"save_strategy": "no"} | settings),
    )
    data = data_for(trainer_class) if data is None else data
    arguments |= {"args": args, "train_dataset": data, "processing_class": tokenizer()}
    if not before:
        return trainer_class(base_for(trainer_class), peft_config=config_for(trainer_class, axis), **arguments)
    model = model or adapted(trainer_class, axis, before)
    if trainer_class not in WITH_REFERENCE or "ref_model" in arguments:
        return trainer_class(model, **arguments)
    with pytest.warns(SliceFineWarning, match="copy"):
        return trainer_class(model, **arguments)


def watch_references(model):
    """A list that will hold every call which is not the policy's, with the log-probabilities that came out."""
    calls = []
    layer = next(module for module in model.modules() if isinstance(module, SliceLayer))

    def note(module, args, kwargs, output):
        if layer.installed != "default":
            assert not args
            calls.append((kwargs, output.log_probs.clone()))

    model.register_forward_hook(note, with_kwargs=True)
    return calls


def assert_all_from(model, calls):
    """That plain `model` gives, bit by bit, the log-probabilities of every call."""
    add_fused_lm_head(model)
    with torch.no_grad():
        for kwargs, log_probs in calls:
            assert torch.equal(log_probs, model(**kwargs).log_probs)


def history(trainer):
    """What was logged at every step, without TRL's clock and its count of tokens, which starts anew on resuming."""
    return [
        {key: value for key, value in entry.items() if key not in ("step_time", "num_tokens")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def differing(model, other):
    """As `differences`, without the copy that serves as reference."""
    return [name for name in differences(model, other) if ".ref" not in name]


# ---------------------------------------------------------------- the reference


@axes
@starts
@pytest.mark.parametrize("trainer_class", WITH_REFERENCE, ids=named)
def test_the_reference_is_where_the_policy_started_at_every_step(trainer_class, before, axis, tmp_path):
    trainer = trainer_for(trainer_class, axis, before, tmp_path)
    calls = watch_references(trainer.model)
    trainer.train()

    assert len(calls) >= STEPS
    start = start_for(trainer_class, axis, before)
    assert_all_from(start, calls)
    assert not torch.equal(outputs(trainer.model, IDS).logits, outputs(start, IDS).logits)
    if trainer_class in SAMPLING:
        divergences = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
        assert divergences[0] == 0
        assert all(divergences[1:])


@starts
def test_dpo_equals_dpo_with_a_reference_model_of_its_own(before, tmp_path):
    trainer = trainer_for(DPOTrainer, "alternate", before, tmp_path)
    trainer.train()
    expected = trainer_for(
        DPOTrainer, "alternate", before, tmp_path, ref_model=start_for(DPOTrainer, "alternate", before)
    )
    expected.train()
    assert history(trainer) == history(expected)
    assert not differing(trainer.model, expected.model)


def test_the_reference_keeps_trained_biases(tmp_path):
    biased = llama(attention_bias=True, mlp_bias=True)
    model = adapted(DPOTrainer, "alternate", BEFORE, biased, bias="slicefine_only")
    start = copy.deepcopy(model).merge_and_unload()
    trainer = trainer_for(DPOTrainer, "alternate", BEFORE, tmp_path, model=model)
    calls = watch_references(trainer.model)
    trainer.train()
    assert len(calls) == STEPS
    assert_all_from(start, calls)


def test_dpo_goes_on_from_an_adapter_in_a_folder(tmp_path):
    trained = adapted(DPOTrainer, "alternate", BEFORE)
    trained.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(base_for(DPOTrainer), tmp_path / "saved", is_trainable=True)
    runs = [trainer_for(DPOTrainer, "alternate", BEFORE, tmp_path, model=model) for model in (trained, loaded)]
    for trainer in runs:
        trainer.train()
    assert history(runs[1]) == history(runs[0])
    assert not differences(runs[1].model, runs[0].model)


@starts
def test_dpo_with_reference_log_probs_computed_before(before, tmp_path):
    data = data_for(DPOTrainer, spread=0)  # of equal lengths: other paddings round differently
    runs = []
    for precompute in (False, True):
        trainer = trainer_for(DPOTrainer, "alternate", before, tmp_path, data=data, precompute_ref_log_probs=precompute)
        calls = watch_references(trainer.model)
        trainer.train()
        assert bool(calls) != precompute
        runs.append(trainer)
    assert history(runs[0]) == history(runs[1])
    assert not differences(runs[0].model, runs[1].model)


@starts
def test_dpo_is_not_changed_by_evaluations_between(before, tmp_path):
    trainer = trainer_for(DPOTrainer, "alternate", before, tmp_path)
    trainer.train()
    evaluation = {"eval_dataset": data_for(DPOTrainer), "eval_strategy": "steps", "eval_steps": 1}
    evaluated = trainer_for(DPOTrainer, "alternate", before, tmp_path, **evaluation)
    evaluated.train()
    assert len([entry for entry in evaluated.state.log_history if "eval_loss" in entry]) == STEPS
    assert not differences(trainer.model, evaluated.model)


# ---------------------------------------------------------------- the policy


@axes
@starts
@pytest.mark.parametrize("trainer_class", [SFTTrainer, RewardTrainer], ids=named)
def test_equals_a_plain_loop(trainer_class, before, axis, tmp_path):
    trainer = trainer_for(trainer_class, axis, before, tmp_path, train_sampling_strategy="sequential")
    assert trainer.args.gradient_checkpointing
    batches = list(trainer.get_train_dataloader())
    trainer.train()

    model = adapted(trainer_class, axis, before)
    if trainer_class is SFTTrainer:
        add_fused_lm_head(model.get_base_model())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        batch = batches[step % len(batches)]
        if trainer_class is SFTTrainer:
            loss = model(**batch, fused_lm_head=True).loss
        else:
            chosen, rejected = model(**batch).logits.squeeze(-1).chunk(2)
            loss = -F.logsigmoid(chosen - rejected).mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [entry["loss"] for entry in history(trainer)] == losses
    assert not differences(trainer.model, model)


@starts
@pytest.mark.parametrize("trainer_class", CONFIGS, ids=named)
def test_saved_by_the_trainer_and_loaded(trainer_class, before, tmp_path):
    trainer = trainer_for(trainer_class, "alternate", before, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))

    base = base_for(trainer_class)
    loaded = PeftModel.from_pretrained(base_for(trainer_class), str(tmp_path / "saved"))
    assert torch.equal(outputs(loaded, IDS).logits, outputs(trainer.model, IDS).logits)
    schedule = config_for(trainer_class, "alternate").schedule
    touched = touched_slices(loaded)
    merged = loaded.merge_and_unload()
    for name, slices in touched.items():
        weight, original = merged.get_submodule(name).weight, base.get_submodule(name).weight
        assert slices == schedule.touched(before + STEPS, tuple(weight.shape))
        region = Region.of(slices)
        outside = torch.ones_like(weight, dtype=torch.bool)
        outside[list(region.rows)] = False
        outside[:, list(region.columns)] = False
        assert torch.equal(weight[outside], original[outside])
        assert not torch.equal(weight, original)


@starts
@pytest.mark.parametrize("trainer_class", [SFTTrainer, DPOTrainer], ids=named)
def test_resumed_equals_straight(trainer_class, before, tmp_path):
    runs = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        trainer = trainer_for(
            trainer_class, "alternate", before, tmp_path, save_strategy="steps", save_steps=3, save_total_limit=2
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append(trainer)
    straight, resumed = runs
    assert history(resumed) == history(straight)
    assert not differences(resumed.model, straight.model)
    states = [trainer.optimizer.state_dict()["state"] for trainer in runs]
    assert all(torch.equal(states[1][key][name], states[0][key][name]) for key in states[0] for name in states[0][key])
