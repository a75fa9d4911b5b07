"""Norms of a model's weights, scaled or not."""

from collections.abc import Iterable

import torch
from torch import nn

from specscale.parametrization import wide
from specscale.rules import LayerRule
from specscale.selection import Patterns, select
from specscale.solvers import Block


@torch.no_grad()
def spectral_norms(
    module: nn.Module, *, include: Patterns = None, exclude: Patterns = None, rules: Iterable[LayerRule] = ()
) -> dict[str, float]:
    """The spectral norm of every weight of a model, scaled or plain, by layer name.

    Solved from a cold start, until the residual is 1e-5 relative or for 300 iterations. A tensor that is several
    matrices counts by its largest, and one that is computed from others by what it comes to.

    Raises:
        TypeError: `module` is no module, or an option has a wrong type.
        ValueError: a pattern matches nothing, a rule does not fit a layer, or no weight is selected.
    """
    solver = Block()
    norms = {}
    for weight in select("spectral_norms", module, include, exclude, rules):
        matrices = wide(weight.view.matrices(weight.parameter))
        key = torch.arange(len(matrices), device=matrices.device)
        triple, _ = solver.solve(matrices, solver.cold(matrices, key), to_convergence=True)
        norms[weight.name] = triple.value.max().item()
    return norms
