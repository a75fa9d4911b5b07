"""The first singular triples of many matrices at once, by block Krylov iteration from the block of the step before.

One iteration, for each matrix `A (M, N)`, `M >= N`, and its block `V (N, b)`, is a Rayleigh-Ritz step on `[V, R]`, of
`2 b` columns (Golub & Van Loan, "Matrix Computations", section 10.3.6):

    images          Y = A V                          once; a second iteration knows its images
    residuals       R = A^T Y - V (Y^T Y)            and noise in its last column, once
    orthogonalize   R' = R M - V K, V' = V L         so that [V', R'] is orthonormal: from Gram matrices alone
    images          T = A R' = (A R) M - Y K
    rayleigh_ritz   X                                the dominant subspace of [Y L, T]^T [Y L, T], small
    combine         V <- [V', R'] X, Y <- [Y L, T] X

The products with `A` are taken one matrix after another, the small problems of all matrices in one batch. Nothing here
needs float64, a factorization that would make the host wait, or a shape that depends on the data.
`specscale.grouped` does the same on CUDA, kernel by kernel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from specscale import linalg
from specscale.linalg import add_product, broadcast_to, concat, gram, multiplier, product, scaled_to_one, unit
from specscale.random import keys, normal, signs
from specscale.shards import Groups, ShardedMatrices, summed
from specscale.solvers import DenseMatrices, Matrices, Solution, State, Subspace, Triple

NOISE = 0.05
"""The length of the noise that is added to the residual of the last column, relative to the largest Ritz value."""

ROUNDS = 2
"""Rounds of orthogonal iteration in a Rayleigh-Ritz step, each with the sixth power of the matrix.

The dominant subspace is wanted approximately only: a restart from the exact one forgets older directions sooner, and
its errors are up to six times as large.
"""

SQUARINGS = 16
"""Squarings for the first Ritz vector: power iteration with 2^16 steps, whose value is too low by 1e-5 at most."""

CONVERGED = 1e-5
"""The residual below which float32's rounding lets a block become no better."""

JUMP = 0.1
"""The relative rise of a block's largest value in its first iteration from which the weight is taken to have jumped.

A residual of `r` raises the value by at least `sqrt(1 + r^2) - 1`, and a jump that the first column does not see leaves
its residual at zero.
"""

ROUNDING = 64
"""Below so many units of rounding of the largest Ritz value, what is left of a residual may be rounding alone."""

CANCELLATION = 0.1
"""Of a residual's square, the part that must be outside the block: the images' errors grow by what lies within it."""

DEPENDENT = 1e-4
"""Of a residual's square, the part that must be outside the residuals before it, for its direction to be known."""

CAUTION = 0.1
"""See `rayleigh_ritz`: in a crowded spectrum, a value that rises by 1e-4 in the tenth iteration is 1e-3 too low."""

CAUTION_OF_ALL = 0.2
"""The weight of the rise of all values of a block beside that of the first one."""

SEARCH, THOROUGH = 4, 24
"""Of a solve to convergence, for a constraint that must see every value above its target: the iterations after which
noise is added again, and the fewest of all. With 12, one matrix in a hundred had a value above the block's outside."""

REFRESH = 4
"""Iterations after which images are computed from the matrix again, since rounding adds up in those carried along."""


@dataclass(frozen=True)
class Block:
    """Warm-started block Krylov iteration on all singular values near the first: the default.

    It carries a block of `width` vectors from step to step, on the matrix's shorter side. The first is the singular
    vector; the last searches outside the others, by power iteration with fresh noise added at each step, so that a
    singular value that overtakes the block from outside is found. The error left in the singular value is estimated,
    see `estimated_error`. Where the host may read it, a block in its first step, and one whose weight has jumped, is
    solved to a stricter tolerance.

    A matrix whose shorter side is at most two blocks is solved from its Gram matrix instead, without state.
    """

    width: int = 16
    """Columns of the block; products with multiples of 16 are the fastest, and CUDA kernels exist for 16."""
    tolerance: float = 1e-4
    """Iterate until the estimated relative error of the singular value is at most this."""
    max_iterations: int = 8
    """The most iterations of one step; a thorough solve takes up to 60."""
    keeps_subspace: bool = False
    """Return what is known on the whole block too, and do not stop while the first value still rises: for constraints
    that must see every value above the target. Set by those that need it."""

    reads_shards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.width < 2 or self.max_iterations < 1 or not self.tolerance > 0:
            raise ValueError(f"{self}: width must be at least 2, max_iterations at least 1 and tolerance positive")

    def is_small(self, m: int, n: int) -> bool:
        """Whether a matrix `(m, n)` is solved from its Gram matrix, without state."""
        return min(m, n) <= 2 * self.width

    def _thorough(self, tolerance: float, limit: int) -> tuple[float, int]:
        """Tolerance and limit of a solve after a jump or in the first step, where these are not stricter already."""
        return min(tolerance, self.tolerance / 20), max(limit, 60)

    def init_state(
        self, key: Tensor, shape: tuple[int, int], dtype: torch.dtype, side: int | None = None
    ) -> dict[str, Tensor]:
        if self.is_small(*shape):
            return {}
        basis = torch.linalg.qr(normal(key, (side or min(shape), self.width), dtype)).Q
        # `age` counts the solves since the initial state, and seeds the noise.
        age = torch.zeros(len(key), dtype=dtype, device=key.device)
        if side is None:
            return {"basis": basis, "age": age}
        # A distributed checkpoint loads no tensor of another shape: that of a whole weight is there too, without a
        # block, so that one of a sharded weight loads into a whole one, which is then solved anew.
        return {"basis": basis.new_zeros(len(key), min(shape), self.width), "other_basis": basis, "age": age}

    def scratch_elements(self, m: int, n: int) -> int:
        if self.is_small(m, n):
            return m * n + 2 * min(m, n) ** 2
        # The block, its residuals, their images and what they become.
        return 4 * self.width * (m + n)

    def next_num_iterations(self, num_iterations: int | None, error: float | None) -> int | None:
        # What must see every value above the target has no second chance after a jump.
        spare = 3 if self.keeps_subspace else 1
        if num_iterations is None or error is None:
            return min(2 * spare, self.max_iterations)
        # An iteration divides the error by about eight; it may be infinite.
        missing = int(math.log(min(error, 1.0) / self.tolerance, 8)) if error > self.tolerance else 0
        # More than were needed, since steps differ; the kernels leave out those that are not needed.
        return min(num_iterations + spare + missing, self.max_iterations)

    def solve(
        self,
        matrices: Sequence[Matrices],
        states: Sequence[State],
        *,
        to_convergence: bool = False,
        num_iterations: int | None = None,
    ) -> list[Solution]:
        oriented = [one.mT if one.block_on_rows else one for one in matrices]
        small: list[int] = []
        large: list[int] = []
        for i, one in enumerate(oriented):
            (small if self.is_small(*one.shape[1:]) else large).append(i)
        found: dict[int, Solution] = {}
        problems = _SmallProblems([oriented[i] for i in small], self.width)
        if large:
            blocks = [_Iterate(oriented[i], states[i]) for i in large]
            _start(blocks)
            if num_iterations is not None:
                self._iterate_so_often(blocks, problems, num_iterations)
            else:
                self._iterate_until_done(blocks, problems, to_convergence)
                if to_convergence and (drifted := _drifted(blocks)):
                    self._iterate_until_done(drifted, None, to_convergence)
                    _refresh(drifted)
            next_values = second_value(concat([block.squares for block in blocks]))
            next_values = next_values.split([len(block.V) for block in blocks])
            found.update(
                (i, block.solution(next_value, to_convergence, self.keeps_subspace))
                for i, block, next_value in zip(large, blocks, next_values, strict=True)
            )
        elif small:
            problems.totals = summed(problems.parts, problems.groups)
        if small:
            found.update(zip(small, problems.solutions(self.keeps_subspace), strict=True))
        return [found[i] if one is oriented[i] else found[i].transposed() for i, one in enumerate(matrices)]

    def _iterate_so_often(self, blocks: list["_Iterate"], problems: "_SmallProblems", num_iterations: int) -> None:
        """Iterate, and count for each matrix how often until its error was small enough; the host reads nothing."""
        counts = [len(block.V) for block in blocks]
        is_missing = _iterate(blocks, self.keeps_subspace, problems) > self.tolerance
        needed = torch.ones_like(is_missing, dtype=blocks[0].V.dtype)
        for _ in range(num_iterations - 1):
            needed = needed + is_missing
            kept = [block.known() for block in blocks if self.keeps_subspace]
            still = _iterate(blocks, self.keeps_subspace) > self.tolerance
            if self.keeps_subspace:
                # The kernels, and a CPU, stop here too. A further iteration would shrink the residual, from which the
                # margin for what the block misses is taken.
                for block, known, mask in zip(blocks, kept, is_missing.split(counts), strict=True):
                    block.keep_where_(~mask, known)
            is_missing = is_missing & still
        for block, count in zip(blocks, needed.split(counts), strict=True):
            block.needed = count

    def _iterate_until_done(
        self, blocks: list["_Iterate"], problems: "_SmallProblems | None", to_convergence: bool
    ) -> None:
        """Iterate, each batch until it is good enough, which the host reads after every iteration."""
        limits = {}
        for block in blocks:
            tolerance, limit, residual_limit = self.tolerance, self.max_iterations, float("inf")
            if to_convergence:
                # No error is small enough.
                tolerance, limit = -1.0, 300
                block.searches_on = self.keeps_subspace
            elif not bool(block.state["age"].all()):
                tolerance, limit = self._thorough(tolerance, limit)
            limits[block] = tolerance, limit, residual_limit
        number = 0
        while blocks:
            _iterate(blocks, self.keeps_subspace, None if number else problems)
            number += 1
            # A matrix that is not finite has none of these, and nothing to wait for.
            columns = [
                torch.where(b.is_finite, torch.stack([b.ritz.residual, b.ritz.error, b.ritz.rise]), 0).amax(-1)
                for b in blocks
            ]
            active = []
            for block, (residual, error, rise) in zip(blocks, torch.stack(columns).tolist(), strict=True):
                tolerance, limit, residual_limit = limits[block]
                is_done = (error <= tolerance and residual <= residual_limit) or residual <= CONVERGED
                if number == 1 and rise > JUMP:
                    # A jump stands out, so that its value converges before its vectors do. A step that puts it back
                    # among the other values leaves the norm off by up to half the residual.
                    limits[block] = *self._thorough(tolerance, limit), 2 * self.tolerance / (1 + rise)
                    is_done = False
                # That the first value has converged does not mean that the block holds all of the largest ones.
                is_done = is_done and not (block.searches_on and number < THOROUGH)
                if not is_done and number < limits[block][1]:
                    active.append(block)
            blocks = active


class _Iterate:
    """A batch of matrices `A (k, M, N)`, `M >= N`, with its block between iterations."""

    def __init__(self, matrices: Matrices, state: State) -> None:
        self.matrices, self.state = matrices, state
        # The weight may have another dtype than it had when the state was made.
        self.V = basis_of(state).to(matrices.dtype)
        self.Y: Tensor
        """The images: of a sharded matrix, those of its local rows."""
        self.squares: Tensor
        """`Y^T Y`."""
        self.is_finite: Tensor
        self.scale: Tensor
        self.num_iterations = 0
        """The iterations so far."""
        self.needed: Tensor | None = None
        """`(k,)`: how many of them each matrix needed, where that is known."""
        self.refresh_after = REFRESH
        self.is_fresh = True
        """Whether the images have been computed from the matrix since their squares were."""
        self.searches_on = False
        self.ritz: Ritz

    def start(self, images: Tensor) -> None:
        """Begin with `A V`, from which the scale is taken where it is not known.

        Squares would leave float32's range where the entries are near 1e20.
        """
        if self.matrices.scale is None:
            scale = images.abs().amax(dim=(-2, -1))
            self.is_finite = scale.isfinite()
            scale = torch.where(self.is_finite & (scale > 0), scale, 1)
        else:
            # Whether all processes' parts are finite is known with the first sum.
            scale = self.matrices.scale
            self.is_finite = torch.ones_like(scale, dtype=torch.bool)
        self.scale = scale
        self.unscale = scale.reciprocal()[:, None, None]
        self.Y = images * self.unscale

    def set_squares(self, squares: Tensor) -> None:
        """Take `Y^T Y`, summed over processes, of images that have been computed from the matrix."""
        self.squares = squares
        if self.matrices.scale is not None:
            self.is_finite = squares.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()
        self.is_fresh = False

    @property
    def first_length(self) -> Tensor:
        """`(k,)`: the length of the first image."""
        if self.matrices.sums:
            return self.squares[:, 0, 0].clamp_min(0).sqrt()
        return self.Y[..., 0].norm(dim=-1)

    def known(self) -> list[Tensor]:
        """The block, its images, their squares and what the last iteration has found."""
        return [self.V, self.Y, self.squares, *self.ritz]

    def keep_where_(self, mask: Tensor, known: list[Tensor]) -> None:
        """Go back to what was known where `mask (k,)` is true."""
        both = zip(known, self.known(), strict=True)
        self.V, self.Y, self.squares, *ritz = (torch.where(broadcast_to(mask, new), old, new) for old, new in both)
        self.ritz = Ritz(*ritz)

    def residuals(self, products: Tensor) -> Tensor:
        """`A^T Y - V (Y^T Y)`, scaled, with noise in the last column in a step's first iteration; from `A^T Y`.

        Where it `searches_on`, every few iterations again: a column that has found a singular vector would stay there.
        """
        R = add_product(products, self.V, self.squares, alpha=-1)
        if self.num_iterations == 0 or (self.searches_on and self.num_iterations % SEARCH == 0):
            length = NOISE * self.squares.diagonal(dim1=-2, dim2=-1).amax(-1) / R.shape[-2] ** 0.5
            R[..., -1] += length[:, None] * signs(keys(self.state["age"] + self.num_iterations), R.shape[1:2])
        return R

    def solution(self, next_value: Tensor, to_convergence: bool, keeps_subspace: bool) -> Solution:
        """The triple, whose scaled next value is given, and the state to continue from."""
        value, next_value = (
            torch.where(self.is_finite, self.scale * x, torch.nan) for x in (self.ritz.value, next_value)
        )
        # Where rounding has won, which it must not, the next step starts from a block that is one.
        keep = (self.is_finite & self.ritz.value.isfinite())[:, None, None]
        basis = torch.where(keep, self.V, basis_of(self.state))
        # A vector that is not finite must not reach a weight that is skipped: zero times NaN is NaN.
        length = self.first_length.clamp_min(torch.finfo(self.Y.dtype).tiny)
        left = torch.where(keep[..., 0], self.Y[..., 0] / length[:, None], 0)
        needed = torch.full_like(value, self.num_iterations) if self.needed is None else self.needed
        residual, error = (torch.where(self.is_finite, x, 0) for x in (self.ritz.residual, self.ritz.error))
        needed = torch.where(self.is_finite, needed, 1)
        subspace = None
        if keeps_subspace:
            subspace = Subspace(self.Y, self.V, self.squares, self.scale, edge(self.squares), self.ritz.coupling)
        triple = Triple(value, left, unit(basis[..., 0]), next_value, residual, error, needed, subspace)
        age = torch.zeros_like(self.state["age"]) if to_convergence else self.state["age"] + 1
        return Solution(triple, {"other_basis" if "other_basis" in self.state else "basis": basis, "age": age})


def basis_of(state: State) -> Tensor:
    """The block in a state that has one."""
    return state["other_basis"] if "other_basis" in state else state["basis"]


def is_of_another_side(state: State) -> bool:
    """Whether what a distributed checkpoint has put into a state is of a block on another side of the matrix.

    Of a state with `other_basis`, `basis` is zero. What the checkpoint lacks is as it was.
    """
    return "basis" in state and bool(state["basis"].any()) == ("other_basis" in state)


def _images(blocks: list[_Iterate], columns: list[Tensor]) -> list[Tensor]:
    """`A X` of each block's matrices for its columns: of a sharded matrix, its local rows."""
    parts = [block.matrices.matmat(own) for block, own in zip(blocks, columns, strict=True)]
    return summed(parts, [block.matrices.image_sums for block in blocks])


def _start(blocks: list[_Iterate]) -> None:
    for block, images in zip(blocks, _images(blocks, [block.V for block in blocks]), strict=True):
        block.start(images)


def _renew_images(blocks: list[_Iterate]) -> None:
    """Compute images anew from the matrices; their squares are to be computed too."""
    for block, images in zip(blocks, _images(blocks, [block.V for block in blocks]), strict=True):
        block.Y = images * block.unscale
        block.is_fresh = True


def _refresh(blocks: list[_Iterate]) -> None:
    """Compute images, squares and values anew from the matrices."""
    _renew_images(blocks)
    squares = [block.matrices.once(gram(block.Y)) for block in blocks]
    for block, own in zip(blocks, summed(squares, [block.matrices.sums for block in blocks]), strict=True):
        block.set_squares(own)
        value = block.first_length / block.V[..., 0].norm(dim=-1)
        block.ritz = block.ritz._replace(value=value)


def _drifted(blocks: list[_Iterate]) -> list[_Iterate]:
    """Refresh all; those whose images had been carried along wrongly, so that no iteration may do that again."""
    carried = [block.ritz.value for block in blocks]
    _refresh(blocks)
    drifted = []
    for block, value in zip(blocks, carried, strict=True):
        block.refresh_after = 1
        is_right = (block.ritz.value - value).abs() <= 1e-3 * value
        if not bool((is_right | ~block.is_finite).all()):
            drifted.append(block)
    return drifted


def _residuals(blocks: list[_Iterate], problems: "_SmallProblems | None") -> list[Tensor]:
    """The residuals of every batch; what is summed over processes travels at once, with that of small problems."""
    if due := [b for b in blocks if b.num_iterations and b.num_iterations % b.refresh_after == 0]:
        _renew_images(due)
    fresh = [block for block in blocks if block.is_fresh]
    products = [block.matrices.rmatmat(block.Y) * block.unscale for block in blocks]
    squares = [block.matrices.once(gram(block.Y)) for block in fresh]
    parts, groups = [*products, *squares], [block.matrices.sums for block in (*blocks, *fresh)]
    if problems is not None:
        totals = summed([*parts, *problems.parts], [*groups, *problems.groups])
        problems.totals = totals[len(parts) :]
    else:
        totals = summed(parts, groups)
    for block, own in zip(fresh, totals[len(blocks) : len(parts)], strict=True):
        block.set_squares(own)
    products = totals[: len(blocks)]
    del parts, totals
    # Each is let go as its residual is made.
    return [block.residuals(products.pop(0)) for block in blocks]


def _iterate(blocks: list[_Iterate], is_cautious: bool, problems: "_SmallProblems | None" = None) -> Tensor:
    """One iteration of every batch; the small problems are one batch. Returns the estimated errors of all of them.

    `problems` are those of small matrices, whose sums over processes travel with those of the iteration.
    """
    counts = [len(block.V) for block in blocks]
    residuals = _residuals(blocks, problems)
    bases = [torch.cat([block.V, residuals.pop(0)], dim=-1) for block in blocks]
    is_finite = concat([block.is_finite for block in blocks])[:, None, None]
    squares = concat([block.squares for block in blocks])
    gram_s = concat([gram(basis) for basis in bases])
    # A factorization of what is not finite would raise.
    gram_s = torch.where(is_finite, gram_s, torch.eye(gram_s.shape[-1], dtype=gram_s.dtype, device=gram_s.device))
    squares = torch.where(is_finite, squares, 0)
    frame = orthogonalize(gram_s, squares)
    images = []
    of_rest = _images(blocks, [basis[..., basis.shape[-1] // 2 :] for basis in bases])
    for block, M, K in zip(blocks, frame.M.split(counts), frame.K.split(counts), strict=True):
        T = add_product(product(of_rest.pop(0) * block.unscale, M), block.Y, K, alpha=-1)
        images.append(torch.cat([block.Y, T], dim=-1))
    grams = [block.matrices.once(gram(image)) for block, image in zip(blocks, images, strict=True)]
    gram_w = torch.where(is_finite, concat(summed(grams, [block.matrices.sums for block in blocks])), 0)
    ritz = rayleigh_ritz(gram_w, squares, frame, blocks[0].num_iterations + 1, is_cautious)
    parts = (part.split(counts) for part in ritz)
    for block, basis, image, *own_ritz in zip(blocks, bases, images, *parts, strict=True):
        block.ritz = Ritz(*own_ritz)
        block.V = product(basis, block.ritz.of_basis)
        block.Y = product(image, block.ritz.of_images)
        block.squares = block.ritz.squares
        block.num_iterations += 1
    return ritz.error


class Frame(NamedTuple):
    """How `[V L, R M - V K]` is orthonormal, for a batch of small problems `(k, b, b)`."""

    L: Tensor
    K: Tensor
    M: Tensor
    """A column that is zero is one that is not there: of rounding alone, or dependent on those before it."""
    gram: Tensor
    """`(R M - V K)^T (R M - V K)`: nearly the identity, where columns are there."""
    lengths: Tensor
    """`(k, b)`: the lengths of the columns of `R` less their part in `V`."""
    rest: Tensor
    """`(k, b, b)`: the Gram matrix of `R` less its part in `V`."""


def orthogonalize(gram_s: Tensor, squares: Tensor) -> Frame:
    """Make `[V, R]` orthonormal, from its Gram matrix `gram_s (k, 2 b, 2 b)` alone; `squares (k, b, b)` is `Y^T Y`.

    By Cholesky factors, the second one of a Gram matrix with unit diagonal and a shift (Fukaya et al., "Shifted
    Cholesky QR for computing the QR factorization of ill-conditioned matrices", 2020).
    """
    width = squares.shape[-1]
    vv, vr, rr = gram_s[:, :width, :width], gram_s[:, :width, width:], gram_s[:, width:, width:]
    L = _inverse_factor(vv)
    overlap = product(L.mT, vr)
    rest = rr - gram(overlap)
    rest_squares = rest.diagonal(dim1=-2, dim2=-1)
    largest = squares.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    least = (ROUNDING * torch.finfo(gram_s.dtype).eps * largest).square()
    exists = rest_squares > torch.maximum(least, CANCELLATION * rr.diagonal(dim1=-2, dim2=-1))
    inverse = torch.where(exists, rest_squares, 1).rsqrt() * exists
    normalized = inverse[..., None] * rest * inverse[:, None]
    factor = _shifted_factor(normalized, exists)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    exists = exists & (pivots > DEPENDENT) & (pivots * rest_squares > least)
    # Once more without the columns that were dropped: what they are is rounding, and would be taken off the others.
    factor = _shifted_factor(normalized, exists)
    M = inverse[..., None] * _inverse_of_triangle(factor).mT * exists[:, None]
    return Frame(L, product(L, overlap, M), M, product(M.mT, rest, M), rest_squares.clamp_min(0).sqrt(), rest)


class Ritz(NamedTuple):
    """A Rayleigh-Ritz step of a batch of small problems."""

    of_basis: Tensor
    """`(k, 2 b, b)`: `V <- [V, R] of_basis`."""
    of_images: Tensor
    """`(k, 2 b, b)`: `Y <- [Y, T] of_images`."""
    squares: Tensor
    """`(k, b, b)`: `Y^T Y` of the new images."""
    value: Tensor
    """`(k,)`: the largest Ritz value of `A`."""
    residual: Tensor
    """`(k,)`: `||A^T u - s v|| / s` before the step, less the part within the block."""
    error: Tensor
    """`(k,)`: see `estimated_error`."""
    rise: Tensor
    """`(k,)`: how far, relative, the step has raised the largest value."""
    coupling: Tensor
    """`(k, b, b)`: an estimate of `R^T R` of the new block: its columns' parts of the `R` before the step."""


def rayleigh_ritz(gram_w: Tensor, squares: Tensor, frame: Frame, number: int, is_cautious: bool) -> Ritz:
    """The dominant subspace of `[Y L, T]^T [Y L, T]`, approximately, with the exact first vector in front.

    From `gram_w (k, 2 b, 2 b)`, the Gram matrix of `[Y, T]`, and from `squares (k, b, b)`, `Y^T Y`. `number` counts
    the iterations of the step from 1. A cautious error is at least `CAUTION` times what a rise like the last one in
    every iteration so far would be.
    """
    width = squares.shape[-1]
    L, T = frame.L, frame.gram
    upper = product(L.mT, gram_w[:, :width])
    H = torch.cat(
        [
            torch.cat([product(upper[..., :width], L), upper[..., width:]], -1),
            torch.cat([upper[..., width:].mT, gram_w[:, width:, width:]], -1),
        ],
        -2,
    )
    G = torch.zeros_like(H)
    G[:, :width, :width] = torch.eye(width, dtype=H.dtype, device=H.device)
    G[:, width:, width:] = T
    X, squares_after, lengths = dominant_subspace(H, G, width)
    values = (squares_after.diagonal(dim1=-2, dim2=-1) / lengths).clamp_min(0).sqrt()
    before = squares.diagonal(dim1=-2, dim2=-1).amax(-1)
    tiny = torch.finfo(H.dtype).tiny
    top = values[:, :-1].amax(-1)
    residual = frame.lengths[:, 0] / before.clamp_min(tiny)
    rho = frame.lengths[:, :-1].square().mean(-1).sqrt() / before.clamp_min(tiny)
    rise = top.clamp_min(tiny) / before.sqrt().clamp_min(tiny) - 1
    error = estimated_error(rho, 1 - values[:, :-1].amin(-1) / top.clamp_min(tiny), rise, number)
    if is_cautious:
        before_all, after_all = (one.diagonal(dim1=-2, dim2=-1)[:, :-1].sum(-1) for one in (squares, squares_after))
        rise_of_all = (after_all / before_all.clamp_min(tiny) - 1) / 2
        error = torch.maximum(error, torch.maximum(rise, CAUTION_OF_ALL * rise_of_all) * (CAUTION * number))
    head = product(L, X[:, :width])
    tail = X[:, width:]
    of_basis = torch.cat([head - product(frame.K, tail), product(frame.M, tail)], dim=-2)
    of_images = torch.cat([head, tail], dim=-2)
    # Without the column that searches, into which noise was added.
    kept = of_basis[:, : width - 1]
    coupling = product(kept.mT, frame.rest[:, :-1, :-1], kept)
    return Ritz(of_basis, of_images, squares_after, values[:, 0], residual, error, rise, coupling)


def edge(squares: Tensor) -> Tensor:
    """`(k,)`: the smallest value among the columns of a block, or that of the last, which searches, if it is larger.

    An estimate of the largest singular value outside, from `squares (k, b, b)`, the Gram matrix of the images.
    """
    values = squares.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    return torch.maximum(values[:, :-1].amin(-1), values[:, -1])


def dominant_subspace(
    H: Tensor, G: Tensor, count: int, rounds: int = ROUNDS, *, searches: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest eigenvectors of `H x = l G x`, `(k, w, w)` both, `G` near the identity on the columns that exist.

    Returns `X (k, w, count)`, `X^T H X` and the diagonal of `X^T G X`, nearly ones. The first column is an eigenvector,
    by repeated squaring. The next ones span the dominant subspace approximately, by orthogonal iteration from the
    leading coordinates (Golub & Van Loan, "Matrix Computations", section 8.2.4). Where it `searches`, the last is the
    last coordinate, orthogonal to the others: the column that searches.
    """
    width = H.shape[-1]
    identity = torch.eye(width, dtype=H.dtype, device=H.device)
    corner = identity[:, :1] * identity[:1]
    # One Newton step for the inverse root (Higham, "Functions of Matrices", 2008, section 7.3).
    root = 1.5 * identity - 0.5 * G
    square = product(root, H, root)
    # A matrix of zeros has the first coordinate for its first vector, so that a block stays what it is.
    square = _trace_one((square + square.mT) / 2 + torch.finfo(H.dtype).tiny * corner)
    first = _dominant_vector(square, SQUARINGS)
    square = square / product(first.mT, square, first).clamp_min(torch.finfo(H.dtype).tiny)
    # The shift keeps columns independent where there are fewer directions than columns.
    shifted = product(square, square) + 0.03 * identity
    power = product(shifted, shifted, shifted)
    # Every coordinate beyond the leading ones has a small part in one of the columns, so that none is lost.
    start = identity[:, :count] + 0.05 * identity.roll(-count, 0)[:, :count] * (count < width)
    X = start.expand(*square.shape[:-1], count)
    for _ in range(rounds):
        X = _orthonormal(product(power, X))
    if searches:
        X = X[..., : count - 1]
    # A reflection brings the projection of `first` to the front; the other columns are made orthogonal to `first`.
    projection = unit(product(X.mT, first), dim=-2)
    sign = 1 - 2 * (projection[:, :1] < 0).to(H.dtype)
    mirror = unit(projection + sign * identity[: X.shape[-1], :1], dim=-2)
    X = X - 2 * product(X, mirror, mirror.mT)
    X = torch.cat([first, X[..., 1:] - product(first, product(first.mT, X[..., 1:]))], dim=-1)
    if searches:
        last = (identity[:, -1:] + 0.3 * identity[:, count - 1 : count]).expand(len(H), -1, -1)
        for _ in range(2):
            last = unit(last - product(X, product(X.mT, last)), dim=-2)
        X = torch.cat([X, last], dim=-1)
    X = product(root, X)
    X = product(X, 1.5 * identity[:count, :count] - 0.5 * product(X.mT, G, X))
    return X, product(X.mT, H, X), (X * product(G, X)).sum(-2)


def second_value(squares: Tensor) -> Tensor:
    """The root of the second largest eigenvalue of `squares (k, b, b)`, from below; the first column is an eigenvector.

    A Rayleigh quotient after power iteration with 2^8 steps.
    """
    rest = squares[:, 1:, 1:]
    # Where there is no second value, the rest is rounding, and its trace may be negative.
    rounding = 100 * torch.finfo(rest.dtype).eps * squares[:, :1, :1]
    shifted = rest + rounding * torch.eye(rest.shape[-1], dtype=rest.dtype, device=rest.device)
    vector = _dominant_vector(_trace_one(shifted), 8)
    return product(vector.mT, rest, vector)[:, 0, 0].clamp_min(0).sqrt()


def estimated_error(rho: Tensor, gap: Tensor, rise: Tensor, number: int) -> Tensor:
    """The relative error that a step's iteration of that number leaves in the first singular value.

    After the first one it is `rho (rho / gap)^2 / 8`. `rho (k,)` is the root mean square of the block's relative
    residuals before the iteration, and `gap (k,)` how far, relative, the block's last value lies below its first: in a
    crowded spectrum, a residual of the same length means a larger error. The last column, which searches outside the
    block, counts in neither.

    The later ones start from a block of the same weight. After them it is half of that, or less where the iteration
    has raised the value but little: an error that falls as `1 / number^2`, as it does at least in a spectrum without
    gaps, has left `number / 2` times the `rise (k,)`.
    """
    ratio = rho / gap.clamp_min(torch.finfo(gap.dtype).tiny)
    if number == 1:
        return rho * ratio.square().div(8).clamp_max(1)
    # Zero would claim that the value is exact.
    rise = rise.clamp_min(torch.finfo(rise.dtype).eps)
    return torch.minimum(rho * ratio.square().div(16).clamp_max(1), rise * (number / 2))


class _SmallProblems:
    """Matrices `(k, M, N)`, the shorter side of at most twice the width, to be solved from their Gram matrices.

    Of a sharded one, the Gram matrix of its columns is summed over processes where that is small. One whose columns are
    many, or in several processes, has few rows, and is summed whole.
    """

    def __init__(self, matrices: list[Matrices], width: int) -> None:
        self.width = width
        self._matrices = matrices
        self.parts: list[Tensor] = []
        """What is to be summed over processes, of each matrix that is sharded."""
        self.groups: list[Groups] = []
        self.totals: list[Tensor] = []
        """The sums."""
        for one in matrices:
            if isinstance(one, ShardedMatrices):
                self.parts.append(gram(_scaled(one)[0]) if self._has_own_gram(one) else one.in_place())
                self.groups.append(one.sums)

    def _has_own_gram(self, matrices: ShardedMatrices) -> bool:
        """Whether the Gram matrix of the columns is small, and a sum over processes that hold whole rows."""
        return matrices.shape[2] <= 2 * self.width and not matrices.image_sums

    def solutions(self, keeps_subspace: bool) -> list[Solution]:
        read: list[tuple[Matrices, Tensor | None]] = []
        totals = iter(self.totals)
        for one in self._matrices:
            if not isinstance(one, ShardedMatrices):
                read.append((one, None))
            elif self._has_own_gram(one):
                read.append((one, next(totals)))
            else:
                whole = DenseMatrices(next(totals))
                read.append((whole.mT if whole.block_on_rows else whole, None))
        solutions = _solve_by_gram([one for one, _ in read], [own for _, own in read], self.width, keeps_subspace)
        for i, (one, (used, _)) in enumerate(zip(self._matrices, read, strict=True)):
            if isinstance(one, ShardedMatrices) and used is not one:
                solution = solutions[i] if used.shape == one.shape else solutions[i].transposed()
                solutions[i] = solution._replace(triple=solution.triple.with_left(one.rows_of))
        return solutions


def _solve_by_gram(
    matrices: list[Matrices], grams: list[Tensor | None], width: int, keeps_subspace: bool
) -> list[Solution]:
    """Matrices `(k, M, N)`, `N <= 2 width`, from `A^T A`, which is given for sharded ones."""
    scaled, scales = zip(*(_scaled(one) for one in matrices), strict=True)
    squares_of: list[Tensor] = []
    finite: list[Tensor] = []
    for one, scale, total in zip(scaled, scales, grams, strict=True):
        own = gram(one) if total is None else total
        finite.append(own.isfinite().all(-1).all(-1) if total is not None else torch.ones_like(scale, dtype=torch.bool))
        squares_of.append(own if total is None else torch.where(finite[-1][:, None, None], own, 0))
    pad = [2 * width - one.shape[-1] for one in scaled]
    H = concat([nn.functional.pad(one, (0, p, 0, p)) for one, p in zip(squares_of, pad, strict=True)])
    G = torch.eye(2 * width, dtype=H.dtype, device=H.device).expand_as(H)
    # All is known: nothing is searched. Such a column would lie half in what a matrix is padded with, which would look
    # as if much were outside of the block.
    X, squares, _ = dominant_subspace(H, G, width, 2 * ROUNDS, searches=False)
    next_values = second_value(squares)
    counts = [len(one) for one in scaled]
    rest = edge(squares) if keeps_subspace else next_values
    coupling = gram(add_product(product(H, X), X, squares, alpha=-1)) if keeps_subspace else next_values
    parts = (part.split(counts) for part in (X, next_values, squares, rest, coupling))
    solutions = []
    each = zip(scaled, scales, grams, finite, *parts, strict=True)
    for one, scale, total, is_finite, x, next_value, own_squares, own_rest, own_coupling in each:
        right = x[:, : one.shape[-1], 0]
        image = product(one, right[..., None])[..., 0]
        length = image.norm(dim=-1) if total is None else own_squares[:, 0, 0].clamp_min(0).sqrt()
        value = torch.where(is_finite, length / right.norm(dim=-1), torch.nan)
        zero = torch.zeros_like(value)
        subspace = None
        if keeps_subspace:
            columns = x[:, : one.shape[-1]]
            subspace = Subspace(product(one, columns), columns, own_squares, scale, own_rest, own_coupling)
        left = torch.where(is_finite[:, None], image / length.clamp_min(torch.finfo(image.dtype).tiny)[:, None], 0)
        triple = Triple(value * scale, left, unit(right), next_value * scale, zero, zero, zero, subspace)
        solutions.append(Solution(triple, {}))
    return solutions


def _scaled(matrices: Matrices) -> tuple[Tensor, Tensor]:
    """The matrices, of a sharded one this process's rows, divided by about their size, and that."""
    if matrices.scale is None:
        return scaled_to_one(matrices.dense())
    return matrices.dense() / matrices.scale[:, None, None], matrices.scale


def _orthonormal(X: Tensor) -> Tensor:
    """The columns of `X (k, w, b)` made orthonormal from the first to the last.

    On an accelerator by Cholesky factors, twice: a factorization by reflections is many small launches there.
    """
    # Through the module, so that a test can run an accelerator's step on a CPU.
    if linalg.can_sync(X):
        return torch.linalg.qr(X).Q
    for _ in range(2):
        X = unit(X, dim=-2)
        X = product(X, _inverse_factor(gram(X), 1e-6))
    return X


def _inverse_factor(square: Tensor, shift: float = 0.0) -> Tensor:
    """`L^-T` of the Cholesky factor `L` of `square + shift`, without its check, which would make the host wait."""
    identity = torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)
    return _inverse_of_triangle(torch.linalg.cholesky_ex(square + shift * identity).L).mT


def _inverse_of_triangle(factor: Tensor) -> Tensor:
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)


def _dominant_vector(power: Tensor, num_squarings: int) -> Tensor:
    """A column of a high power of matrices `(k, w, w)` of trace one, `(k, w, 1)`, of unit length.

    At every fourth squaring the trace is one again: rarely enough, and float32 does not underflow.
    """
    multiply = multiplier(power)
    for _ in range(num_squarings // 4):
        for _ in range(4):
            power = multiply(power, power)
        power = _trace_one(power)
    largest = power.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    return unit(power.gather(-1, largest.expand(*power.shape[:-1], 1)), dim=-2)


def _shifted_factor(normalized: Tensor, exists: Tensor) -> Tensor:
    """The Cholesky factor of a matrix with unit diagonal and a shift, and of the identity where nothing exists."""
    both = exists[..., None] & exists[:, None]
    diagonal = torch.diag_embed((~exists).to(normalized.dtype) + 1e-5)
    return torch.linalg.cholesky_ex(torch.where(both, normalized, 0) + diagonal).L


def _trace_one(square: Tensor) -> Tensor:
    trace = square.diagonal(dim1=-2, dim2=-1).sum(-1)
    return square / trace.clamp_min(torch.finfo(square.dtype).tiny)[..., None, None]
