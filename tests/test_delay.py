"""How late a network generalises: the two factors, the runs that are asked for, and the real command."""

import pytest
import torch
from torch import nn

from delay import Cell, prepare


def cell(layers, logits, decay=0.0, seed=0):
    return Cell(layers, logits, decay, seed, steps=50)


def logits_of(model):
    numbers = torch.arange(97)
    return model(torch.stack([numbers, numbers.flip(0)], 1))


def test_the_logits_start_at_their_scale_whatever_the_norm_of_the_layers():
    plain = logits_of(prepare(cell(None, 1.0))[0])
    for layers, logits in ((1.0, 1.0), (2.0, 1.0), (0.5, 1.0), (2.0, 2.0), (1.0, 2.0)):
        model, _ = prepare(cell(layers, logits))
        torch.testing.assert_close(logits_of(model), logits**3 * plain)
        for layer, free in zip(model, prepare(cell(None, 1.0))[0], strict=False):
            if isinstance(layer, nn.Linear):
                assert layer.weight.norm().item() == pytest.approx(layers * free.weight.norm().item(), rel=1e-5)
