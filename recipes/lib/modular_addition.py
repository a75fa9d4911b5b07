"""Modular addition: the sum of two numbers modulo a prime, learned from a part of all pairs.

A network that fits the pairs that it sees gets the others right much later, or never, depending on the norms of its
weights: Power et al., "Grokking", 2022 (arXiv 2201.02177); Liu et al., "Omnigrok", 2023 (arXiv 2210.01117).
"""

import torch
from torch import Tensor, nn

MODULUS = 97
SHARE = 0.4
"""The share of all pairs that are trained on; the others are for the test."""


def pairs(seed: int = 0, modulus: int = MODULUS, share: float = SHARE) -> tuple[tuple[Tensor, Tensor], ...]:
    """All pairs `(N, 2)` and their sums `(N,)`, split into training and test."""
    numbers = torch.arange(modulus)
    inputs = torch.cartesian_prod(numbers, numbers)
    sums = inputs.sum(1) % modulus
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    train, test = order.tensor_split([round(share * len(inputs))])
    return (inputs[train], sums[train]), (inputs[test], sums[test])


def pair_mlp(modulus: int = MODULUS, features: int = 64, width: int = 256) -> nn.Sequential:
    """An MLP on the embeddings of two numbers, with torch's own init."""
    return nn.Sequential(
        nn.Embedding(modulus, features),
        nn.Flatten(),
        nn.Linear(2 * features, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, modulus),
    )
