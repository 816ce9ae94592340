"""TRL's SFTTrainer with the checks of `checked.py` and exact validation figures."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from slicefine.training.checked import CheckedTrainer


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
