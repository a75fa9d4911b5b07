"""The constraints: how a weight is put back on its target norm, given what was measured.

A constraint is a norm and a map. Its `norm` measures the matrices (`specscale.norms`). Its `update` and `write_` change
the weight, and `norm_after` says what the norm then is, where that is not the target. A new constraint is one class
here and one entry in `CONSTRAINTS`. Checkpoints hold its name.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from specscale.linalg import product
from specscale.norms import FrobeniusNorm, Measurement, Norm, SpectralNormByDecomposition, SpectralNormBySolver
from specscale.solvers import Solver


@dataclass(frozen=True)
class Constraint(ABC):
    """A norm, and the map that puts a weight back on its target norm."""

    norm: Norm
    name: ClassVar[str]
    norm_type: ClassVar[type[Norm]]

    @classmethod
    def with_solver(cls, solver: Solver) -> Self:
        """The constraint, with this solver where its norm takes one."""
        return cls(cls.norm_type.with_solver(solver))

    @abstractmethod
    def update(self, measurement: Measurement, target: Tensor, skip_mask: Tensor) -> tuple[Tensor, ...]:
        """What `write_` needs, as tensors whose first dimension is `k`.

        It must change nothing where `skip_mask (k,)` is true. `target (k,)` and `measurement.norm` are of one dtype.
        """

    @abstractmethod
    def write_(self, weight: Tensor, *update: Tensor) -> None:
        """Update one weight in place, as `(k, o, i, ...)`: `MatrixView.split`, a view in every memory format."""

    def norm_after(self, measurement: Measurement, target: Tensor) -> Tensor:
        """The norms `(k,)` after `write_`, of the matrices that were not skipped: the target, unless overridden."""
        return target

    def project_(self, weights: list[Tensor], measurement: Measurement, target: Tensor, skip_mask: Tensor) -> Tensor:
        """Put the matrices of `weights`, each `(k_i, o, i, ...)`, back on `target (k,)`, in place.

        Those where `skip_mask (k,)` is true and those of norm zero, which have no direction, are skipped. Returns
        the norms `(k,)` afterwards.
        """
        norm = measurement.norm.to(target.dtype)
        measurement = measurement._replace(norm=norm)
        skip_mask = skip_mask | (norm == 0)
        updates = self.update(measurement, target, skip_mask)
        counts = [len(weight) for weight in weights]
        for weight, *own in zip(weights, *(part.split(counts) for part in updates), strict=True):
            self.write_(weight, *own)
        return torch.where(skip_mask, norm, self.norm_after(measurement, target))


def _broadcast(factor: Tensor, weight: Tensor) -> Tensor:
    """`(k,)` or `(k, o)` with trailing dimensions of size one, for broadcasting against `weight (k, o, i, ...)`."""
    return factor.reshape(*factor.shape, *[1] * (weight.ndim - factor.ndim))


class Frobenius(Constraint):
    """`W <- W t / ||W||_F`: the Norm Scaling post's Frobenius norm scaling."""

    name = "frobenius"
    norm_type = FrobeniusNorm

    def update(self, measurement: Measurement, target: Tensor, skip_mask: Tensor) -> tuple[Tensor, ...]:
        return (torch.where(skip_mask, 1, target / measurement.norm),)

    def write_(self, weight: Tensor, *update: Tensor) -> None:
        (factor,) = update
        weight.mul_(_broadcast(factor, weight))


class Spectral(Constraint):
    """`W <- W + (t - s) u v^T` for the first singular triple `(s, u, v)`: the post's spectral norm scaling.

    Only the first singular value moves; where the second is above `t`, the norm stays above `t`.
    """

    name = "spectral"
    norm_type = SpectralNormBySolver

    def update(self, measurement: Measurement, target: Tensor, skip_mask: Tensor) -> tuple[Tensor, ...]:
        triple = measurement.factors
        left = torch.where(skip_mask, 0, target - measurement.norm)[:, None] * triple.left
        # A vector that is not finite must not reach a weight that is skipped: zero times NaN is NaN.
        return tuple(torch.where(skip_mask[:, None], 0, vectors) for vectors in (left, triple.right))

    def write_(self, weight: Tensor, *update: Tensor) -> None:
        left, right = update
        # On the split tensor, not on the matrix, a rank-one update is a broadcast product in any memory format.
        weight.addcmul_(_broadcast(left, weight), right.reshape(len(weight), 1, *weight.shape[2:]))

    def norm_after(self, measurement: Measurement, target: Tensor) -> Tensor:
        return torch.maximum(target, measurement.factors.next_value.to(target.dtype))


class Clipped(Constraint):
    """`W <- U min(S, t) V^T`, with the first singular value always at `t`: singular value clipping.

    As Saito et al., "Temporal generative adversarial nets with singular value clipping" (2017), section 3.4, do at 1.
    It moves the first triple as `Spectral` does, and lowers every other singular value that is above the target, so
    that the norm is the target exactly.
    """

    name = "clipped"
    norm_type = SpectralNormByDecomposition

    def update(self, measurement: Measurement, target: Tensor, skip_mask: Tensor) -> tuple[Tensor, ...]:
        values, vectors = measurement.factors
        above = values > target[:, None]
        above[:, -1] = True
        # The relative part of each singular value that is taken off.
        excess = torch.where(above, 1 - target[:, None].double() / values, 0)
        return ((vectors * excess[:, None]) @ vectors.mT).to(target.dtype), skip_mask

    def write_(self, weight: Tensor, *update: Tensor) -> None:
        part, skip_mask = update
        matrices = weight.reshape(*weight.shape[:2], -1).to(part.dtype)
        is_tall = matrices.shape[-2] >= matrices.shape[-1]
        correction = product(matrices, part) if is_tall else product(part, matrices)
        weight.sub_(torch.where(skip_mask[:, None, None], 0, correction).reshape(weight.shape))


CONSTRAINTS: dict[str, type[Constraint]] = {one.name: one for one in (Frobenius, Spectral, Clipped)}
"""Every constraint, by the name that callers and checkpoints use."""
