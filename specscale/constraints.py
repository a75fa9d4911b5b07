"""The constraints: how a weight is put back on its target norm, given what was measured.

A constraint is a norm and a map. Its `norm` measures the matrices (`specscale.norms`). Its `write_` changes the
weight, and `norm_after` says what the norm then is, where that is not the target. A new constraint is one class
here and one entry in `CONSTRAINTS`; its options are the fields of the class. Checkpoints hold its name.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from specscale.block import Block
from specscale.linalg import add_product, broadcast_to, can_sync, concat, may_be_rounded, product
from specscale.lowering import lowering
from specscale.norms import FrobeniusNorm, Measurement, Norm, SpectralNormByDecomposition, SpectralNormBySolver
from specscale.solvers import Solver


@dataclass(frozen=True)
class Constraint(ABC):
    """A norm, and the map that puts a weight back on its target norm."""

    solver: Solver = field(default=Block(), kw_only=True)
    """The solver, where the norm takes one."""
    name: ClassVar[str]
    norm_type: ClassVar[type[Norm]]

    @cached_property
    def norm(self) -> Norm:
        return self.norm_type.with_solver(self.solver)

    @abstractmethod
    def write_(self, weights: list[Tensor], measurement: Measurement, target: Tensor, skip_mask: Tensor) -> None:
        """Update the weights in place, each as `(k_i, o, i, ...)`: `MatrixView.split`, a view in every memory format.

        Nothing must change where `skip_mask (k,)` is true. `target (k,)` and `measurement.norm` are of one dtype.
        """

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
        self.write_(weights, measurement, target, skip_mask)
        return torch.where(skip_mask, norm, self.norm_after(measurement, target))


class Frobenius(Constraint):
    """`W <- W t / ||W||_F`: the Norm Scaling post's Frobenius norm scaling."""

    name = "frobenius"
    norm_type = FrobeniusNorm

    def write_(self, weights: list[Tensor], measurement: Measurement, target: Tensor, skip_mask: Tensor) -> None:
        factors = torch.where(skip_mask, 1, target / measurement.norm).split([len(weight) for weight in weights])
        for weight, factor in zip(weights, factors, strict=True):
            weight.mul_(broadcast_to(factor, weight))


class Spectral(Constraint):
    """`W <- W + (t - s) u v^T` for the first singular triple `(s, u, v)`: the post's spectral norm scaling.

    Only the first singular value moves; where the second is above `t`, the norm stays above `t`.
    """

    name = "spectral"
    norm_type = SpectralNormBySolver

    def write_(self, weights: list[Tensor], measurement: Measurement, target: Tensor, skip_mask: Tensor) -> None:
        steps = torch.where(skip_mask, 0, target - measurement.norm).split([len(weight) for weight in weights])
        for weight, triple, step in zip(weights, measurement.factors, steps, strict=True):
            # On the split tensor, not on the matrix, a rank-one update is a broadcast product in any memory format.
            right = triple.right.reshape(len(weight), 1, *weight.shape[2:])
            weight.addcmul_(broadcast_to(step[:, None] * triple.left, weight), right)

    def norm_after(self, measurement: Measurement, target: Tensor) -> Tensor:
        next_value = concat([triple.next_value for triple in measurement.factors])
        return torch.maximum(target, next_value.to(target.dtype))


class Clipped(Constraint):
    """`W <- U min(S, t) V^T`, with the first singular value always at `t`: singular value clipping.

    As Saito et al., "Temporal generative adversarial nets with singular value clipping" (2017), section 3.4, do at 1.
    It moves the first triple as `Spectral` does, and lowers every other singular value that is above the target, so
    that the norm is the target exactly.
    """

    name = "clipped"
    norm_type = SpectralNormByDecomposition

    def write_(self, weights: list[Tensor], measurement: Measurement, target: Tensor, skip_mask: Tensor) -> None:
        counts = [len(weight) for weight in weights]
        each = zip(weights, measurement.factors, target.split(counts), skip_mask.split(counts), strict=True)
        for weight, (values, vectors), own_target, skip in each:
            above = values > own_target[:, None].to(values.device)
            above[:, -1] = True
            # The relative part of each singular value that is taken off.
            excess = torch.where(above, 1 - own_target[:, None].to(values) / values, 0)
            part = product(vectors * excess[:, None], vectors.mT).to(target)
            matrices = weight.reshape(*weight.shape[:2], -1).to(part.dtype)
            is_tall = matrices.shape[-2] >= matrices.shape[-1]
            correction = product(matrices, part) if is_tall else product(part, matrices)
            weight.sub_(torch.where(skip[:, None, None], 0, correction).reshape(weight.shape))


class Cap(Constraint):
    """`||W|| <= t`: a matrix below its target stays as it is, bit for bit.

    Of a matrix above, every singular value above the target that the solver's block of 16 vectors holds is lowered to
    the target. Where more values are above it than the block holds, or the block is known too roughly, the whole matrix
    is scaled down by what is left: see `specscale.lowering`. Both keep a margin from the solver's residuals, so that
    the norm afterwards is a little below the target.
    """

    name = "cap"
    norm_type = SpectralNormBySolver

    @cached_property
    def norm(self) -> Norm:
        solver = replace(self.solver, keeps_subspace=True) if isinstance(self.solver, Block) else self.solver
        return self.norm_type.with_solver(solver)

    def write_(self, weights: list[Tensor], measurement: Measurement, target: Tensor, skip_mask: Tensor) -> None:
        is_above = ~skip_mask & (measurement.norm > target)
        if can_sync(target) and not bool(is_above.any()):
            return
        counts = [len(weight) for weight in weights]
        each = (numbers.split(counts) for numbers in (target, is_above))
        for weight, triple, own_target, change in zip(weights, measurement.factors, *each, strict=True):
            known = triple.subspace
            found = lowering(own_target / known.scale, known.squares, known.coupling, known.rest)
            part = product(known.left, found.part) * (found.factor * known.scale)[:, None, None]
            lower_(weight, found.factor, part, known.right, change)

    def norm_after(self, measurement: Measurement, target: Tensor) -> Tensor:
        return torch.minimum(measurement.norm, target)


def lower_(weight: Tensor, factor: Tensor, left: Tensor, right: Tensor, change: Tensor) -> None:
    """`W <- factor W - left right^T` where `change (k,)` is true, of a weight `(k, o, i, ...)`."""
    is_contiguous = weight.is_contiguous() and weight.dtype == left.dtype
    matrices = weight.reshape(len(weight), left.shape[-2], right.shape[-2])
    if is_contiguous and can_sync(weight) and not may_be_rounded(weight):
        # In place, and only what changes.
        for k in change.nonzero()[:, 0].tolist():
            matrices[k].addmm_(left[k], right[k].mT, beta=factor[k].item(), alpha=-1)
        return
    matrices = matrices.to(left.dtype)
    changed = add_product(matrices * factor[:, None, None], left, right.mT, alpha=-1)
    weight.copy_(torch.where(change[:, None, None], changed, matrices).reshape(weight.shape))


CONSTRAINTS: dict[str, type[Constraint]] = {one.name: one for one in (Frobenius, Spectral, Clipped, Cap)}
"""Every constraint, by the name that callers and checkpoints use."""
