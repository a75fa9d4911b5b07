"""Small batched linear algebra of the solvers: no random numbers, no shape that depends on the data.

Nothing here makes the host wait for an accelerator: `dominant_eigenvectors` avoids `eigh` there, and Cholesky factors
come without their check.
"""

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

_ACCELERATOR = (torch.accelerator.current_accelerator() or torch.device("cpu")).type


def no_grad_full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Run the function without gradients, and outside any autocast, which would round its products."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast(_ACCELERATOR, enabled=False):
            return function(*args, **kwargs)

    return run


def can_sync(tensor: Tensor) -> bool:
    """Whether the host may read the tensor's values: an accelerator would stall, and a compiler has no values."""
    return tensor.is_cpu and not torch.compiler.is_compiling()


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where its dtype is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def concat(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat`, without a copy where there is only one tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """`x` at unit length along `dim`; a zero vector stays zero."""
    return x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def gram(a: Tensor) -> Tensor:
    """`a^T a`, in float64."""
    a = a.double()
    return a.mT @ a


def smaller_gram(matrices: Tensor) -> Tensor:
    """The smaller of `W^T W` and `W W^T` for `W (..., m, n)`, in float64."""
    return gram(matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mT)


def scaled_to_one(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices `(..., m, n)` divided by their largest entry, and that entry `(...)`.

    The division keeps squares from over- and underflowing. A matrix that is not finite becomes zero, since a
    factorisation of it would raise; its scale stays NaN or infinite.
    """
    scale = matrices.abs().amax(dim=(-2, -1)) if matrices.numel() else matrices.new_zeros(matrices.shape[:-2])
    finite = torch.isfinite(scale) & (scale > 0)
    divisor = torch.where(finite, scale, torch.inf)[..., None, None]
    return torch.where(finite[..., None, None], matrices / divisor, 0), scale


def rayleigh_ritz(gram_s: Tensor, gram_ws: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The Ritz vectors of `W^T W` in the span of `S`, from the Gram matrices `S^T S` and `(W S)^T (W S)` alone.

    Args:
        gram_s: `S^T S`, `(k, w, w)`, float64.
        gram_ws: `(W S)^T (W S)`, `(k, w, w)`, float64.
        count: how many Ritz vectors.

    Returns:
        Coefficients `C (k, w, count)`, in the order of `dominant_eigenvectors`: the columns of `S C` are orthonormal,
        or zero where only rounding is left. And the lengths of the columns of `W S C`, `(k, count)`: the square roots
        of the Ritz values.

    The columns of `S` may be dependent or zero, so that no tall matrix has to be made orthogonal. A shift damps
    combinations of columns that cancel, as in Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of
    ill-conditioned matrices" (2020).
    """
    identity = torch.eye(gram_s.shape[-1], dtype=gram_s.dtype, device=gram_s.device)
    length = gram_s.diagonal(dim1=-2, dim2=-1).sqrt()
    # A shorter column is rounding, with no correct digit left.
    inverse = torch.where(length > 1e-15, 1 / length, 0)[..., None]
    normalized_s = inverse * gram_s * inverse.mT
    normalized_ws = inverse * gram_ws * inverse.mT
    # Zero columns and cancelling combinations must come last, behind those that `W` maps to zero.
    top = normalized_ws.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(torch.finfo(gram_ws.dtype).tiny)
    normalized_ws = normalized_ws + 1e-6 * top[:, None, None] * normalized_s
    factor = torch.linalg.cholesky_ex(normalized_s + 1e-5 * identity).L
    half = torch.linalg.solve_triangular(factor, normalized_ws, upper=False)
    square = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    vectors = dominant_eigenvectors((square + square.mT) / 2, count)
    coefficients = torch.linalg.solve_triangular(factor.mT, vectors, upper=True) * inverse
    # The shift leaves the columns of `S C` a little short: one Newton step for the polar factor (Higham, "Functions of
    # Matrices", 2008, equation 8.20) squares their distance from orthonormal.
    overlap = coefficients.mT @ gram_s @ coefficients
    is_whole = overlap.diagonal(dim1=-2, dim2=-1)[..., None, :] > 0.5
    coefficients = torch.where(is_whole, coefficients @ (1.5 * identity[:count, :count] - 0.5 * overlap), 0)
    return coefficients, (coefficients * (gram_ws @ coefficients)).sum(-2).clamp_min(0).sqrt()


def dominant_eigenvectors(square: Tensor, count: int) -> Tensor:
    """Orthonormal vectors `(..., w, count)` of the largest eigenvalues of `square (..., w, w)`, symmetric, float64.

    In descending order on a CPU. Elsewhere only the first is an eigenvector, to a relative error of its value below
    1e-6, and the others span, approximately, the dominant subspace: what an iteration that keeps a subspace needs.
    """
    if can_sync(square):
        return torch.linalg.eigh(square).eigenvectors.flip(-1)[..., :count]
    return dominant_eigenvectors_by_products(square, count)


def dominant_eigenvectors_by_products(square: Tensor, count: int) -> Tensor:
    """`dominant_eigenvectors` by matrix products and Cholesky factors alone, as on an accelerator.

    The first vector by repeated squaring, which is power iteration with 2^20 steps; the others by orthogonal iteration
    from the leading coordinates (Golub & Van Loan, "Matrix Computations", section 8.2.4).
    """
    width = square.shape[-1]
    identity = torch.eye(width, dtype=square.dtype, device=square.device)
    square = _trace_one(square)
    power = square
    for _ in range(20):
        power = _trace_one(power @ power)
    largest = power.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    first = unit(power.gather(-1, largest.expand(*power.shape[:-1], 1)), dim=-2)
    # Every coordinate beyond the leading ones has a small part in one of the columns, so that none is lost.
    start = identity[:, :count] + 0.05 * identity.roll(-count, 0)[:, :count] * (count < width)
    vectors = start.expand(*square.shape[:-1], count)
    square = _trace_one(square @ square)
    for _ in range(12):
        vectors = _cholesky_qr(unit(square @ vectors, dim=-2), 1e-13)
    # A reflection brings the projection of `first` to the front; the other columns are made orthogonal to `first`.
    projection = unit(vectors.mT @ first, dim=-2)
    sign = torch.where(projection[..., :1, :] < 0, -1.0, 1.0)
    mirror = unit(projection + sign * identity[:count, :1], dim=-2)
    vectors = vectors - 2 * (vectors @ mirror) @ mirror.mT
    others = vectors[..., 1:] - first @ (first.mT @ vectors[..., 1:])
    return torch.cat([first, _cholesky_qr(others, 1e-13)], dim=-1) if count > 1 else first


def _cholesky_qr(columns: Tensor, shift: float) -> Tensor:
    """The columns made orthonormal by one Cholesky factor of their shifted Gram matrix."""
    square = gram(columns)
    identity = torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)
    factor = torch.linalg.cholesky_ex(square + shift * identity).L
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    return columns @ inverse.mT.to(columns.dtype)


def _trace_one(square: Tensor) -> Tensor:
    trace = square.diagonal(dim1=-2, dim2=-1).sum(-1)
    return square / trace.clamp_min(torch.finfo(square.dtype).tiny)[..., None, None]
