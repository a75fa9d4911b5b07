"""Norms of a model's weights, scaled or not."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from specscale.algebra import numerical, short_gram
from specscale.errors import refuse_non_finite
from specscale.parametrization import wide
from specscale.rules import LayerRule
from specscale.selection import Patterns, select
from specscale.solvers import Block, finite_or_zero


@numerical
def spectral_norms(
    module: nn.Module, *, include: Patterns = None, exclude: Patterns = None, rules: Iterable[LayerRule] = ()
) -> dict[str, float]:
    """The spectral norm of every weight of a model, scaled or plain, frozen or not, by layer name.

    Solved from a cold start, until the residual is 1e-5 relative or for 300 iterations. A tensor that is several
    matrices counts by its largest, and one that is computed from others by what it comes to.

    Raises:
        TypeError: `module` is no module, or an option has a wrong type.
        ValueError: a pattern matches nothing, a rule does not fit a layer, or no weight is selected.
    """
    solver = Block()
    norms = {}
    for weight in select("spectral_norms", module, include, exclude, rules, frozen=True):
        matrices = wide(weight.view.matrices(weight.parameter))
        key = torch.arange(len(matrices), device=matrices.device)
        triple, _ = solver.solve(matrices, solver.cold(matrices, key), to_convergence=True)
        norms[weight.name] = triple.value.max().item()
    return norms


@numerical
def singular_values(
    module: nn.Module, *, include: Patterns = None, exclude: Patterns = None, rules: Iterable[LayerRule] = ()
) -> dict[str, Tensor]:
    """All singular values of every weight of a model, scaled or plain, frozen or not, by layer name.

    Each `(k, min(m, n))`, float64, in descending order, for a weight that is `k` matrices `(m, n)`. From the smaller
    Gram matrix in float64, so that a value is right to 1e-8 of the largest, which float32's own rounding of the weight
    exceeds. Slow for wide layers: `min(m, n)^3` operations a matrix.

    Raises:
        TypeError: `module` is no module, or an option has a wrong type.
        ValueError: a pattern matches nothing, a rule does not fit a layer, or no weight is selected.
        NonFiniteWeightError: a weight holds NaN or infinity.
    """
    weights = select("singular_values", module, include, exclude, rules, frozen=True)
    refuse_non_finite("singular_values", ((weight.name, weight.parameter) for weight in weights), "load good weights")
    found = {}
    for weight in weights:
        scaled, scale = finite_or_zero(wide(weight.view.matrices(weight.parameter)))
        squares = torch.linalg.eigvalsh(short_gram(scaled))
        found[weight.name] = squares.flip(-1).clamp_min(0).sqrt() * scale[:, None]
    return found
