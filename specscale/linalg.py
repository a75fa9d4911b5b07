"""Small batched linear algebra of the solvers: no random numbers, no shape that depends on the data.

Nothing here makes the host wait for an accelerator.

Precision is the functions' own, and nothing global is written. `no_grad_full_precision` leaves autocast, and float32
factors are multiplied by `product` alone, which is as accurate under `torch.set_float32_matmul_precision("medium")` and
its like as without. Products of float64, factorizations, sums and elementwise operations heed no such switch.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

_AUTOCAST_DEVICES = ["cpu", "cuda", "xpu", "mps", "xla", "hpu", "mtia", "maia", "ipu"]
"""The types of devices that torch has an autocast for; the current accelerator, whose type may be another, is added."""


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


def _autocast_devices() -> list[str]:
    # The compiler of torch 2.9 cannot trace a call that returns a device. What it compiles is a step, and the weights
    # have been measured before it: the accelerator is in the list.
    if not torch.compiler.is_compiling():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and accelerator.type not in _AUTOCAST_DEVICES:
            _AUTOCAST_DEVICES.append(accelerator.type)
    return _AUTOCAST_DEVICES


def can_sync(tensor: Tensor) -> bool:
    """Whether the host may read the tensor's values: an accelerator would stall, and a compiler has no values."""
    return tensor.is_cpu and not torch.compiler.is_compiling()


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where its dtype is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has nothing wider, as MPS."""
    return torch.float64 if has_float64(device) else torch.float32


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64: MPS does not, and not every XPU does."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64: on the CPU, where its own device has none."""
    return tensor.double() if has_float64(tensor.device) else tensor.cpu().double()


def concat(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat`, without a copy where there is only one tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def broadcast_to(numbers: Tensor, other: Tensor) -> Tensor:
    """`numbers`, of the first dimensions of `other`, with those that follow at size 1."""
    return numbers.reshape(*numbers.shape, *(1 for _ in other.shape[numbers.ndim :]))


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """`x` at unit length along `dim`; a zero vector stays zero."""
    return x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def product(first: Tensor, *factors: Tensor) -> Tensor:
    """`a @ b @ ...` to the accuracy of its dtype, float32 or wider, whatever torch's switches for products say."""
    multiply = multiplier(first)
    for factor in factors:
        first = multiply(first, factor)
    return first


def multiplier(factor: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """How `product` multiplies factors of that dtype and device: for many small products in a row, decided once."""
    if not may_be_rounded(factor):
        return _product_as_torch_does
    return _product_in_float64 if _has_fast_float64(factor) else product_of_parts


def _product_as_torch_does(a: Tensor, b: Tensor) -> Tensor:
    # Batches of one size need none of the views that `matmul` makes.
    return torch.bmm(a, b) if a.dim() == b.dim() == 3 and a.size(0) == b.size(0) else a @ b


def _product_in_float64(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double()).to(a.dtype)


def add_product(summand: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1) -> Tensor:
    """`summand + alpha (a @ b)` for batches `(k, m, n)` and `(k, n, b)`, as accurate as `product`."""
    if not may_be_rounded(a):
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


def may_be_rounded(factor: Tensor) -> bool:
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
    """`a^T a`."""
    return product(a.mT, a)


def norm_from_gram(square: Tensor) -> Tensor:
    """`||R||` from `R^T R (k, b, b)`, from above: at most 1.2 times, for 15 columns.

    It is the eighth root of the trace of its eighth power.
    """
    trace = square.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(square.dtype).tiny)
    power = square / trace[:, None, None]
    for _ in range(3):
        power = product(power, power)
    return (trace * power.diagonal(dim1=-2, dim2=-1).sum(-1).pow(1 / 8)).sqrt()


def smaller_gram(matrices: Tensor) -> Tensor:
    """The smaller of `W^T W` and `W W^T` for `W (..., m, n)`, in float64."""
    matrices = in_float64(matrices)
    return gram(matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mT)


def scaled_to_one(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices `(..., m, n)` divided by their largest entry, and that entry `(...)`.

    The division keeps squares from over- and underflowing. A matrix that is not finite becomes zero, since a
    factorization of it would raise; its scale stays NaN or infinite.
    """
    scale = matrices.abs().amax(dim=(-2, -1)) if matrices.numel() else matrices.new_zeros(matrices.shape[:-2])
    finite = torch.isfinite(scale) & (scale > 0)
    divisor = torch.where(finite, scale, torch.inf)[..., None, None]
    return torch.where(finite[..., None, None], matrices / divisor, 0), scale
