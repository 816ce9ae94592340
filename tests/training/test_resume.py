"""A run that is stopped and taken up by a new Trainer around a new model goes on as if it had never been stopped: to the bit."""

import copy
import random
import shutil

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tiny import bert, tokens
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from slicefine import SliceFineCallback, SliceFineConfig, SliceFineError

EVERY = 5
STEPS = 3 * EVERY + 7
# Before, at and after a move, in the middle of the first, second and third interval; 6 is also the end of an epoch.
STOPS = (2, EVERY - 1, EVERY, EVERY + 1, 8, 13)
DATA = [{"input_ids": ids, "labels": torch.tensor(n % 3)} for n, ids in enumerate(tokens(size=22))]
SCHEDULES = {
    "rows in order": {"axis": "row"},
    "columns at random": {"axis": "column", "order": "random"},
    "alternating": {"axis": "alternate"},
}
VARIANTS = {
    **SCHEDULES,
    "gradients accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "biases": {"bias": "slicefine_only"},
    "the pooler in full": {"modules_to_save": ["classifier", "pooler"], "target_modules": ["query", "output.dense"]},
    "a base in bfloat16": {"dtype": torch.bfloat16, "bias": "slicefine_only"},
    "Adafactor": {"optim": "adafactor"},
    "SGD with momentum": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1},
}
SLICE_SETTINGS = ("axis", "order", "bias", "modules_to_save", "target_modules")


def flat(value, name=""):
    """Nested containers as one dictionary; tensors are copied."""
    if isinstance(value, torch.Tensor):
        return {name: value.detach().clone()}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for part, inner in items for key, leaf in flat(inner, f"{name}/{part}").items()}
    return {name: copy.copy(value)}


def differences(one, other):
    """Names that only one of two flat dictionaries has, or whose values differ in any bit."""
    return sorted(one.keys() ^ other.keys()) + [
        name
        for name in one.keys() & other.keys()
        if not (torch.equal(one[name], other[name]) if torch.is_tensor(one[name]) else one[name] == other[name])
    ]


class Witness(TrainerCallback):
    """Keeps all that the rest of a run depends on, after every step; asks for checkpoints and for the end."""

    def __init__(self, save, stop):
        self.save, self.stop, self.losses, self.moments = save, stop, [], {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        self.moments[state.global_step] = flat(
            {
                "model": dict(model.state_dict()),
                "optimizer": optimizer.state_dict(),
                "scheduler": lr_scheduler.state_dict(),
                "random": [torch.get_rng_state(), str(random.getstate()), str(np.random.get_state())],
                "losses": self.losses,
            }
        )
        self.losses = []
        control.should_save = control.should_save or state.global_step in self.save
        control.should_training_stop = control.should_training_stop or state.global_step == self.stop


class WitnessedTrainer(Trainer):
    def __init__(self, witness, **kwargs):
        super().__init__(**kwargs)
        self.witness = witness
        self.add_callback(witness)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.witness.losses.append(loss.item())
        return loss


def run(folder, *, save=(), resume=None, stop=None, callback=None, **settings):
    """Train a new model in a new Trainer, from the start or from the checkpoint of step `resume`.

    Checkpoints are written after the steps in `save`.
    """
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "warmup_steps": 3,
        "save_strategy": "no",
    } | settings
    base = bert().to(settings.pop("dtype", torch.float32))
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    config = SliceFineConfig(
        task_type="SEQ_CLS",
        r=2,
        slide_every=EVERY,
        **{"target_modules": ["query", "intermediate.dense"]}
        | {name: settings.pop(name) for name in SLICE_SETTINGS if name in settings},
    )
    trainer = WitnessedTrainer(
        Witness(save, stop),
        model=get_peft_model(base, config),
        args=TrainingArguments(
            output_dir=str(folder),
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            **settings,
        ),
        train_dataset=DATA,
        eval_dataset=DATA[:8],
        callbacks=[callback or SliceFineCallback()],
    )
    trainer.remove_callback(PrinterCallback)
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(1234)  # nothing outside of the checkpoint decides how a run goes on
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{resume}") if resume else None)
    return trainer


def moments(*args, **kwargs):
    return run(*args, **kwargs).witness.moments


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_one_step_on_from_each_of_60_checkpoints(schedule, tmp_path):
    """As a moment holds all that decides the next one, all later steps are equal too."""
    whole = moments(tmp_path, save=range(61), max_steps=60, **schedule)
    assert len(whole) == 60
    for step in range(1, 60):
        resumed = moments(tmp_path, max_steps=60, resume=step, stop=step + 1, **schedule)
        assert list(resumed) == [step + 1]
        assert not differences(resumed[step + 1], whole[step + 1]), step


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_stopped_and_resumed_to_the_end(variant, tmp_path):
    whole = moments(tmp_path, save=STOPS, **variant)
    for stop in STOPS:
        resumed = moments(tmp_path, resume=stop, **variant)
        assert list(resumed) == list(range(stop + 1, STEPS + 1))
        for step, moment in resumed.items():
            assert not differences(moment, whole[step]), (stop, step)


class BestAt(TrainerCallback):
    """Makes the validation after one step the best."""

    def __init__(self, step):
        self.step = step

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_score"] = -abs(state.global_step - self.step)


@pytest.mark.parametrize("bias", ["none", "slicefine_only"])
def test_the_best_model_at_the_end(bias, tmp_path):
    """What was touched after the best checkpoint returns to its original values."""
    best = 8  # with one move before it and three after it
    settings = {
        "bias": bias,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "callback": BestAt(best),
    }
    whole = run(tmp_path, **settings)
    assert whole.state.best_global_step == best
    trained = {name: value for name, value in whole.witness.moments[best].items() if name.startswith("/model/")}
    assert not differences(flat({"model": dict(whole.model.state_dict())}), trained)
    # Rows first, then columns.
    query = "bert.encoder.layer.0.attention.self.query"
    ended, original = (
        whole.model.get_submodule(f"base_model.model.{query}").base_layer.weight,
        bert().get_submodule(query).weight,
    )
    assert torch.equal(ended[2:, 2:], original[2:, 2:])
    assert not torch.equal(
        whole.witness.moments[STEPS][f"/model/base_model.model.{query}.base_layer.weight"][2:, 2:], original[2:, 2:]
    )

    for stop in (best - 2, best, best + 2):
        resumed = run(tmp_path, resume=stop, **settings)
        assert resumed.state.best_global_step == best
        assert not differences(resumed.witness.moments[STEPS], whole.witness.moments[STEPS])
        assert not differences(flat({"model": dict(resumed.model.state_dict())}), trained)


@pytest.fixture
def incomplete(tmp_path):
    """A run of 7 steps, and what removes files from its last checkpoint."""
    whole = moments(tmp_path, save=[7])

    def remove(*names):
        for name in names:
            (tmp_path / "checkpoint-7" / name).unlink()
        return whole

    return remove


@pytest.mark.parametrize("names", [["optimizer.pt"], ["scheduler.pt"], ["optimizer.pt", "scheduler.pt"]])
def test_a_lost_optimizer_or_scheduler_is_refused_unless_allowed(names, incomplete, tmp_path):
    whole = incomplete(*names)
    with pytest.raises(
        SliceFineError, match=r"step 7 has no optimizer\.pt or no scheduler\.pt.*allow_inexact_resume=True"
    ):
        run(tmp_path, resume=7)
    resumed = moments(tmp_path, resume=7, callback=SliceFineCallback(allow_inexact_resume=True))
    assert list(resumed) == list(range(8, STEPS + 1))
    assert differences(resumed[8], whole[8])


def test_a_checkpoint_of_the_model_alone_is_refused(tmp_path):
    run(tmp_path, save_only_model=True, save=[2], stop=2)
    with pytest.raises(SliceFineError, match="Resume from a complete checkpoint"):
        run(tmp_path, resume=2)


def test_a_lost_random_state_makes_another_run(incomplete, tmp_path):
    """Nobody tells the callback: `slicefine train` looks at the files itself."""
    whole = incomplete("rng_state.pth")
    assert "/losses/0" in differences(moments(tmp_path, resume=7)[8], whole[8])


def test_schedulers_that_count_no_steps_are_not_taken_for_lost(tmp_path):
    settings = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "eval_strategy": "steps",
        "eval_steps": 6,
        "warmup_steps": 0,
    }
    whole = moments(tmp_path, save=[4], **settings)
    resumed = moments(tmp_path, resume=4, **settings)
    assert not differences(resumed[STEPS], whole[STEPS])


def test_a_moved_checkpoint_serves_as_well(tmp_path):
    whole = moments(tmp_path / "a", save=[6], stop=7)
    shutil.move(tmp_path / "a" / "checkpoint-6", tmp_path / "b" / "checkpoint-6")
    assert not differences(moments(tmp_path / "b", resume=6, stop=7)[7], whole[7])
