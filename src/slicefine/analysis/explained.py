"""How few directions hold most of a spectrum: figures of the eigenvalues of a covariance or of a kernel.

Share p_i of an eigenvalue: l_i / sum(l), eigenvalues falling. All figures are of the shares, so a scale does not matter.

k(tau)                 the least k with p_1 + ... + p_k >= tau
participation ratio    1 / sum(p^2) = sum(l)^2 / sum(l^2)
effective rank         exp(-sum(p log p)) (Roy & Vetterli, 2007)

Of d equal eigenvalues both the ratio and the rank are d; of a single one they are 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

TAUS = (0.8, 0.9, 0.95)
"""Shares of the variance for which the number of directions is given."""
POINTS = 40
"""Points of a curve, at most."""
_ROUNDING = 1e-9


def shares(matrix: Tensor) -> Tensor | None:
    """Shares of the eigenvalues of a symmetric matrix `(D, D)` without negative ones: `(D,)`, falling, fp64, on the CPU.

    None if there is nothing to share: a matrix of zeros, of no entries, or one that is not finite.
    """
    matrix = matrix.detach().cpu().double()
    if not matrix.numel() or not bool(matrix.isfinite().all()):
        return None
    eigenvalues = torch.linalg.eigvalsh(matrix).flip(0).clamp(min=0)  # below 0 by rounding
    total = eigenvalues.sum()
    return eigenvalues / total if total > 0 else None


def directions(parts: Tensor, tau: float) -> int:
    """k(tau) of falling shares."""
    return min(int((parts.cumsum(0) < tau - _ROUNDING).sum()) + 1, len(parts))


def all_directions(parts: Tensor) -> dict[str, int]:
    """k(tau) by the text of tau, as JSON has it."""
    return {str(tau): directions(parts, tau) for tau in TAUS}


def participation_ratio(parts: Tensor) -> float:
    """1 / sum(p^2)"""
    return float(1 / parts.square().sum())


def effective_rank(parts: Tensor) -> float:
    """exp of the entropy of the shares."""
    return float(torch.special.entr(parts).sum().exp())


def curve(parts: Tensor, points: int = POINTS) -> list[list[float]]:
    """`[[number of components, cumulative share], ...]`: at most `points`, closer together at the beginning, with both ends."""
    count = len(parts)
    numbers = {round(count ** (place / max(points - 1, 1))) for place in range(points)}
    cumulative = parts.cumsum(0).clamp(max=1)
    return [[number, float(cumulative[number - 1])] for number in sorted(numbers)]
