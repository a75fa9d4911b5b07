"""Small batched linear algebra of the solvers: no global random state, no shape that depends on the data.

Nothing here waits for an accelerator: `dominant` avoids `eigh` there, and Cholesky factors come without their check.
"""

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

_ACCELERATOR = (torch.accelerator.current_accelerator() or torch.device("cpu")).type


def numerical(function: Callable[P, T]) -> Callable[P, T]:
    """Run the function without gradients, and outside any autocast, which would round its products."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast(_ACCELERATOR, enabled=False):
            return function(*args, **kwargs)

    return run


def may_wait(tensor: Tensor) -> bool:
    """Whether the host may look at the tensor's numbers: on an accelerator it would wait, and a compiler has none."""
    return tensor.is_cpu and not torch.compiler.is_compiling()


def normal(key: Tensor, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Standard normal numbers `(k, *size)` from int64 keys `(k,)`, by a counter-based generator.

    A hash of (key, position), so there is no generator to store, to seed or to synchronise, and every device and rank
    draws the same (the idea of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
    """
    count = torch.Size(size).numel()
    uniform = (_bits(key, 2 * count).double() + 0.5) / 2**32
    radius, angle = uniform[:, :count], uniform[:, count:]
    return ((-2 * radius.log()).sqrt() * (2 * torch.pi * angle).cos()).to(dtype).reshape(-1, *size)


def signs(key: Tensor, size: tuple[int, ...]) -> Tensor:
    """Ones of random sign, `(k, *size)`, float32, from int64 keys `(k,)`: `normal`'s cheaper sister."""
    return (1 - (_bits(key, torch.Size(size).numel()) & 1) * 2).float().reshape(-1, *size)


def _bits(key: Tensor, count: int) -> Tensor:
    """32 random bits at each of `count` positions, `(k, count)`."""
    return _hash32(_hash32(key[:, None]) + torch.arange(count, device=key.device))


def _hash32(x: Tensor) -> Tensor:
    """A 32-bit integer hash (xor-shift-multiply), in int64, whose wrapping products keep the low 32 bits right."""
    mask = 0xFFFFFFFF
    x = (x ^ (x >> 32)) & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)


def join(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors one behind the other, without a copy where there is only one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """`x` at unit length along `dim`; a zero vector stays zero."""
    return x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def gram(a: Tensor) -> Tensor:
    """`a^T a`, in float64."""
    a = a.double()
    return a.mT @ a


def short_gram(matrices: Tensor) -> Tensor:
    """The smaller of `W^T W` and `W W^T` for `W (..., m, n)`, in float64."""
    return gram(matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mT)


def rayleigh_ritz(products: Tensor, energies: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The combinations of the columns of `S` that `W` makes longest, from `S^T S` and `(W S)^T (W S)`.

    Both Gram matrices are `(k, w, w)`, float64. Returns coefficients `(k, w, count)`, in the order of `dominant`, and
    the lengths `(k, count)` that `W` gives to the combined columns, which are orthonormal.

    The columns of `S` need be neither orthogonal nor independent, and some may be zero: a shift holds back combinations
    that cancel (as in Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of ill-conditioned
    matrices", 2020), so that no tall matrix has to be made orthogonal, and one of which nothing but rounding is left
    is zero.
    """
    identity = torch.eye(products.shape[-1], dtype=products.dtype, device=products.device)
    length = products.diagonal(dim1=-2, dim2=-1).sqrt()
    # What is shorter is rounding, down to numbers that have lost their digits.
    inverse = torch.where(length > 1e-15, 1 / length, 0)[..., None]
    scaled = inverse * products * inverse.mT
    image = inverse * energies * inverse.mT
    # Zero columns and cancelling combinations must come last, behind those that `W` maps to zero.
    top = image.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(torch.finfo(image.dtype).tiny)
    image = image + 1e-6 * top[:, None, None] * scaled
    factor = torch.linalg.cholesky_ex(scaled + 1e-5 * identity).L
    half = torch.linalg.solve_triangular(factor, image, upper=False)
    square = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    chosen = torch.linalg.solve_triangular(factor.mT, dominant((square + square.mT) / 2, count), upper=True) * inverse
    # The shift has left them a little short: one Newton step for the polar factor (Higham, "Functions of Matrices",
    # 2008, equation 8.20) squares the distance from orthonormal.
    overlap = chosen.mT @ products @ chosen
    whole = overlap.diagonal(dim1=-2, dim2=-1)[..., None, :] > 0.5
    chosen = torch.where(whole, chosen @ (1.5 * identity[:count, :count] - 0.5 * overlap), 0)
    return chosen, (chosen * (energies @ chosen)).sum(-2).clamp_min(0).sqrt()


def _cholesky_qr(directions: Tensor, shift: float) -> Tensor:
    square = gram(directions)
    identity = torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)
    factor = torch.linalg.cholesky_ex(square + shift * identity).L
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    return directions @ inverse.mT.to(directions.dtype)


def dominant(square: Tensor, count: int) -> Tensor:
    """Orthonormal vectors `(..., w, count)` of the largest eigenvalues of `square (..., w, w)`, symmetric, float64.

    In descending order on a CPU. Elsewhere only the first is an eigenvector, to a relative error of its value below
    1e-6, and the others span, approximately, the dominant subspace: what an iteration that keeps a subspace needs.
    """
    if may_wait(square):
        return torch.linalg.eigh(square).eigenvectors.flip(-1)[..., :count]
    return dominant_by_products(square, count)


def dominant_by_products(square: Tensor, count: int) -> Tensor:
    """`dominant` by matrix products and Cholesky factors alone.

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
    # A reflection brings the first vector's image to the front, and what is left of the others is made orthogonal.
    image = unit(vectors.mT @ first, dim=-2)
    sign = torch.where(image[..., :1, :] < 0, -1.0, 1.0)
    mirror = unit(image + sign * identity[:count, :1], dim=-2)
    vectors = vectors - 2 * (vectors @ mirror) @ mirror.mT
    rest = vectors[..., 1:] - first @ (first.mT @ vectors[..., 1:])
    return torch.cat([first, _cholesky_qr(rest, 1e-13)], dim=-1) if count > 1 else first


def _trace_one(square: Tensor) -> Tensor:
    trace = square.diagonal(dim1=-2, dim2=-1).sum(-1)
    return square / trace.clamp_min(torch.finfo(square.dtype).tiny)[..., None, None]
