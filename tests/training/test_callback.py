from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from slicefine import SliceFineCallback, SliceFineConfig, SliceFineError, SliceFineWarning
from slicefine.tuner.layer import SliceLayer

QUERY = "bert.encoder.layer.0.attention.self.query"


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """24 random sentences of 5 tokens."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(row)
        return {"input_ids": torch.randint(0, 20, (5,), generator=draw), "labels": torch.tensor(row % 2)}


def make_model(blocks: int = 1, **settings: Any) -> PeftModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=2,
    )
    settings = {"r": 2, "slide_every": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"} | settings
    return get_peft_model(BertForSequenceClassification(config), SliceFineConfig(**settings))  # pyright: ignore


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    def make(model: PeftModel, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
        settings = {
            "max_steps": 12,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
        } | settings
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            label_names=["labels"],
            **settings,
        )
        return Trainer(model, arguments, train_dataset=Sentences(), callbacks=[SliceFineCallback(), *callbacks])

    return make


class Seen(TrainerCallback):
    """What trackers that stand behind the callback are given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_what_is_logged(make_trainer: Callable[..., Trainer]) -> None:
    seen = Seen()
    trainer = make_trainer(make_model(axis="row"), seen)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["slicefine/moves"] for entry in history] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert [entry["slicefine/position"] for entry in history] == [0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6]
    for entry in history:
        moved = entry["step"] % 4 == 0
        assert (entry["slicefine/update_norm_max"] == 0) == moved  # a slice that has just arrived is original
        assert entry["slicefine/update_norm_max"] >= entry["slicefine/update_norm_mean"]
        assert (f"slicefine/update_norm/{QUERY}" in entry) == moved
    assert [{key for key in logs if "slicefine" in key} for logs in seen.logs if "loss" in logs] == [
        {key for key in entry if "slicefine" in key} for entry in history
    ]


def test_norms_of_a_finished_slice_are_exact(make_trainer: Callable[..., Trainer]) -> None:
    model = make_model(axis="column")
    (layer,) = [m for name, m in model.named_modules() if name.endswith("query") and isinstance(m, SliceLayer)]
    before = layer.base_layer.weight.detach().clone()
    trainer = make_trainer(model, max_steps=5)
    trainer.train()
    change = (layer.base_layer.weight.detach() - before)[:, :2].norm() / before[:, :2].norm()
    logged = next(entry for entry in trainer.state.log_history if f"slicefine/update_norm/{QUERY}" in entry)
    assert logged[f"slicefine/update_norm/{QUERY}"] == pytest.approx(float(change), rel=1e-6)


def test_norms_are_computed_when_logged_and_at_moves_only(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    read = SliceLayer.original_values
    monkeypatch.setattr(SliceLayer, "original_values", lambda self, *a: reads.append(a) or read(self, *a))
    make_trainer(make_model(slide_every=50), logging_steps=50, max_steps=100).train()
    # 2 targets: 2 logs and 2 moves, and the look for slices that never moved at the end.
    assert len(reads) <= 2 * (2 + 2 + 2)


def test_training_is_the_same_without_it(make_trainer: Callable[..., Trainer]) -> None:
    results = []
    for with_callback in (True, False):
        model = make_model()
        trainer = make_trainer(model)
        if not with_callback:
            trainer.remove_callback(SliceFineCallback)
        trainer.train()
        results.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize(("steps", "every", "fitting", "moves"), [(12, 12, 1, 11), (90, 500, 11, 8), (1, 5, 1, 0)])
def test_too_short(
    make_trainer: Callable[..., Trainer], steps: int, every: int, fitting: int, moves: int, recwarn: Any
) -> None:
    warnings.simplefilter("always")
    make_trainer(make_model(slide_every=every), max_steps=steps, logging_steps=100).train()
    (message,) = [str(w.message) for w in recwarn if issubclass(w.category, SliceFineWarning)]
    assert f"ends after {steps} optimizer steps and the slices move every {every}: they never move" in message
    assert f"Set slide_every={fitting} ({moves} moves;" in message


def test_too_short_for_the_turn_of_a_block(make_trainer: Callable[..., Trainer]) -> None:
    model = make_model(2, depth_window=[1, 0], depth_every=25)
    says = rf"ends after 20 .*2 turns of 25 steps each, comes to 2 of 4 targets: .* in {QUERY}, [^,]*value. Set depth_every=10,"
    with pytest.warns(SliceFineWarning, match=says) as caught:
        make_trainer(model, max_steps=20, logging_steps=100).train()
    assert len(caught) == 1


def test_a_block_that_rests_too_much_to_move(make_trainer: Callable[..., Trainer]) -> None:
    model = make_model(2, depth_window=[0, 1, 1, 1], depth_every=5, slide_every=12)
    says = rf"ends after 38 .*leaves 10 to {QUERY}, [^,]*value, and .* every 12: there they never.* slide_every=1 \(9 moves"
    with pytest.warns(SliceFineWarning, match=says) as caught:
        make_trainer(model, max_steps=38, logging_steps=100).train()
    assert len(caught) == 1


@pytest.mark.parametrize("steps", [12, 17])
def test_a_move_that_is_made_before_a_rest(make_trainer: Callable[..., Trainer], steps: int) -> None:
    """The first block moves after 8 steps and rests for as many; only a run of 17 trains it where it is then."""
    model = make_model(2, depth_window=[0, 1], depth_every=8, slide_every=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(model, max_steps=steps, logging_steps=100).train()
    assert [str(w.message) for w in caught if "leaves 8 to" in str(w.message)] == ([] if steps == 17 else [ANY])


def test_a_slice_that_stays_is_never_finished(make_trainer: Callable[..., Trainer]) -> None:
    """That of a weight of as many rows has nowhere to move to."""
    model = make_model(axis="row", r=2, target_modules=["query", "classifier"], task_type=None)
    trainer = make_trainer(model)
    trainer.train()
    logged = {key for entry in trainer.state.log_history for key in entry if "update_norm/" in key}
    assert logged == {f"slicefine/update_norm/{QUERY}"}


@pytest.mark.parametrize(
    "settings", [{"slide_every": 11}, {"slide_every": None, "axis": "row"}, {"slide_every": 50, "axis": "row", "r": 16}]
)
def test_not_too_short(make_trainer: Callable[..., Trainer], settings: dict[str, Any]) -> None:
    make_trainer(make_model(**settings)).train()  # warnings are errors here


def test_slices_that_never_moved_are_named(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(make_model(), learning_rate=0.0)
    with pytest.warns(
        SliceFineWarning, match=f"changed nothing in the slices of 2 of 2 targets: {QUERY}, .*value. Either"
    ):
        trainer.train()


def test_weight_decay_is_said_once(make_trainer: Callable[..., Trainer]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(make_model(), weight_decay=0.1).train()
    (message,) = [str(w.message) for w in caught if issubclass(w.category, SliceFineWarning)]
    assert "weight_decay=0.1" in message
    assert "weight_decay=0 " in message


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("fsdp", True, "FSDP cut the parameters .* leave `fsdp` and `deepspeed` out"),
        ("deepspeed", {}, None),
        ("deepspeed", {"zero_optimization": {"stage": 2}}, "DeepSpeed cut the parameters"),
        ("_n_gpu", 2, r"nn.DataParallel over 2 GPUs.*CUDA_VISIBLE_DEVICES=0"),
    ],
)
def test_engines_that_cut_parameters_are_refused(tmp_path: Path, name: str, value: Any, says: str | None) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert arguments.n_gpu <= 1
    setattr(arguments, name, value)  # the engines themselves cannot be started here
    if says is None:
        SliceFineCallback().on_init_end(arguments, None, None)  # pyright: ignore
        return
    with pytest.raises(SliceFineError, match=says):
        SliceFineCallback().on_init_end(arguments, None, None)  # pyright: ignore


def test_a_model_without_slices(make_trainer: Callable[..., Trainer]) -> None:
    model = BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(SliceFineError, match="has no slicefine layer"):
        make_trainer(model).train()  # pyright: ignore


def test_a_depth_window_hides_no_moves(make_trainer: Callable[..., Trainer]) -> None:
    """The first target rests in most steps and moves once; the last one, which always trains, moves as planned, and nothing is warned of."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    settings = SliceFineConfig(
        r=2, slide_every=3, target_modules=["query"], task_type="SEQ_CLS", depth_window=[2, 2, 0], depth_every=2
    )
    trainer = make_trainer(get_peft_model(BertForSequenceClassification(config), settings))  # pyright: ignore
    trainer.train()
    moves = [entry["slicefine/moves"] for entry in trainer.state.log_history if "slicefine/moves" in entry]
    assert moves == [step // 3 for step in range(1, 13)]
