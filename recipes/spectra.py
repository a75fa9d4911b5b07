"""What weights are beyond their largest singular value: spectra, ranks, and convolutions as operators."""

from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor, nn

from specscale import singular_values


def snapshot(model: nn.Module, shape: tuple[int, int, int], exclude: str | None = None) -> dict[str, Any]:
    """Of every weight, by layer: its singular values in descending order, its ranks, and of a convolution its norm.

    Keys: `singular_values/<layer>`, `stable_rank/`, `numerical_rank/`, `effective_rank/` and `operator_norm/`, the last
    for inputs as large as those that an image of `shape (C, H, W)` makes. Of several matrices the first is told.
    """
    found: dict[str, Any] = {}
    for name, values in singular_values(model, exclude=exclude).items():
        found[f"singular_values/{name}"] = [float(f"{value:.5g}") for value in values[0].tolist()]
        for rank, function in RANKS.items():
            found[f"{rank}/{name}"] = function(values[0])
    sizes = input_sizes(model, shape)
    for name, module in model.named_modules():
        if f"singular_values/{name}" in found and isinstance(module, nn.Conv2d):
            found[f"operator_norm/{name}"] = operator_norm(module, sizes[name])
    return found


def stable_rank(values: Tensor) -> float:
    """`||W||_F^2 / ||W||^2` (Rudelson & Vershynin, "Sampling from large matrices", 2007)."""
    return (values.square().sum() / values[0].square()).item()


def numerical_rank(values: Tensor) -> float:
    """How many singular values are above a hundredth of the largest."""
    return float((values > 1e-2 * values[0]).sum())


def effective_rank(values: Tensor) -> float:
    """`exp(H)`, H the entropy of the singular values over their sum (Roy & Vetterli, "The effective rank", 2007)."""
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp().item()


RANKS = {"stable_rank": stable_rank, "numerical_rank": numerical_rank, "effective_rank": effective_rank}


@torch.no_grad()
def input_sizes(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, torch.Size]:
    """The shape of one image's input to every convolution, by layer; the model is left as it was."""
    sizes: dict[str, torch.Size] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: sizes.setdefault(name, args[0].shape) and None)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    training = model.training
    try:
        model.eval()(torch.zeros(1, *shape, device=next(model.parameters()).device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return sizes


def operator_norm(convolution: nn.Conv2d, size: torch.Size) -> float:
    """The largest `||conv(x)|| / ||x||` over inputs of `size (1, C, H, W)`, without the bias, to a relative 1e-3.

    By ARPACK's Lanczos iteration on the convolution and its adjoint, padding and stride as they are: what Sedghi et
    al., "The singular values of convolutional layers" (2019), find for circular padding by a Fourier transform.
    """
    weight = convolution.weight.detach()
    # The map is linear, so that its derivative at any point is itself, and autograd's product is the adjoint's.
    point = torch.zeros(size, device=weight.device, dtype=weight.dtype, requires_grad=True)
    with torch.enable_grad():
        image = convolution._conv_forward(point, weight, None)

    def apply(vector: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(vector).to(point).reshape(size)
        with torch.no_grad():
            return convolution._conv_forward(given, weight, None).flatten().cpu().numpy()

    def adjoint(vector: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(vector).to(image).reshape(image.shape)
        return torch.autograd.grad(image, point, given, retain_graph=True)[0].flatten().cpu().numpy()

    dtype = torch.empty((), dtype=weight.dtype).numpy().dtype
    operator = LinearOperator((image.numel(), point.numel()), matvec=apply, rmatvec=adjoint, dtype=dtype)
    start = np.random.default_rng(0).standard_normal(min(operator.shape)).astype(dtype)
    return float(svds(operator, k=1, tol=1e-3, v0=start, return_singular_vectors=False)[0])
