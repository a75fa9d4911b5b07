"""Norms of a model's weights, scaled or not."""

import torch
from torch import nn

from specscale.parametrization import wide
from specscale.selection import Patterns, select
from specscale.solvers import Block


@torch.no_grad()
def spectral_norms(module: nn.Module, *, include: Patterns = None, exclude: Patterns = None) -> dict[str, float]:
    """The spectral norm of every weight of a model, scaled or plain, by layer name.

    Solved from a cold start, until the residual is 1e-5 relative or for 300 iterations. A tensor that is several
    matrices counts by its largest.

    Raises:
        TypeError: `module` is no module.
        ValueError: a pattern matches nothing, or no weight is selected.
    """
    solver = Block()
    norms = {}
    for weight in select("spectral_norms", module, include, exclude):
        matrices = wide(weight.view.matrices(weight.parameter))
        key = torch.arange(len(matrices), device=matrices.device)
        triple, _ = solver.solve(matrices, solver.cold(matrices, key), to_convergence=True)
        norms[weight.name] = triple.value.max().item()
    return norms
