"""TRL's SFTTrainer with the checks of `checked.py` and exact validation figures."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from trl import SFTTrainer

from slicefine.training.checked import CheckedTrainer

TRIED = 16
"""Tokens of an example by which is tried whether packed examples are kept apart."""


class CausalLMTrainer(CheckedTrainer, SFTTrainer):
    """An SFTTrainer whose validation figures are averages over all tokens, whatever the batches.

    Trainer averages the averages of batches, in which a token counts more in a batch with few: loss and perplexity would
    change with the batch size.
    """

    def trial_loss(self, batch: dict[str, Any]) -> Tensor:
        """As `CheckedTrainer.trial_loss`; what SFTTrainer counted on the way is forgotten."""
        loss = super().trial_loss(batch)
        self._metrics["train"].clear()
        self._total_train_tokens = 0
        return loss

    def own_problems(self) -> list[str]:
        """Whether packed examples see each other: many models do not read the positions that tell them apart."""
        if not self.padding_free or not self._packed_examples_meet():
            return []
        return [
            f"`data.packing`: {self.model.config.model_type} does not keep packed examples apart; set it to false, or use "
            "`wrapped`, which joins them on purpose."
        ]

    def _packed_examples_meet(self) -> bool:
        """Whether what the model says of an example depends on the one before it: a gradient goes from one to the other."""
        dataset: Any = self.train_dataset
        ids = dataset[0]["input_ids"][:TRIED]
        batch = self.data_collator([{"input_ids": ids}, {"input_ids": ids}])
        del batch["labels"]
        kept: list[Tensor] = []

        def keep(_module: Any, _args: Any, output: Tensor) -> Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[-1]

        handle = self.model.get_input_embeddings().register_forward_hook(keep)
        try:
            with self.compute_loss_context_manager():
                logits = self.model(**self._prepare_inputs(batch), use_cache=False).logits[:, len(ids) :]
        finally:
            handle.remove()
        (gradient,) = torch.autograd.grad(logits.float().logsumexp(-1).sum(), kept[0])
        # What is not finite is found, and named, by the step that comes next.
        return bool(gradient[:, : len(ids)].nan_to_num(0.0, 0.0, 0.0).any())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As Trainer's, with a padded row for each example: they are not packed, so no model has to keep them apart."""
        collator: Any = self.data_collator
        if self.padding_free:
            self.data_collator = dataclasses.replace(collator, padding_free=False)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As Trainer's, with `loss`, `perplexity` and `token_accuracy` over all tokens."""
        self._sums = torch.zeros(3, dtype=torch.float64)
        output: Any = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, correct = (self._sums[:2] / self._sums[2]).tolist()
        figures = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": correct}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch; its sums are added to those of the validation."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        sums = [-outputs.log_probs.double().sum(), outputs.is_top1.sum(), outputs.label_mask.sum()]
        self._sums += torch.stack([value.double() for value in sums]).cpu()
        return outputs.loss.detach(), None, None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the run folder has a record and a recipe, and TRL's card would go with every checkpoint."""
