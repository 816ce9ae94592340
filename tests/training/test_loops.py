"""The same training, unchanged, through a plain loop, accelerate and Trainer."""

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import get_peft_model
from tiny import bert, differences, tokens, trainable
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from slicefine import SliceFineCallback, SliceFineConfig, active_slices
from slicefine.slicing import Slice

IDS = tokens(size=12)
LABELS = torch.arange(12) % 3
ROWS = [{"input_ids": ids, "labels": label} for ids, label in zip(IDS, LABELS, strict=True)]
STEPS = 6  # two passes over three batches


def adapted():
    model = get_peft_model(bert(), SliceFineConfig(r=2, slide_every=2, task_type="SEQ_CLS", bias="slicefine_only"))
    return model.train()


def optimizer_of(model):
    return torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)


def trained_by_a_plain_loop(accumulate=1):
    model = adapted()
    optimizer = optimizer_of(model)
    loader = DataLoader(ROWS, batch_size=4 // accumulate)
    for _ in range(2):
        for number, batch in enumerate(loader, 1):
            (model(**batch).loss / accumulate).backward()
            if number % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return model


def test_positions_after_a_plain_loop():
    assert active_slices(trained_by_a_plain_loop())["bert.encoder.layer.0.attention.self.query"] == Slice(
        "column", 2, 2
    )


def test_accelerate():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = adapted()
    prepared, optimizer, loader = accelerator.prepare(model, optimizer_of(model), DataLoader(ROWS, batch_size=2))
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
    assert not differences(accelerator.unwrap_model(prepared), trained_by_a_plain_loop(accumulate=2))


def test_trainer(tmp_path):
    model = adapted()
    args = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(
            [{"input_ids": r["input_ids"].tolist(), "labels": int(r["labels"])} for r in ROWS]
        ),
        callbacks=[SliceFineCallback()],
    )
    trainer.train()
    assert not differences(model, trained_by_a_plain_loop())
