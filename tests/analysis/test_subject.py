"""What is analysed: new modules are left out, whatever they are called, and a twin has other weights and the same head."""

from __future__ import annotations

import torch
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
