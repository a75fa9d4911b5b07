"""The constraints: how a weight is put back on its target norm, given what was measured.

A constraint is a norm and a map. Its `norm` measures the matrices (`specscale.norms`). Its `write_` changes the
weight, and `norm_after` says what the norm then is, where that is not the target. A new constraint is one class
here and one entry in `CONSTRAINTS`; its options are the fields of the class. Checkpoints hold its name.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from specscale.block import Block
from specscale.linalg import concat, product
from specscale.norms import (
    ColumnNorm,
    FrobeniusNorm,
    Measurement,
    Norm,
    RowNorm,
    SpectralNormByDecomposition,
    SpectralNormBySolver,
)
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

    def view(self, view: MatrixView, weight: Tensor) -> MatrixView:
        """The matrices that it holds, of a weight of a layer that reads it by `view`: the same, unless overridden."""
        return view

    def of_orthogonal(self, gain: float, view: MatrixView, weight: Tensor) -> float:
        """The norm that it holds where each matrix of `view` is `gain` times a semi-orthogonal one."""
        return self.norm.of_orthogonal(gain, *view.matrix_shape(weight))

    @abstractmethod
    def write_(self, weights: list[SplitWeight], measurement: Measurement, target: Tensor, skip_mask: Tensor) -> None:
        """Update the weights in place, by writing to the `tensor` of each.

        `len(weight)` matrices of `target (k,)` and `skip_mask (k,)` are a weight's, in the order of `weights`. Nothing
        must change where `skip_mask` is true. `target` and `measurement.norm` are of one dtype.
        """

    def norm_after(self, measurement: Measurement, target: Tensor) -> Tensor:
        """The norms `(k,)` after `write_`, of the matrices that were not skipped: the target, unless overridden."""
        return target

    def project_(
        self, weights: list[SplitWeight], measurement: Measurement, target: Tensor, skip_mask: Tensor
    ) -> Tensor:
        """Put the matrices of `weights` back on `target (k,)`, in place.

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

    def write_(self, weights: list[SplitWeight], measurement: Measurement, target: Tensor, skip_mask: Tensor) -> None:
        factors = torch.where(skip_mask, 1, target / measurement.norm).split([len(weight) for weight in weights])
        for weight, factor in zip(weights, factors, strict=True):
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
        counts = [len(weight) for weight in weights]
        each = zip(weights, measurement.factors, target.split(counts), skip_mask.split(counts), strict=True)
        for weight, (values, vectors), own_target, skip in each:
            above = values > own_target[:, None].to(values.device)
            above[:, -1] = True
            # The relative part of each singular value that is taken off.
            excess = torch.where(above, 1 - own_target[:, None].to(values) / values, 0)
            part = product(vectors * excess[:, None], vectors.mT).to(target)
            matrices = weight.matrices().to(part.dtype)
            is_tall = matrices.shape[-2] >= matrices.shape[-1]
            correction = product(matrices, part) if is_tall else product(part, matrices)
            weight.tensor.sub_(weight.per_element(torch.where(skip[:, None, None], 0, correction)))


CONSTRAINTS: dict[str, type[Constraint]] = {one.name: one for one in (Frobenius, Rows, Columns, Spectral, Clipped)}
"""Every constraint, by the name that callers and checkpoints use."""
