"""What is analysed: new modules are left out, whatever they are called, and a twin has other weights and the same head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from analysed import CLASSIFIERS, classifier
from transformers import RobertaConfig, RobertaForSequenceClassification

from slicefine.analysis.subject import places_of


def test_a_head_of_several_layers_is_left_out() -> None:
    config = RobertaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = RobertaForSequenceClassification(config)
    new = ["classifier.dense", "classifier.out_proj"]
    assert all(name.startswith("roberta.encoder.") for name in places_of(model, new))
    assert any(name.startswith("classifier.") for name in places_of(model))
    assert len(places_of(model, new)) == 6
    assert places_of(model, ["classif"]).keys() == places_of(model).keys()  # no part of a name
    assert torch.is_tensor(next(iter(places_of(model, new).values())).stored)


@pytest.mark.parametrize("task", CLASSIFIERS)
def test_the_loss_of_16_bit_weights_is_computed_in_fp32(task: str, tmp_path: Path) -> None:
    subject = classifier(task, tmp_path)
    (batch,) = subject.batches("train", size=4, count=1, seed=0)
    model = subject.copy()
    assert subject.loss(model, batch) == model(**batch).loss
    half = subject.copy().to(torch.bfloat16)
    inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
    with torch.no_grad():
        logits, loss = half(**inputs).logits, subject.loss(half, inputs)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.float(), batch["labels"]))
    assert loss != loss.bfloat16()
