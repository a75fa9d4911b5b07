"""The constraints: how a weight is put back on its target norm, given what was measured.

A constraint is a norm and a map. Its `norm` measures the matrices (`specscale.norms`). Its `write_` changes the
weight, and `norm_after` says what the norm then is, where that is not the target. A new constraint is one class
here and one entry in `CONSTRAINTS`; its options are the fields of the class. Checkpoints hold its name.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from specscale import linalg
from specscale.block import Block
from specscale.linalg import add_product, at_least_float32, concat, may_be_rounded, product
from specscale.lowering import lowering
from specscale.norms import (
    ColumnNorm,
    FrobeniusNorm,
    Measurement,
    Norm,
    RowNorm,
    SpectralNormByDecomposition,
    SpectralNormBySolver,
)
from specscale.polar import polar_factor
from specscale.shards import WeightParts
from specscale.solvers import Solver
from specscale.views import MatrixView, SplitWeight


@dataclass(frozen=True)
class Constraint(ABC):
    """A norm, and the map that puts a weight back on its target norm."""

    solver: Solver = field(default=Block(), kw_only=True)
    """The solver, where the norm takes one."""
    name: ClassVar[str]
    norm_type: ClassVar[type[Norm]]
    part: ClassVar[str] = "matrix"
    """What of a weight has a norm of its own."""
    takes_embeddings: ClassVar[bool] = False
    """Whether it also holds embeddings, where `include` names them: see `specscale.weights.select`."""

    @cached_property
    def norm(self) -> Norm:
        return self.norm_type.with_solver(self.solver)

    @property
    def needs_whole(self) -> bool:
        """Whether it needs whole matrices, so that a sharded weight cannot be under it."""
        return not self.norm.reads_shards

    def view(self, view: MatrixView, weight: Tensor) -> MatrixView:
        """The matrices that it holds, of a weight of a layer that reads it by `view`: the same, unless overridden."""
        return view

    def of_orthogonal(self, gain: float, view: MatrixView, weight: Tensor) -> float:
        """The norm that it holds where each matrix of `view` is `gain` times a semi-orthogonal one."""
        return self.norm.of_orthogonal(gain, *view.matrix_shape(weight))

    @abstractmethod
    def write_(
        self, weights: list[SplitWeight], measurement: Measurement, target: Tensor, skip_mask: Tensor
    ) -> Tensor | None:
        """Update the weights in place, by writing to the `tensor` of each.

        `len(weight)` matrices of `target (k,)` and `skip_mask (k,)` are a weight's, in the order of `weights`. Nothing
        must change where `skip_mask` is true. `target` and `measurement.norm` are of one dtype.
        Returns the residual `(k,)` of a map that iterates; None, of the others, keeps that of the measurement.
        """

    def norm_after(self, measurement: Measurement, target: Tensor) -> Tensor:
        """The norms `(k,)` after `write_`, of the matrices that were not skipped: the target, unless overridden."""
        return target

    def project_(
        self, weights: list[WeightParts], measurement: Measurement, target: Tensor, skip_mask: Tensor
    ) -> Measurement:
        """Put the matrices of `weights` back on `target (k,)`, in place: what this process holds of them.

        Those where `skip_mask (k,)` is true and those of norm zero, which have no direction, are skipped. Returns
        what was measured, with the norms and the residuals afterwards.
        """
        norm = measurement.norm.to(target.dtype)
        measurement = measurement._replace(norm=norm)
        skip_mask = skip_mask | (norm == 0)
        residual = self._write_parts_(weights, measurement, target, skip_mask)
        if residual is not None:
            measurement = measurement._replace(residual=torch.where(skip_mask, measurement.residual, residual))
        return measurement._replace(norm=torch.where(skip_mask, norm, self.norm_after(measurement, target)))

    def _write_parts_(
        self, weights: list[WeightParts], measurement: Measurement, target: Tensor, skip_mask: Tensor
    ) -> Tensor | None:
        """`write_` of what this process holds: whole weights, or parts, which are to it what weights are."""
        if not any(weight.is_sharded for weight in weights):
            return self.write_([weight.parts[0].split for weight in weights], measurement, target, skip_mask)
        counts = [weight.num_matrices for weight in weights]
        parts, numbers, factors = [], [], []
        of_weights = (one.split(counts) for one in (*measurement[:4], target, skip_mask))
        for weight, factor, *own in zip(weights, measurement.factors, *of_weights, strict=True):
            for part in weight.parts:
                parts.append(part.split)
                numbers.append([one[part.matrices] for one in own])
                factors.append(None if factor is None else factor.part(*part[1:]))
        if parts:
            norm, residual, error, count, own_target, own_skip_mask = map(concat, zip(*numbers, strict=True))
            self.write_(parts, Measurement(norm, residual, error, count, factors, []), own_target, own_skip_mask)
        return None


class Frobenius(Constraint):
    """`W <- W t / ||W||_F`: the Norm Scaling post's Frobenius norm scaling."""

    name = "frobenius"
    norm_type = FrobeniusNorm

    def write_(self, weights: list[SplitWeight], measurement: Measurement, target: Tensor, skip_mask: Tensor) -> None:
        _multiply_(weights, torch.where(skip_mask, 1, target / measurement.norm))


def _multiply_(weights: list[SplitWeight], factors: Tensor) -> None:
    """Multiply each matrix of the weights by its own of `factors (k,)`; 1 changes no bit."""
    for weight, factor in zip(weights, factors.split([len(weight) for weight in weights]), strict=True):
        weight.tensor.mul_(weight.per_matrix(factor))


class _Parts(Frobenius):
    """Frobenius norm scaling of parts of a matrix, all of one size."""

    takes_embeddings = True

    def of_orthogonal(self, gain: float, view: MatrixView, weight: Tensor) -> float:
        # In the root mean square, since the rows of a tall matrix with orthonormal columns differ. Those of a wide one
        # all have this norm.
        parts = self.view(view, weight).count // view.count
        return super().of_orthogonal(gain, view, weight) / math.sqrt(parts)


class Rows(_Parts):
    """`w <- w t / ||w||` for every row `w`: each output keeps the norm of its weights.

    A row is an output of a linear layer, an output channel of a convolution with all its inputs and its kernel, or the
    vector of an embedding's token. Afterwards every row is on its target. Weight normalization (Salimans and Kingma,
    2016) splits a weight in the same way, and learns the norms; nGPT (Loshchilov et al., 2024) holds them at 1. Costs
    as `Frobenius`: no product, and three passes over the weight; its state is 20 bytes a row. A row of zeros, as that
    of a padding token, has no direction and stays zero.
    """

    name = "rows"
    norm_type = RowNorm
    part = "row"

    def view(self, view: MatrixView, weight: Tensor) -> MatrixView:
        return view.each_row(weight)


class Columns(_Parts):
    """`w <- w t / ||w||` for every column `w`: each input keeps the norm of the weights that read it.

    A column is an input of a linear layer, an input channel of a convolution with the kernels of all its outputs, or a
    feature of an embedding. Afterwards every column is on its target. A matrix whose columns have at most the norm `t`
    is one that maps every vector of l1 norm 1, as a one-hot one, to l2 norm `t` or less. Costs as `Rows`: no product,
    and three passes over the weight; its state is 20 bytes a column. A column of zeros has no direction and stays
    zero.
    """

    name = "columns"
    norm_type = ColumnNorm
    part = "column"

    def view(self, view: MatrixView, weight: Tensor) -> MatrixView:
        return view.each_column(weight)


class Spectral(Constraint):
    """`W <- W + (t - s) u v^T` for the first singular triple `(s, u, v)`: the post's spectral norm scaling.

    Only the first singular value moves; where the second is above `t`, the norm stays above `t`.
    """

    name = "spectral"
    norm_type = SpectralNormBySolver

    def write_(self, weights: list[SplitWeight], measurement: Measurement, target: Tensor, skip_mask: Tensor) -> None:
        steps = torch.where(skip_mask, 0, target - measurement.norm).split([len(weight) for weight in weights])
        for weight, triple, step in zip(weights, measurement.factors, steps, strict=True):
            # On the split tensor, not on the matrix, a rank-one update is a broadcast product in any memory format.
            weight.tensor.addcmul_(weight.per_row(step[:, None] * triple.left), weight.per_column(triple.right))

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

    def write_(self, weights: list[SplitWeight], measurement: Measurement, target: Tensor, skip_mask: Tensor) -> None:
        _lower_(weights, measurement, target, skip_mask, raise_first=True)


def _lower_(
    weights: list[SplitWeight], measurement: Measurement, target: Tensor, skip_mask: Tensor, *, raise_first: bool
) -> None:
    """Lower every singular value that is above the target to it; with `raise_first`, move the first in any case.

    The factors are those of `SpectralNormByDecomposition`.
    """
    counts = [len(weight) for weight in weights]
    each = zip(weights, measurement.factors, target.split(counts), skip_mask.split(counts), strict=True)
    for weight, (values, vectors), own_target, skip in each:
        if linalg.can_sync(skip) and bool(skip.all()):
            continue
        above = values > own_target[:, None].to(values.device)
        if raise_first:
            above[:, -1] = True
        # The relative part of each singular value that is taken off.
        excess = torch.where(above, 1 - own_target[:, None].to(values) / values, 0)
        part = product(vectors * excess[:, None], vectors.mT).to(target)
        matrices = weight.matrices().to(part.dtype)
        is_tall = matrices.shape[-2] >= matrices.shape[-1]
        correction = product(matrices, part) if is_tall else product(part, matrices)
        weight.tensor.sub_(weight.per_element(torch.where(skip[:, None, None], 0, correction)))


@dataclass(frozen=True)
class Cap(Constraint):
    """`||W|| <= t`: a matrix that is not above its target keeps every bit. One-sided.

    Of a matrix above, the values above the target among the 16 that the solver follows are lowered to the target. What
    couples these directions with the others, and what the others have above the target, is estimated from the solver's
    residuals, on the safe side: see `specscale.lowering`. Where there is more above the target than the 16 hold, the
    whole matrix is scaled down by the rest: all its values shrink, those far below the target too.

    With `exact`, `W <- U min(S, t) V^T`: the projection on the ball of the spectral norm (Saito et al., "Temporal
    generative adversarial nets with singular value clipping", 2017, section 3.4; Sedghi et al., "The singular values of
    convolutional layers", 2019). It lowers what is above the target and nothing else.

    Set: `||W|| <= t (1 + 1e-3)`, by estimates; with `exact`, `t (1 + 1e-5)`. Or as near as the weight's dtype allows.

    Cost: the solver's, which takes an iteration or two more than for `spectral`, and one pass over what changes, 8
    bytes for each entry in float32. With `exact`, at every step, for `(m, n)` with `n <= m`: `2 m n^2` operations for
    the Gram matrix and about `9 n^3` for its decomposition, both in float64; where something is above, as much again
    for the product. On an accelerator the host waits for the decomposition.

    Fails where a matrix jumps, within one step, to more than a hundred times its target: it comes down over several.
    """

    exact: bool = False
    """Whether to lower every value that is above the target, and nothing else, by a decomposition at every step."""
    name = "cap"
    norm_type = SpectralNormBySolver

    @cached_property
    def norm(self) -> Norm:
        if self.exact:
            return SpectralNormByDecomposition()
        solver = replace(self.solver, keeps_subspace=True) if isinstance(self.solver, Block) else self.solver
        return SpectralNormBySolver(solver)

    def write_(self, weights: list[SplitWeight], measurement: Measurement, target: Tensor, skip_mask: Tensor) -> None:
        skip_mask = skip_mask | ~(measurement.norm > target)
        if self.exact:
            _lower_(weights, measurement, target, skip_mask, raise_first=False)
            return
        if linalg.can_sync(skip_mask) and bool(skip_mask.all()):
            return
        counts = [len(weight) for weight in weights]
        each = zip(weights, measurement.factors, target.split(counts), skip_mask.split(counts), strict=True)
        for weight, triple, own_target, skip in each:
            known = triple.subspace
            found = lowering(own_target / known.scale, known.squares, known.coupling, known.rest)
            left = product(known.left, found.part) * (found.factor * known.scale)[:, None, None]
            _add_low_rank_(weight, found.factor, left, known.right, skip)

    def norm_after(self, measurement: Measurement, target: Tensor) -> Tensor:
        return torch.minimum(measurement.norm, target)


def _add_low_rank_(weight: SplitWeight, factor: Tensor, left: Tensor, right: Tensor, skip: Tensor) -> None:
    """`W <- factor W - left right^T`, but where `skip (k,)` is true."""
    tensor, matrices = weight.tensor, weight.matrices()
    # A compiler, for which nothing can be read, cannot trace the question for addresses.
    if (
        linalg.can_sync(tensor)
        and matrices.data_ptr() == tensor.data_ptr()
        and matrices.dtype == left.dtype
        and not may_be_rounded(tensor)
    ):
        # In place, and only what changes.
        for k in (~skip).nonzero()[:, 0].tolist():
            matrices[k].addmm_(left[k], right[k].mT, beta=factor[k].item(), alpha=-1)
        return
    matrices = matrices.to(left.dtype)
    changed = add_product(matrices * factor[:, None, None], left, right.mT, alpha=-1)
    tensor.copy_(weight.per_element(torch.where(skip[:, None, None], matrices, changed)))


@dataclass(frozen=True)
class Normalize(Constraint):
    """`W <- W t / ||W||`: the whole matrix scaled, so that its spectral norm is `t`.

    What `torch.nn.utils.parametrizations.spectral_norm` (Miyato et al., "Spectral normalization for generative
    adversarial networks", 2018, equation 8, at `t = 1`) does in every forward; here the weight itself is scaled, after
    the step, and no gradient passes through the norm. One-sided, `W <- W min(1, t / ||W||)`: a matrix that is not
    above its target keeps every bit. The ratios of the singular values stay, so that a matrix whose first one has
    jumped loses size in every other direction.

    Set: `||W|| = t` within the solver's error, 1e-3 at most where `Block` has reported that it has converged;
    `||W|| <= t` likewise, where one-sided.

    Cost: that of measuring, see the solver, and one pass over the weight, 8 bytes for each of its entries in float32.

    Fails on a matrix of zeros, which has no direction and stays as it is.
    """

    one_sided: bool = False
    """Whether matrices below their target are left alone."""
    name = "normalize"
    norm_type = SpectralNormBySolver

    def write_(self, weights: list[SplitWeight], measurement: Measurement, target: Tensor, skip_mask: Tensor) -> None:
        if self.one_sided:
            skip_mask = skip_mask | (measurement.norm <= target)
        _multiply_(weights, torch.where(skip_mask, 1, target / measurement.norm))

    def norm_after(self, measurement: Measurement, target: Tensor) -> Tensor:
        return torch.minimum(measurement.norm, target) if self.one_sided else target


@dataclass(frozen=True)
class Orthogonal(Constraint):
    """`W <- t U V^T`, `t` times the polar factor: the nearest matrix whose singular values all are `t`.

    The retraction on the Stiefel manifold that is also the projection (Absil & Malick, "Projection-like retractions on
    matrix manifolds", 2012), by scaled Newton-Schulz iteration: see `specscale.polar` for the sources.

    Set: `W^T W = t^2 I`, or `W W^T` where that is the smaller: each singular value is within 1e-5 of `t`, relative,
    where the iteration has converged, or as near as the weight's dtype allows. The residual that is reported is an
    estimate of `||I - W^T W / t^2||` after the step.

    Cost: that of measuring the norm, and for `(m, n)` with `n <= m` two products of `2 m n^2` operations in each
    iteration, in float32 (float64 for a float64 weight), which read `W` twice and write it once: 12 bytes for each
    entry in float32. On a CPU the iteration ends where the matrix has converged: after 2 or 3 from singular values that
    are within 10 % of each other, after 5 or 6 from 0.1 of the first, after 12 from 1e-3. Elsewhere all
    `max_iterations` are taken.

    Fails on singular values below 1e-4 of the first: they do not reach `t` within one step. Later steps raise them
    further, and the residual shows how far they are. One of zero, of a matrix without full rank, stays zero. Below
    1e-7 of the first, a direction is rounding. A matrix of zeros stays as it is.
    """

    max_iterations: int = 16
    """The most iterations of one step; on an accelerator, which reads nothing back, all of them are taken."""
    name = "orthogonal"
    norm_type = SpectralNormBySolver

    @property
    def needs_whole(self) -> bool:
        # The iteration multiplies the whole matrix by itself.
        return True

    def __post_init__(self) -> None:
        if self.max_iterations < 1:
            raise ValueError(f"{self}: max_iterations must be at least 1")

    def write_(self, weights: list[SplitWeight], measurement: Measurement, target: Tensor, skip_mask: Tensor) -> Tensor:
        # Above every singular value, which the solver may have missed by its error; a matrix that is skipped must not
        # be divided by zero.
        bound = measurement.norm * (1 + MARGIN + measurement.error.clamp_max(0.5))
        bound = torch.where(skip_mask, 1, bound)
        counts = [len(weight) for weight in weights]
        residuals = []
        each = zip(weights, bound.split(counts), target.split(counts), skip_mask.split(counts), strict=True)
        for weight, own_bound, own_target, skip in each:
            matrices = at_least_float32(weight.matrices())
            factor, residual = polar_factor(matrices, own_bound, self.max_iterations, skip)
            projected = torch.where(skip[:, None, None], matrices, factor * own_target[:, None, None])
            weight.tensor.copy_(weight.per_element(projected))
            residuals.append(residual.clamp_min(torch.finfo(weight.tensor.dtype).eps))
        return concat(residuals)


MARGIN = 0.01
"""How far, relative, the polar iteration starts above the norm that was measured."""

CONSTRAINTS: dict[str, type[Constraint]] = {
    one.name: one for one in (Frobenius, Rows, Columns, Spectral, Clipped, Cap, Normalize, Orthogonal)
}
"""Every constraint, by the name that callers and checkpoints use."""
