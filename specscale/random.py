"""The solvers' random numbers, as a function of a key: no generator to seed, store or synchronize between ranks.

Each number is a hash of (key, position): the idea of the counter-based generators of Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3" (2011).
"""

import torch
from torch import Tensor


def keys(age: Tensor) -> Tensor:
    """`(k,)`, int64: a key for each of `k` matrices at each of its ages, whole numbers from 0 in a floating dtype."""
    # An average of states may have averaged the ages too.
    return torch.arange(len(age), device=age.device) + (age.round().long() << 32)


def normal(key: Tensor, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Standard normal numbers `(k, *size)` from int64 keys `(k,)`, by the Box-Muller transform."""
    count = torch.Size(size).numel()
    # In float32, which every device has; 23 bits and a half are exact in it.
    uniform = ((_bits(key, 2 * count) >> 9).float() + 0.5) / 2**23
    radius, angle = uniform[:, :count], uniform[:, count:]
    return ((-2 * radius.log()).sqrt() * (2 * torch.pi * angle).cos()).to(dtype).reshape(len(key), *size)


def signs(key: Tensor, size: tuple[int, ...]) -> Tensor:
    """Random signs, +1 or -1, `(k, *size)`, float32, from int64 keys `(k,)`: cheaper than `normal`."""
    return (1 - (_bits(key, torch.Size(size).numel()) & 1) * 2).float().reshape(len(key), *size)


def _bits(key: Tensor, count: int) -> Tensor:
    """32 random bits at each of `count` positions, `(k, count)`, int64."""
    return _hash32(_hash32(key[:, None]) + torch.arange(count, device=key.device))


def _hash32(x: Tensor) -> Tensor:
    """A 32-bit integer hash (xor-shift-multiply) in int64, whose products wrap but keep the low 32 bits right."""
    mask = 0xFFFFFFFF
    x = (x ^ (x >> 32)) & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)
