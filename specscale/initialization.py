"""The method's start: every weight matrix a gain times a random (semi-)orthogonal matrix."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from specscale.errors import public_call
from specscale.layers import LayerRule
from specscale.linalg import no_grad_full_precision
from specscale.shards import as_shard, is_sharded, local
from specscale.targets import GAINS, Gains, check_setting, resolve_gains
from specscale.weights import Patterns, Weight, refuse_unwritable, select


def orthogonal(shape: torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """A batch of (semi-)orthogonal matrices `(k, m, n)`, uniformly distributed, in float32 or wider.

    QR of a Gaussian matrix with the signs of R's diagonal (Mezzadri, "How to generate random matrices from the
    classical compact groups", 2007).
    """
    count, m, n = shape
    dtype = torch.promote_types(like.dtype, torch.float32)
    device = like.device if generator is None else generator.device
    gaussian = torch.randn(count, max(m, n), min(m, n), dtype=dtype, device=device, generator=generator)
    q, r = torch.linalg.qr(gaussian.to(like.device))
    q = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1, 1)[:, None, :]
    return q if m >= n else q.mT


@no_grad_full_precision
def orthogonal_like(weight: Weight, gain: float, generator: torch.Generator | None) -> Tensor:
    """A tensor like the weight, memory format included, whose matrices are `gain` times orthogonal ones."""
    like = weight.parameter
    if is_sharded(like):
        value = torch.empty(like.shape, dtype=like.dtype, device=local(like).device)
    else:
        value = torch.empty_like(like)
    shape = weight.view.matrices(value).shape
    weight.view.write_(value, gain * orthogonal(shape, value, generator))
    return as_shard(value, like) if is_sharded(like) else value


@public_call()
def orthogonal_init_(
    module: nn.Module,
    gain: Gains = "channels",
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    rules: Iterable[LayerRule] = (),
    example_input: Any = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Overwrite the weights of a model, in place, by gain times (semi-)orthogonal matrices.

    Args:
        module: the model; the weights that `apply_norm_scaling` would scale are overwritten.
        gain: `"channels"`, `"features"`, `"matrix"`, a number, a function `(name, module) -> float`, or a mapping from
            patterns, as `include` takes them, to these: the first match wins, and every weight must be matched.
        include: shell patterns on module names, each taking everything below the modules that it matches, types of
            layers, or predicates `(name, module) -> bool`; None means all.
        exclude: the weights that are not overwritten, in the same ways.
        rules: which tensors of other layers are weights too, and as which matrices; they come before the built-in ones.
        example_input: for `"features"`, a batch that the model can be called with.
        generator: the source of randomness; None means torch's global one.

    Returns:
        The module.

    Raises:
        TypeError: `module` is no module, or an option has a wrong type.
        ValueError: unknown gain, a gain that is not finite and positive, a pattern that matches nothing, a weight that
            no pattern of `gain` matches, a rule that does not fit a layer, or a weight that is computed from others.
    """
    check_setting("gain", gain, GAINS)
    weights = select(module, include, exclude, rules)
    refuse_unwritable(weights)
    gains = resolve_gains(gain, weights, module, example_input)
    with torch.no_grad():
        for weight in weights:
            weight.parameter.copy_(orthogonal_like(weight, gains[weight.name], generator))
    return module
