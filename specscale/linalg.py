"""Small batched linear algebra of the solvers: no random numbers, no shape that depends on the data.

Nothing here makes the host wait for an accelerator: `dominant_eigenvectors` avoids `eigh` there, and Cholesky factors
come without their check.

Precision is the functions' own, and nothing global is written. `no_grad_full_precision` leaves autocast, and float32
factors are multiplied by `product` alone, which is as accurate under `torch.set_float32_matmul_precision("medium")` and
its like as without. Products of float64, factorisations, sums and elementwise operations heed no such switch.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps", "xla", "hpu", "mtia", "maia", "ipu")
"""The types of devices that torch has an autocast for, beside the current accelerator, whose type may be of others."""


def no_grad_full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Run the function without gradients, and outside any autocast, which would round its products."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        # The weights may be on another device than the current accelerator. A recursion, since a compiler cannot trace
        # an ExitStack.
        for device in _autocast_devices():
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return run(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return run


def _autocast_devices() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return _AUTOCAST_DEVICES if accelerator is None else (*_AUTOCAST_DEVICES, accelerator.type)


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


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` to the accuracy of its dtype, float32 or wider, whatever torch's switches for faster products say."""
    if not _may_be_rounded(a):
        return a @ b
    if _has_fast_float64(a):
        return (a.double() @ b.double()).to(a.dtype)
    return product_of_parts(a, b)


def add_product(summand: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1) -> Tensor:
    """`summand + alpha (a @ b)` for batches `(k, m, n)` and `(k, n, b)`, as accurate as `product`."""
    if not _may_be_rounded(a):
        return torch.baddbmm(summand, a, b, alpha=alpha)
    return torch.add(summand, product(a, b), alpha=alpha)


def product_of_parts(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of float32 factors as a sum of products that no switch can round: bfloat16 holds their factors exactly.

    Each factor is the sum of three parts of 8 binary digits, 24 in all. A device that rounds factors to bfloat16 or
    TF32 and adds in float32 loses nothing of such parts (Henry et al., "Leveraging the bfloat16 artificial intelligence
    datatype for higher-precision computations", 2019). The products that are left out are smaller than float32's
    rounding of the largest. Entries below 1e-33 lose digits where a device has no subnormal numbers; with one from
    3.39e38, the result is not finite.
    """
    if a.numel() < b.numel():
        return product_of_parts(b.mT, a.mT).mT
    width = b.shape[-1]
    b_high = _leading_part(b)
    b_rest = b - b_high
    b_middle = _leading_part(b_rest)
    # Few and wide products with the large factor, of which two parts at a time are held.
    parts = torch.cat([b_high, b_middle, b_rest - b_middle], dim=-1)
    a_part = _leading_part(a)
    high = a_part @ parts
    rest = a - a_part
    del a_part
    a_part = _leading_part(rest)
    middle = a_part @ parts[..., : 2 * width]
    rest -= a_part
    # The smallest first.
    total = rest @ b_high
    total += middle[..., width:]
    total += high[..., 2 * width :]
    total += middle[..., :width] + high[..., width : 2 * width]
    return total + high[..., :width]


def _leading_part(x: Tensor) -> Tensor:
    """The nearest float32 of 8 binary digits. By its bits: a compiler may drop a cast to bfloat16 and back."""
    bits = x.view(torch.int32) + 0x8000
    bits &= -0x10000
    return bits.view(torch.float32)


def _may_be_rounded(factor: Tensor) -> bool:
    """Whether a switch of torch's lets a product with the factor have fewer digits than its dtype."""
    if factor.dtype != torch.float32:
        return False
    # A compiler cannot trace the switches.
    if torch.compiler.is_compiling():
        return True
    # These can be read whichever of torch's two APIs was used.
    cublas: Any = torch.backends.cuda.matmul
    onednn: Any = torch.backends.mkldnn
    if factor.is_cuda:
        return cublas.fp32_precision not in _EXACT
    if onednn.matmul.fp32_precision not in _EXACT:
        return True
    return not factor.is_cpu and (bool(onednn.allow_tf32) or cublas.fp32_precision not in _EXACT)


_EXACT = ("ieee", "none")
"""The settings that round no factor; "none" is read where nothing was set."""


def _has_fast_float64(factor: Tensor) -> bool:
    """Whether a product in float64 is cheaper than one of parts: on a CPU, where it takes a third of the time."""
    return factor.is_cpu


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
