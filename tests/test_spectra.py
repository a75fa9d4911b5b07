"""Spectra, ranks and the convolution as an operator, against what they are by definition."""

import math

import pytest
import torch
from torch import nn

from lib.spectra import RANKS, effective_rank, input_shapes, numerical_rank, operator_norm, snapshot, stable_rank


def test_ranks_of_known_spectra():
    flat = torch.full((7,), 0.3, dtype=torch.float64)
    assert [rank(flat) for rank in RANKS.values()] == pytest.approx([7, 7, 7])
    single = torch.tensor([2.0, 0, 0], dtype=torch.float64)
    assert [rank(single) for rank in RANKS.values()] == pytest.approx([1, 1, 1])
    values = torch.tensor([4.0, 2.0, 2.0, 0.03], dtype=torch.float64)
    assert stable_rank(values) == pytest.approx(24.0009 / 16)
    assert numerical_rank(values) == 3
    shares = [value / 8.03 for value in values.tolist()]
    assert effective_rank(values) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


CONVOLUTIONS = {
    "plain": nn.Conv2d(3, 5, 3, padding=1),
    "strided": nn.Conv2d(4, 3, 3, stride=2, padding=1, bias=False),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "circular": nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    "dilated": nn.Conv2d(2, 3, 2, dilation=2),
    "pointwise": nn.Conv2d(5, 4, 1),
}


@pytest.mark.parametrize("convolution", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_the_operator_norm_is_that_of_the_map_written_out(convolution):
    size = (1, convolution.in_channels, 7, 6)
    basis = torch.eye(math.prod(size)).reshape(-1, *size[1:])
    with torch.no_grad():
        matrix = convolution._conv_forward(basis, convolution.weight, None).flatten(1).T
    exact = torch.linalg.matrix_norm(matrix.double(), 2).item()
    assert operator_norm(convolution, torch.Size(size)) == pytest.approx(exact, rel=1e-3)


def test_a_pointwise_convolution_is_its_flattened_matrix_and_others_lie_within_the_kernel_bound():
    for convolution in CONVOLUTIONS.values():
        flattened = torch.linalg.matrix_norm(convolution.weight.detach().flatten(1), 2).item()
        ratio = operator_norm(convolution, torch.Size((1, convolution.in_channels, 9, 9))) / flattened
        # Each of the kernel's positions is a map of at most the flattened norm, on shifted images.
        assert ratio <= math.sqrt(math.prod(convolution.kernel_size)) * (1 + 1e-3)
        if convolution.kernel_size == (1, 1):
            assert ratio == pytest.approx(1, rel=1e-3)


def test_a_snapshot_names_every_layer_and_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = snapshot(model, (3, 8, 8))
    assert {key.partition("/")[0] for key in found} == {"singular_values", *RANKS, "operator_norm"}
    assert [key for key in found if key.startswith("operator_norm/")] == ["operator_norm/0"]
    exact = torch.linalg.svdvals(model[3].weight.detach())
    assert found["singular_values/3"] == pytest.approx(exact.tolist(), rel=1e-4)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert input_shapes(model, (3, 8, 8)) == {"0": (1, 3, 8, 8)}
