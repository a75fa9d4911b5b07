"""Norms of linear maps by Lanczos iteration on the maps' own device, in few launches and without waiting for it."""

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Map = Callable[[Tensor], Tensor]


def bidiagonalize(
    apply: Map, apply_adjoint: Map, count: int, size: int, device: torch.device, *, num_steps: int, num_starts: int
) -> Tensor:
    """Golub-Kahan bidiagonalization of several linear maps at once: their norms are those of the resulting matrices.

    Golub & Van Loan, "Matrix Computations", section 10.4. The vectors are not made orthogonal again: under rounding,
    that repeats singular values and changes none (Paige, "Computational variants of the Lanczos method for the
    eigenproblem", 1972). A norm that is found is too low. How far depends on the spectrum, but not beyond a bound:
    with 48 steps, for 4096 inputs, by 1 % with a probability below 2e-4 for each start (Kuczynski & Wozniakowski,
    "Estimating the largest eigenvalue by the power and Lanczos algorithms with a random start", 1992, theorem 4.2).

    Args:
        apply: the maps, each on its own vectors: from `(count, size, num_starts)` to `(count, m, num_starts)`. In
            float64, so that no setting of the precision of float32 products matters.
        apply_adjoint: their adjoints.
        count: the number of maps.
        size: the number of their inputs.
        device: where they are.
        num_steps: how many vectors each iteration applies the map to.
        num_starts: how many iterations run side by side for each map, from different random vectors.

    Returns:
        `(count, num_starts, num_steps, num_steps)`.
    """
    # The same start on every device.
    start = torch.randn(count, size, num_starts, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right, _ = _unit(start.to(device))
    left = beta = torch.zeros((), dtype=start.dtype, device=device)
    diagonal, above = [], []
    for _ in range(num_steps):
        left, alpha = _unit(apply(right).addcmul_(beta, left, value=-1))
        right, beta = _unit(apply_adjoint(left).addcmul_(alpha, right, value=-1))
        diagonal.append(alpha)
        above.append(beta)
    return torch.diag_embed(torch.cat(diagonal, 1).mT) + torch.diag_embed(torch.cat(above[:-1], 1).mT, 1)


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors `(count, size, num_starts)` at unit length, and their lengths; a zero vector stays zero."""
    length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / length.clamp_min(torch.finfo(vectors.dtype).tiny), length


def largest_singular_values(
    items: Mapping[str, T], key: Callable[[T], Hashable], bidiagonals: Callable[[list[T]], Tensor]
) -> dict[str, Tensor]:
    """The largest singular value of each map of each item, by name, on the CPU; NaN where a map is not finite.

    Args:
        items: each stands for one map or several.
        key: items of one key stand for equally many maps, and share their launches.
        bidiagonals: what `bidiagonalize` returns for all maps of several items of one key.
    """
    groups: dict[Hashable, list[str]] = {}
    for name, item in items.items():
        groups.setdefault(key(item), []).append(name)
    found = [bidiagonals([items[name] for name in group]) for group in groups.values()]
    values: dict[str, Tensor] = {}
    for group, matrices in zip(groups.values(), found, strict=True):
        # The device has all of its work by now; the small problems are for the host.
        values |= zip(group, _norms(matrices.cpu()).amax(1).reshape(len(group), -1), strict=True)
    return {name: values[name] for name in items}


def _norms(matrices: Tensor) -> Tensor:
    """The spectral norms of small float64 matrices, NaN where one is not finite, of which `eigvalsh` would raise."""
    finite = matrices.isfinite().all(-1).all(-1)
    matrices = torch.where(finite[..., None, None], matrices, 0)
    return torch.where(finite, torch.linalg.eigvalsh(matrices.mT @ matrices)[..., -1].sqrt(), torch.nan)
