"""Language modeling on the bytes of Python's own source: it is on every machine, and differs between Pythons."""

import math
import statistics
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn

NUM_BYTES = 2**20
"""The bytes that are read; the last tenth of them is for the test."""


def standard_library() -> tuple[Tensor, Tensor]:
    """The bytes of the standard library's top-level modules, for training and for the test: int64, `(N,)`."""
    text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    tokens = torch.frombuffer(bytearray(text[:NUM_BYTES]), dtype=torch.uint8).long()
    return tokens.tensor_split([len(tokens) * 9 // 10])


def draw_sequences(tokens: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Sequences of `length` bytes from random places, each with the byte that follows: `(count, length + 1)`."""
    starts = torch.randint(len(tokens) - length, (count, 1), generator=generator)
    return tokens[starts + torch.arange(length + 1)]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """The cross entropy of each next byte, in bits."""
    output = model(tokens[:, :-1])
    return nn.functional.cross_entropy(output.flatten(0, 1), tokens[:, 1:].flatten()) / math.log(2)


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: Tensor, count: int, length: int) -> float:
    """The mean loss, in bits, over 20 batches of sequences, the same ones in every run."""
    generator = torch.Generator().manual_seed(1)
    return statistics.mean(loss_of(model, draw_sequences(tokens, count, length, generator)).item() for _ in range(20))
