"""What happens to the optimizer's state when a slice moves.

The moments describe the rows or columns that were just left, so they are dropped, Adam's `step` (its bias correction)
included: the slice starts as a new parameter would. The paper does not say; BAdam, block-coordinate Adam, does the same.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer


def reset_moments(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Make `optimizer` forget `parameters`.

    The state is removed, not zeroed: every optimizer knows how to start a parameter it has not seen, and zeros are not
    always that start (SGD with dampening copies the first gradient, other optimizers begin from the value itself).
    """
    by_parameter = [kept for kept in vars(optimizer).values() if isinstance(kept, dict)]  # not all keep it in `state`
    for parameter in parameters:
        for kept in by_parameter:
            kept.pop(parameter, None)
