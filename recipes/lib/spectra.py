"""Spectral norms of the weights, all their singular values, their ranks, and the operator norms of convolutions."""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lib.lanczos import bidiagonalize, largest_singular_values
from specscale import NormScaler, singular_values
from specscale.shards import whole
from specscale.weights import Weight, select


@torch.no_grad()
def spectral_norms(model: nn.Module, exclude: str | None = None) -> dict[str, Tensor]:
    """The spectral norms `(k,)` of every weight's matrices, scaled or not, by layer, on the CPU, to a relative 5e-4.

    By Lanczos iteration. On the weights of an MLP of width 1000 in training under spectral scaling, whose largest
    singular values crowd at one value, the norms were too low by 7e-6 on average and by 2e-4 at most.

    For after every epoch: `specscale.spectral_norms` is more accurate, and decides after each iteration of each weight
    whether to go on. Here weights of one shape share their launches, and the host waits once.
    """
    weights = {weight.name: weight for weight in select(model, exclude=exclude, frozen=True)}

    def shape(weight: Weight) -> Hashable:
        m, n = weight.view.matrix_shape(weight.parameter)
        return weight.view.count, max(m, n), min(m, n)

    return largest_singular_values(weights, shape, _bidiagonals_of_weights)


@torch.no_grad()
def excesses(scaling: NormScaler, spectral_norms: Mapping[str, Tensor]) -> dict[str, float]:
    """How far, relative, each scaled weight is above its target in the norm of its constraint: its worst matrix.

    Of the weights as they are, where `scaling.metrics()` reports what the step has measured. Other norms than spectral
    ones are exact.
    """
    found = {}
    for weight in scaling.weights:
        own, norm = weight.scaling, weight.scaling.constraint.norm
        if norm.name == "spectral":
            values = spectral_norms[weight.name].to(own.target.device)
        else:
            seeds = own.seeds(own.target.device)
            values = norm.certify(own.matrices(weight.parameter), seeds, tolerance=1e-3, miss=1e-6).lower
        found[weight.name] = own.excess(values).max().item()
    return found


def _bidiagonals_of_weights(weights: list[Weight]) -> Tensor:
    parts = (weight.view.matrices(whole(weight.parameter)).double() for weight in weights)
    tall = torch.cat([part if part.shape[-2] >= part.shape[-1] else part.mT for part in parts])
    return bidiagonalize(
        tall.matmul, tall.mT.matmul, len(tall), tall.shape[-1], tall.device, num_steps=48, num_starts=4
    )


def snapshot(model: nn.Module, image_shape: tuple[int, int, int], exclude: str | None = None) -> dict[str, Any]:
    """Singular values and ranks of every weight, and the operator norm of every convolution, by layer.

    Keys: `singular_values/<layer>` in descending order, `stable_rank/`, `numerical_rank/`, `effective_rank/`, and
    `operator_norm/` for inputs as large as those that an image of shape `(C, H, W)` leads to. For a layer that holds
    several matrices, these are the values of the first.
    """
    by_key: dict[str, Any] = {}
    for name, values in singular_values(model, exclude=exclude).items():
        by_key[f"singular_values/{name}"] = [float(f"{value:.5g}") for value in values[0].tolist()]
        for rank, function in RANKS.items():
            by_key[f"{rank}/{name}"] = function(values[0])
    convolutions = {
        name: module
        for name, module in model.named_modules()
        if f"singular_values/{name}" in by_key and isinstance(module, nn.Conv2d)
    }
    if convolutions:
        operators = operator_norms(convolutions, input_shapes(model, image_shape))
        by_key |= {f"operator_norm/{name}": value for name, value in operators.items()}
    return by_key


def stable_rank(values: Tensor) -> float:
    """`||W||_F^2 / ||W||^2` (Rudelson & Vershynin, "Sampling from large matrices", 2007)."""
    return (values.square().sum() / values[0].square()).item()


def numerical_rank(values: Tensor) -> float:
    """The number of singular values above a hundredth of the largest."""
    return float((values > 1e-2 * values[0]).sum())


def effective_rank(values: Tensor) -> float:
    """`exp(H)`, H the entropy of the singular values over their sum (Roy & Vetterli, "The effective rank", 2007)."""
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp().item()


RANKS = {"stable_rank": stable_rank, "numerical_rank": numerical_rank, "effective_rank": effective_rank}


@torch.no_grad()
def input_shapes(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, torch.Size]:
    """The input shape of every convolution for one image, by layer. The model is not changed."""
    shapes: dict[str, torch.Size] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: shapes.setdefault(name, args[0].shape) and None)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    training = model.training
    try:
        model.eval()(torch.zeros(1, *image_shape, device=next(model.parameters()).device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return shapes


@torch.no_grad()
def operator_norms(convolutions: Mapping[str, nn.Conv2d], input_shapes: Mapping[str, torch.Size]) -> dict[str, float]:
    """The largest `||conv(x)|| / ||x||` over inputs of each shape `(1, C, H, W)`, without the bias, to a relative 1e-4.

    By Lanczos iteration on the convolution and its adjoint, with its own padding and stride. The norms of a small
    ResNet's convolutions, after 3 and after 200 steps under spectral scaling and without, were too low by 2e-5 at most.
    For circular padding, Sedghi et al., "The singular values of convolutional layers" (2019), get it from a Fourier
    transform.
    """
    items = {name: (convolution, input_shapes[name]) for name, convolution in convolutions.items()}

    def settings(item: tuple[nn.Conv2d, torch.Size]) -> Hashable:
        one, input_shape = item
        return input_shape, one.weight.shape, one.stride, one.padding, one.dilation, one.groups, one.padding_mode

    norms = largest_singular_values(items, settings, _bidiagonals_of_convolutions)
    return {name: values.max().item() for name, values in norms.items()}


def _bidiagonals_of_convolutions(items: list[tuple[nn.Conv2d, torch.Size]]) -> Tensor:
    """Of convolutions that differ in nothing but their weights."""
    count, (first, input_shape) = len(items), items[0]
    weight = torch.cat([whole(convolution.weight).double() for convolution, _ in items])
    # Side by side, they are one convolution in more groups.
    channels = count * first.in_channels, count * first.out_channels
    settings = (first.kernel_size, first.stride, first.padding, first.dilation, count * first.groups)
    together = nn.Conv2d(*channels, *settings, bias=False, padding_mode=first.padding_mode, device="meta")
    # It is linear in its input: autograd's vector-Jacobian product, at any input, applies the adjoint.
    zero = weight.new_zeros(1, count * input_shape[1], *input_shape[2:]).requires_grad_()
    with torch.enable_grad():
        output = together._conv_forward(zero, weight, None)

    def apply(vectors: Tensor) -> Tensor:
        return together._conv_forward(vectors.reshape(zero.shape), weight, None).reshape(count, -1, 1)

    def apply_adjoint(vectors: Tensor) -> Tensor:
        gradient = vectors.reshape(output.shape)
        return torch.autograd.grad(output, zero, gradient, retain_graph=True)[0].reshape(count, -1, 1)

    return bidiagonalize(apply, apply_adjoint, count, input_shape.numel(), zero.device, num_steps=80, num_starts=1)
