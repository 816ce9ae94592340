"""How alike the parts of a weight are: spectra of its groups, and how far they differ. Pure functions of tensors.

A weight `W` of shape (d_out, d_in) is cut into k groups of neighbouring rows `W_g`, of shape (n_g, d_in), or of columns. The paper calls a
weight balanced whose spectra of `W_g W_g^T` are nearly the same in mean energy and in decay, and quotes an "inter-group dispersion" of
about 0.001 without a formula. The formulas here are our choice:

energy          e_g = ||W_g||_F^2 / (entries of W_g), the mean squared entry
rho             variance of e_g over the groups / (mean of e_g)^2, the squared coefficient of variation
energy spread   sqrt(rho)
decay           p_g = eigenvalues of W_g W_g^T by falling size, over their sum
decay distance  mean over the groups of the total variation distance between p_g and their mean: 1/2 sum_i |p_gi - mean_i|, from 0 to 1

The variance is that of a sample (k - 1 below the line). So rho does not depend on k where there is no order in the weight: entries drawn
independently with kurtosis q (3 of a Gaussian) give an expected rho of about (q - 1) / (entries of a group).

rho, spread and ranks do not change when the weight is scaled, or turned on the side that is not cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from slicefine.slicing import SLICE_AXES


def cut(weight: Tensor, axis: str, groups: int) -> list[Tensor]:
    """`groups` groups of neighbouring rows or columns of `weight` `(d_out, d_in)`, each with its vectors as rows; views.

    Where the number does not divide, the first groups have one vector more. With more groups than vectors the last ones are empty.
    """
    return list(torch.tensor_split(vectors(weight, axis), groups))


def vectors(weight: Tensor, axis: str) -> Tensor:
    """The rows (`axis="row"`) or the columns of `weight` `(d_out, d_in)`, one in each row; a view."""
    return weight.movedim(SLICE_AXES.index(axis), 0)


@dataclass(frozen=True, kw_only=True)
class Spectra:
    """Energy and eigenvalues of the groups of a weight, in fp64, on the device of the weight."""

    energy: Tensor
    """`(groups,)`: mean squared entry"""
    eigenvalues: Tensor
    """`(groups, longest)`: of the smaller Gram matrix of each group, falling; filled up with zeros where a group has fewer"""

    @classmethod
    def of(cls, groups: Iterable[Tensor]) -> Spectra:
        """The spectra of `groups`, matrices `(n_g, across)` that are not empty; one of them is in memory in fp64 at a time."""
        energies: list[Tensor] = []
        eigenvalues: list[Tensor] = []
        for group in groups:
            wide = group.double()
            energies.append(wide.square().mean())
            eigenvalues.append(_eigenvalues(wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide))
        return cls(energy=torch.stack(energies), eigenvalues=pad_sequence(eigenvalues, batch_first=True))

    @property
    def rho(self) -> float:
        """Squared coefficient of variation of the energy; NaN if there is no energy, or one group."""
        return float(self.energy.var() / self.energy.mean().square()) if len(self.energy) > 1 else float("nan")

    @property
    def energy_spread(self) -> float:
        """Coefficient of variation of the energy: the square root of rho."""
        return self.rho**0.5

    @property
    def decay(self) -> Tensor:
        """`(groups with energy, longest)`: eigenvalues over their sum. A group of zeros decays in no way, and is left out."""
        alive = self.eigenvalues[self.eigenvalues[:, 0] > 0]
        return alive / alive.sum(1, keepdim=True)

    @property
    def decay_distance(self) -> float:
        """Mean total variation distance between the decay of a group and the mean decay.

        A group with one vector less than others has one eigenvalue less, which counts as zero.
        """
        return float((self.decay - self.decay.mean(0)).abs().sum(1).mean() / 2)

    @property
    def cumulative(self) -> Tensor:
        """`(groups with energy, longest + 1)`: share of the energy in the first 0, 1, 2, ... eigenvalues."""
        return torch.nn.functional.pad(self.decay.cumsum(1), (1, 0))

    @property
    def stable_rank(self) -> Tensor:
        """`(groups with energy,)`: `||W_g||_F^2 / ||W_g||_2^2`, at most the rank."""
        return 1 / self.decay[:, 0]

    @property
    def effective_rank(self) -> Tensor:
        """`(groups with energy,)`: exponential of the entropy of the singular values over their sum (Roy & Vetterli, 2007)."""
        values = self.decay.sqrt()
        shares = values / values.sum(1, keepdim=True)
        return torch.special.entr(shares).sum(1).exp()


def _eigenvalues(gram: Tensor) -> Tensor:
    """`(size,)`: eigenvalues of a symmetric matrix that has none below zero, falling."""
    found = torch.linalg.eigvalsh(gram).flip(0)
    # What is smaller than this is what rounding has left of a zero.
    return torch.where(found > found[0] * len(gram) * torch.finfo(found.dtype).eps, found, 0.0)
