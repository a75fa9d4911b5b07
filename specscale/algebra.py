"""Small batched linear algebra of the solvers: no global random state, no shape that depends on the data.

Nothing here waits for an accelerator: `dominant` avoids `eigh` there, and Cholesky factors come without their check.
"""

import torch
from torch import Tensor


def normal(key: Tensor, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Standard normal numbers `(k, *size)` from int64 keys `(k,)`, by a counter-based generator.

    A hash of (key, position), so there is no generator to store, to seed or to synchronise, and every device and rank
    draws the same (the idea of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
    """
    count = torch.Size(size).numel()
    position = torch.arange(2 * count, device=key.device)
    bits = _hash32(_hash32(key[:, None]) + position)
    uniform = (bits.double() + 0.5) / 2**32
    radius, angle = uniform[:, :count], uniform[:, count:]
    return ((-2 * radius.log()).sqrt() * (2 * torch.pi * angle).cos()).to(dtype).reshape(-1, *size)


def _hash32(x: Tensor) -> Tensor:
    """A 32-bit integer hash (xor-shift-multiply), in int64, whose wrapping products keep the low 32 bits right."""
    mask = 0xFFFFFFFF
    x = (x ^ (x >> 32)) & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """`x` at unit length along `dim`; a zero vector stays zero."""
    return x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def gram(a: Tensor) -> Tensor:
    """`a^T a` in float64, summed in the dtype of `a`."""
    return (a.mT @ a).double()


def polish(basis: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """An almost orthonormal basis, more nearly so, and others that are combined in the same way.

    One Newton step for the polar factor (Higham, "Functions of Matrices", 2008, equation 8.20): it squares the error.
    """
    square = basis.mT @ basis
    return tuple(1.5 * x - 0.5 * x @ square for x in (basis, *others))


def complement(basis: Tensor, directions: Tensor) -> Tensor:
    """An orthonormal basis of what `directions (..., n, c)` add to the orthonormal `basis (..., n, b)`.

    Cholesky QR, twice, with a shift (Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of
    ill-conditioned matrices", 2020). A direction that the others and the basis contain already becomes a short column
    instead of noise, so that the shape does not depend on the rank.
    """
    eps = torch.finfo(directions.dtype).eps
    directions = unit(directions - basis @ (basis.mT @ directions), dim=-2)
    for shift in (100 * eps, 10 * eps):
        directions = _cholesky_qr(directions, shift)
        # What was short is long now, and so is what it had left within the basis.
        directions = directions - basis @ (basis.mT @ directions)
    return polish(directions)[0]


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
    if square.is_cpu and not torch.compiler.is_compiling():
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
