from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig, PreTrainedTokenizerFast

from slicefine import SliceFineConfig, SliceFineError
from slicefine.evaluation.models import (
    Source,
    context_length,
    find,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
)
from slicefine.training.record import RunRecord


def tuned(base: str, config: Any, steps: int = 3) -> Any:
    """A PEFT model around the model in `base`, trained for a few steps."""
    model = get_peft_model(load_model(Source(name=base, base=base), load_config(Source(name=base, base=base))), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    ids = torch.randint(4, 20, (2, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def slices() -> SliceFineConfig:
    return SliceFineConfig(r=2, slide_every=1, task_type="CAUSAL_LM")


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


@pytest.mark.parametrize("config", [slices, lora])
def test_an_adapter_is_merged(make_model: Callable[..., str], tmp_path: Path, config: Callable[[], Any]) -> None:
    base = make_model(chain=None)
    model = tuned(base, config())
    model.save_pretrained(str(tmp_path / "adapter"))
    ids = torch.arange(4, 14)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    source = find(str(tmp_path / "adapter"))
    assert (source.base, source.adapter, source.run) == (base, tmp_path / "adapter", None)
    loaded = load_model(source, load_config(source))
    assert not [name for name, _ in loaded.named_modules() if "lora" in name or "slice" in name]
    with torch.no_grad():
        logits = loaded(input_ids=ids).logits
    if config is slices:
        assert torch.equal(logits, expected)
    else:
        torch.testing.assert_close(logits, expected)
    assert fingerprint(loaded) != fingerprint(load_model(find(base), load_config(find(base))))


def test_the_dtype_is_the_one_saved_beside_the_adapter(make_model: Callable[..., str], tmp_path: Path) -> None:
    base = make_model(chain=None)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model: Any = get_peft_model(plain, slices())
    model.save_pretrained(str(tmp_path / "adapter"))
    plain.config.save_pretrained(tmp_path / "adapter")
    source = find(str(tmp_path / "adapter"))
    assert load_model(source, load_config(source)).dtype == torch.bfloat16


def random_llama_of(base: str) -> Any:
    return load_model(find(base), load_config(find(base)))


def test_a_run_and_the_adapter_in_it(make_model: Callable[..., str], tmp_path: Path) -> None:
    base, run = make_model(chain=None), tmp_path / "run"
    tuned(base, slices()).save_pretrained(str(run / "adapter"))
    RunRecord(task="causal-lm", model=base, seed=0, started="now", status="finished").write(run)
    for name in (run, run / "adapter"):
        source = find(str(name))
        assert (source.base, source.adapter, source.run) == (base, run / "adapter", run)


def test_the_tokenizer_beside_the_adapter_goes_first(
    make_model: Callable[..., str], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    base = make_model(chain=None)
    adapter = tmp_path / "adapter"
    tuned(base, slices()).save_pretrained(str(adapter))
    assert load_tokenizer(find(str(adapter))).name_or_path == base
    tokenizer.save_pretrained(adapter)
    assert load_tokenizer(find(str(adapter))).name_or_path == str(adapter)


def test_what_cannot_be_evaluated(make_model: Callable[..., str], tmp_path: Path) -> None:
    base = make_model(chain=None)
    adapter, empty, run = tmp_path / "adapter", tmp_path / "empty", tmp_path / "run"
    tuned(base, slices()).save_pretrained(str(adapter))
    empty.mkdir()
    run.mkdir()
    RunRecord(task="causal-lm", model=base, seed=0, started="now", status="interrupted").write(run)
    path = adapter / "adapter_config.json"
    good = json.loads(path.read_text())

    def says(name: Path | str, match: str) -> None:
        with pytest.raises(SliceFineError, match=match):
            find(str(name))

    says(empty, r"empty has no adapter_config\.json and no config\.json")
    says(tmp_path / "adaptr", r"there is no folder .*adaptr\. Did you mean '.*adapter'\?")
    says(
        run,
        r"A finished run is evaluated; .*run has no adapter yet. Finish it with .slicefine train .*recipe\.yaml --resume",
    )
    path.write_text(json.dumps(good | {"task_type": "TOKEN_CLS"}))
    says(adapter, r"\(task_type CAUSAL_LM, SEQ_CLS or null\); .*adapter_config\.json has 'TOKEN_CLS'")
    path.write_text(json.dumps(good | {"base_model_name_or_path": str(tmp_path / "gone")}))
    says(
        adapter,
        r"The base model of .*adapter: .* there is no folder .*gone.* write its new place into .*adapter_config\.json",
    )
    path.write_text(json.dumps(good | {"base_model_name_or_path": None}))
    says(adapter, "does not name the base model")
    path.write_text("{")
    says(adapter, r"adapter_config\.json is not complete JSON")


def test_what_does_not_load_is_named(make_model: Callable[..., str]) -> None:
    base = Path(make_model(chain=None))
    source = find(str(base))
    config = load_config(source)
    (base / "model.safetensors").unlink()
    with pytest.raises(SliceFineError, match=r"The model .*model' did not load: .*model\.safetensors"):
        load_model(source, config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    with pytest.raises(SliceFineError, match=r"The tokenizer in .*model did not load"):
        load_tokenizer(source)
    (base / "config.json").write_text("{")
    with pytest.raises(SliceFineError, match=r"The configuration in .*model did not load"):
        load_config(source)


def test_code_of_a_model_is_not_run(make_model: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it asked for on the terminal, where somebody would say yes."""
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    base = Path(make_model(chain=None))
    source = find(str(base))
    (base / "mine.py").write_text("raise SystemExit('was run')\n")
    config = json.loads((base / "config.json").read_text())
    code = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model", "AutoTokenizer": ["mine.Words", None]}
    (base / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": code}))
    with pytest.raises(
        SliceFineError, match=r"The configuration in .*model did not load: it comes with code of its own"
    ):
        load_config(source)
    (base / "config.json").write_text(json.dumps(config))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    changed = settings | {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": ["mine.Words", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(changed))
    with pytest.raises(SliceFineError, match=r"The tokenizer in .*model did not load: it comes with code of its own"):
        load_tokenizer(source)


def test_the_base_is_of_the_revision_that_the_adapter_names(
    make_model: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the cache of the hub are two revisions; the main one is another model."""
    first, second = make_model(chain=None), make_model(name="other")
    adapter, repository = tmp_path / "adapter", tmp_path / "cache" / "models--owner--name"
    tuned(first, slices()).save_pretrained(str(adapter))
    expected = fingerprint(load_model(find(str(adapter)), load_config(find(str(adapter)))))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (repository / "refs").mkdir(parents=True)
    for name, folder, commit in (("v1", first, "1" * 40), ("main", second, "0" * 40)):
        (repository / "refs" / name).write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)
    path = adapter / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"base_model_name_or_path": "owner/name", "revision": "v1"}
    path.write_text(json.dumps(settings))
    source = find(str(adapter))
    assert fingerprint(load_model(source, load_config(source))) == expected
    assert load_tokenizer(source).name_or_path == "owner/name"


def test_the_fingerprint_is_that_of_the_weights(make_model: Callable[..., str], tmp_path: Path) -> None:
    base = make_model(chain=None)
    copy = shutil.copytree(base, tmp_path / "copy")
    first, second = random_llama_of(base), random_llama_of(str(copy))
    assert fingerprint(first) == fingerprint(second)
    with torch.no_grad():
        weight = second.model.layers[0].mlp.up_proj.weight
        weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(9.0))
    assert fingerprint(first) != fingerprint(second)
    swapped = random_llama_of(base)
    with torch.no_grad():
        swapped.lm_head.weight.copy_(swapped.lm_head.weight.flip(0))
    assert fingerprint(first) != fingerprint(swapped)
    assert fingerprint(first) != fingerprint(random_llama_of(base).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("config", "longest", "context"),
    [
        (LlamaConfig(max_position_embeddings=64), 10**30, 64),
        (LlamaConfig(max_position_embeddings=64), 32, 32),
        (GPT2Config(n_positions=48), 10**30, 48),
        (MambaConfig(), 10**30, None),
        (MambaConfig(), 16, 16),
    ],
)
def test_the_context_is_what_model_and_tokenizer_allow(
    tokenizer: PreTrainedTokenizerFast, config: Any, longest: int, context: int | None
) -> None:
    tokenizer.model_max_length = longest
    assert context_length(config, tokenizer) == context
