"""A stand-in for `run.py` of PEFT's MetaMathQA comparison: on a CPU, with a tiny model, the same calls to PEFT, torch and transformers in
the same order. It knows nothing of slicefine, as the real one; whatever goes wrong is raised and not noted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    get_cosine_schedule_with_warmup,
    set_seed,
)
from utils import SENTENCES, batches, read_settings


def load(config: PeftConfig, settings: dict[str, Any]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        settings["model_id"],
        dtype=getattr(torch, settings["dtype"]),
        device_map="cpu",
        attn_implementation=settings["attn_implementation"],
    )
    if settings["use_gc"]:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    model = get_peft_model(model, config, autocast_adapter_dtype=settings["autocast_adapter_dtype"])
    if settings["compile"]:
        # The real one leaves the backend to torch, whose own needs a C++ compiler; tracing and graphs are the same.
        model = torch.compile(model, dynamic=True, backend="eager")
    return model


def padded(tokenizer: Any, rows: Any, side: str = "right") -> Any:
    return tokenizer.pad(rows, return_tensors="pt", padding_side=side)


@torch.inference_mode()
def loss_on_other_text(model: Any, tokenizer: Any) -> float:
    batch = padded(tokenizer, tokenizer(SENTENCES), "left")
    logits = model(**batch, pad_token_id=tokenizer.eos_token_id).logits[:, :-1].float()
    kept = batch["attention_mask"][:, 1:].bool()
    return torch.nn.functional.cross_entropy(logits[kept], batch["input_ids"][:, 1:][kept]).item()


def generate(model: Any, tokenizer: Any, settings: dict[str, Any]) -> list[str]:
    with torch.inference_mode():
        batch = padded(tokenizer, tokenizer(["the correct", "is the answer"]), "left").to(model.device)
        how = GenerationConfig(**settings["generation_kwargs"])
        output = model.generate(**batch, generation_config=how, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.batch_decode(output, skip_special_tokens=True)


def train(model: Any, tokenizer: Any, settings: dict[str, Any]) -> dict[str, Any]:
    scaler, context = None, nullcontext
    if settings["use_amp"]:
        scaler = torch.amp.GradScaler(device="cpu")
        context = lambda: torch.amp.autocast(device_type="cpu")  # noqa: E731 -- one of two ways to enter a context
    steps = settings["max_steps"]
    optimizer = getattr(torch.optim, settings["optimizer_type"])(model.parameters(), **settings["optimizer_kwargs"])
    scheduler = get_cosine_schedule_with_warmup(optimizer, int(0.1 * steps), steps)
    trainable, total = model.get_nb_trainable_parameters()

    model.eval()
    before = loss_on_other_text(model, tokenizer)
    with (
        model.disable_adapter()
    ):  # one of two ways to get at the base's loss, and the one that asks more of the adapter
        of_base = loss_on_other_text(model, tokenizer)
    model.train()
    losses, metrics = [], []
    for step, rows in enumerate(batches(tokenizer, settings["batch_size"], steps), start=1):
        lengths = torch.tensor([[len(ids)] for ids in rows["input_ids"]])
        batch = padded(tokenizer, rows).to(model.device)
        tokens = batch["input_ids"]
        # of the padding the first token counts, as the end of the text
        batch["labels"] = tokens.masked_fill(torch.arange(tokens.shape[1]) > lengths, -100)
        optimizer.zero_grad()
        with context():
            loss = model(**batch, num_items_in_batch=batch["attention_mask"].sum().item()).loss
        (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["grad_norm_clip"])
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if step % settings["eval_steps"] == 0:
            model.eval()
            metrics.append({"step": step, "predictions": generate(model, tokenizer, settings)})
            model.train()
    model.eval()
    predictions = generate(model, tokenizer, settings)
    return {
        "trainable": trainable,
        "total": total,
        "losses": losses,
        "metrics": metrics,
        "predictions": predictions,
        "other text": [of_base, before, loss_on_other_text(model, tokenizer)],
    }


def main(experiment: str, saved: str) -> dict[str, Any]:
    folder = Path(experiment)
    config = PeftConfig.from_pretrained(experiment)
    settings = read_settings(folder)
    set_seed(settings["seed"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model_id"])
    model = load(config, settings)
    print(model, file=sys.stderr)
    result = train(model, tokenizer, settings)
    model.save_pretrained(saved)
    result["file_size"] = os.stat(os.path.join(saved, "adapter_model.safetensors")).st_size
    result["peft_config"] = {k: list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    results = Path("results")
    results.mkdir(exist_ok=True)
    (results / f"{'--'.join(folder.parts[1:])}.json").write_text(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("path_experiment")
    with tempfile.TemporaryDirectory() as folder:
        main(parser.parse_args().path_experiment, folder)
