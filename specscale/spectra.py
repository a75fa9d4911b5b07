"""The norms and singular values of any model's weights, scaled or plain, frozen or not."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from specscale.errors import public_call
from specscale.layers import LayerRule
from specscale.linalg import (
    at_least_float32,
    gram,
    has_float64,
    in_float64,
    no_grad_full_precision,
    scaled_to_one,
    smaller_gram,
)
from specscale.reports import aligned
from specscale.shards import whole
from specscale.state import scaling_of
from specscale.weights import Patterns, Weight, refuse_non_finite, select


@dataclass(frozen=True)
class WeightNorms:
    """One weight's norms. Of a weight that is several matrices, the largest of each, and the smallest stable rank."""

    name: str
    count: int
    """Matrices in the tensor."""
    shape: tuple[int, int]
    """`(m, n)` of one matrix."""
    spectral: float
    """The largest singular value; NaN where the weight is not finite."""
    frobenius: float
    """The root of the sum of squares; NaN where the weight is not finite."""
    stable_rank: float
    """`||W||_F^2 / ||W||^2`, from 1 to the rank (Rudelson & Vershynin, "Sampling from large matrices", 2007); 0 for a
    matrix of zeros."""
    target: float | None = None
    """Where the weight is scaled, the target of its norm: the largest of its matrices'."""
    constraint: str | None = None
    """Where the weight is scaled, the constraint's name, which says of which norm the target is."""


@dataclass(frozen=True)
class ModelNorms:
    """The norms of a model's weights, in its order; `print` shows them as a table."""

    weights: list[WeightNorms]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """The fields of each weight by its name: `count`, `shape`, `spectral`, `frobenius`, `stable_rank`, ..."""
        return {one.name: {key: value for key, value in vars(one).items() if key != "name"} for one in self.weights}

    def __str__(self) -> str:
        rows = [("layer", "matrices", "shape", "spectral", "Frobenius", "stable rank", "target", "constraint")]
        for one in self.weights:
            numbers = (f"{one.spectral:.4g}", f"{one.frobenius:.4g}", f"{one.stable_rank:.1f}")
            target = "-" if one.target is None else f"{one.target:.4g}"
            m, n = one.shape
            rows.append((one.name, str(one.count), f"{m}x{n}", *numbers, target, one.constraint or "-"))
        is_scaled = any(one.constraint is not None for one in self.weights)
        return aligned(rows if is_scaled else [row[:-2] for row in rows])


@public_call()
@no_grad_full_precision
def measure(
    module: nn.Module, *, include: Patterns = None, exclude: Patterns = None, rules: Iterable[LayerRule] = ()
) -> ModelNorms:
    """Spectral norm, Frobenius norm and stable rank of every weight of a model, scaled or plain, frozen or not.

    Examples:
        >>> print(specscale.measure(model))
        >>> specscale.measure(model).as_dict()["layer1.0.conv1"]["spectral"]

    A scaled weight has its target beside it, and is read as the matrices that are scaled; `rules` come before that. One
    whose rows or columns are scaled is read as whole matrices, beside the largest target of a row or column. The
    spectral norms are those of `spectral_norms`. A weight that is not finite raises no error: its norms are NaN.

    Raises:
        TypeError: `module` is no module, or an option has a wrong type.
        ValueError: a pattern matches nothing, a rule does not fit a layer, or no weight is selected.
    """
    return ModelNorms([_norms(weight) for weight in select(module, include, exclude, rules, frozen=True)])


def _norms(weight: Weight) -> WeightNorms:
    found = norms_of(weight.name, weight.view.matrices(whole(weight.parameter)))
    scaling = scaling_of(weight.module, weight.tensor)
    # Read as other matrices than those that are scaled: by a rule of this call, or as whole ones of which parts are.
    if scaling is None or (scaling.view != weight.view and scaling.constraint.part == "matrix"):
        return found
    return replace(found, target=scaling.target.max().item(), constraint=scaling.constraint.name)


def norms_of(name: str, matrices: Tensor) -> WeightNorms:
    """The norms of `matrices (k, m, n)`."""
    spectral, frobenius = spectral_and_frobenius(matrices)
    # Of a matrix of zeros and of one that is not finite, the spectral norm is zero or NaN, and so is this.
    stable_rank = torch.where(spectral > 0, (frobenius / spectral).square(), spectral)
    numbers = torch.stack([spectral.max(), frobenius.max(), stable_rank.min()]).tolist()
    count, m, n = matrices.shape
    return WeightNorms(name, count, (m, n), *numbers)


def spectral_and_frobenius(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Two norms of each of `matrices (k, m, n)`, float64, from the smaller Gram matrix; NaN where it is not finite."""
    scaled, scale = scaled_to_one(at_least_float32(matrices))
    square = gram(scaled if scaled.shape[-2] >= scaled.shape[-1] else scaled.mT)
    if not has_float64(square.device):
        # MPS has no eigenvalues either.
        square = square.cpu()
    largest = torch.linalg.eigvalsh(square)[..., -1]
    sums = in_float64(square.diagonal(dim1=-2, dim2=-1)).sum(-1)
    unit = in_float64(scale).to(square.device)
    return in_float64(largest).clamp_min(0).sqrt() * unit, sums.sqrt() * unit


@public_call()
@no_grad_full_precision
def spectral_norms(
    module: nn.Module, *, include: Patterns = None, exclude: Patterns = None, rules: Iterable[LayerRule] = ()
) -> dict[str, float]:
    """The spectral norm of every weight of a model, scaled or plain, frozen or not, by layer name.

    From the smaller Gram matrix, in float32 or the weight's wider dtype: right to a relative 1e-5, and for every
    spectrum, since nothing is iterated. It takes about half the time of `singular_values`. A weight that is
    several matrices is reported by its largest norm, and one that is computed from parameters by the norm of the
    result. NaN where a weight is not finite.

    Raises:
        TypeError: `module` is no module, or an option has a wrong type.
        ValueError: a pattern matches nothing, a rule does not fit a layer, or no weight is selected.
    """
    return {
        weight.name: spectral_and_frobenius(weight.view.matrices(whole(weight.parameter)))[0].max().item()
        for weight in select(module, include, exclude, rules, frozen=True)
    }


@public_call()
@no_grad_full_precision
def singular_values(
    module: nn.Module, *, include: Patterns = None, exclude: Patterns = None, rules: Iterable[LayerRule] = ()
) -> dict[str, Tensor]:
    """All singular values of every weight of a model, scaled or plain, frozen or not, by layer name.

    Each `(k, min(m, n))`, float64, in descending order, for a weight that is `k` matrices `(m, n)`. From the smaller
    Gram matrix in float64, so that each value is right to 1e-8 of the largest, and float32's own rounding of the weight
    is larger than that. Slow for wide layers: `min(m, n)^3` operations a matrix.

    Raises:
        TypeError: `module` is no module, or an option has a wrong type.
        ValueError: a pattern matches nothing, a rule does not fit a layer, or no weight is selected.
        NonFiniteWeightError: a weight holds NaN or infinity.
    """
    weights = select(module, include, exclude, rules, frozen=True)
    refuse_non_finite(weights, "load good weights")
    values = {}
    for weight in weights:
        scaled, scale = scaled_to_one(at_least_float32(weight.view.matrices(whole(weight.parameter))))
        squares = torch.linalg.eigvalsh(smaller_gram(scaled))
        values[weight.name] = squares.flip(-1).clamp_min(0).sqrt() * in_float64(scale)[:, None]
    return values
