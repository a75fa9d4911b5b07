"""All singular values of the weights, their ranks, and the operator norms of convolutions."""

from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor, nn

from specscale import singular_values


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
    shapes = input_shapes(model, image_shape)
    for name, module in model.named_modules():
        if f"singular_values/{name}" in by_key and isinstance(module, nn.Conv2d):
            by_key[f"operator_norm/{name}"] = operator_norm(module, shapes[name])
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


def operator_norm(convolution: nn.Conv2d, input_shape: torch.Size) -> float:
    """The largest `||conv(x)|| / ||x||` over inputs of shape `(1, C, H, W)`, without the bias, to a relative 1e-3.

    By ARPACK's Lanczos iteration on the convolution and its adjoint, with its own padding and stride. For circular
    padding, Sedghi et al., "The singular values of convolutional layers" (2019), get it from a Fourier transform.
    """
    weight = convolution.weight.detach()
    # The convolution is linear in its input: autograd's vector-Jacobian product, at any input, applies the adjoint.
    zero = torch.zeros(input_shape, device=weight.device, dtype=weight.dtype, requires_grad=True)
    with torch.enable_grad():
        output = convolution._conv_forward(zero, weight, None)

    def apply(vector: np.ndarray) -> np.ndarray:
        image = torch.from_numpy(vector).to(zero).reshape(input_shape)
        with torch.no_grad():
            return convolution._conv_forward(image, weight, None).flatten().cpu().numpy()

    def apply_adjoint(vector: np.ndarray) -> np.ndarray:
        gradient = torch.from_numpy(vector).to(output).reshape(output.shape)
        return torch.autograd.grad(output, zero, gradient, retain_graph=True)[0].flatten().cpu().numpy()

    dtype = torch.empty((), dtype=weight.dtype).numpy().dtype
    operator = LinearOperator((output.numel(), zero.numel()), matvec=apply, rmatvec=apply_adjoint, dtype=dtype)
    start = np.random.default_rng(0).standard_normal(min(operator.shape)).astype(dtype)
    return float(svds(operator, k=1, tol=1e-3, v0=start, return_singular_vectors=False)[0])
