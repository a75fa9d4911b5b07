"""Spectra, ranks and the convolution as an operator, against what they are by definition."""

import math

import pytest
import torch
from torch import nn

from lib.spectra import (
    RANKS,
    effective_rank,
    excesses,
    input_shapes,
    numerical_rank,
    operator_norms,
    snapshot,
    spectral_norms,
    stable_rank,
)
from specscale import apply_norm_scaling, singular_values
from specscale.constraints import CONSTRAINTS


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
    "strided": nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False),
    "like plain": nn.Conv2d(3, 5, 3, padding=1),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "like grouped": nn.Conv2d(4, 6, 3, groups=2),
    "circular": nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"),
    "dilated": nn.Conv2d(2, 3, 2, dilation=2),
    "pointwise": nn.Conv2d(5, 4, 1),
    "single": nn.Conv2d(1, 1, 1),
}


def input_sizes(height, width):
    return {name: torch.Size((1, one.in_channels, height, width)) for name, one in CONVOLUTIONS.items()}


def test_operator_norms_are_those_of_the_maps_written_out():
    sizes = input_sizes(7, 6)
    found = operator_norms(CONVOLUTIONS, sizes)
    assert list(found) == list(CONVOLUTIONS)
    for name, convolution in CONVOLUTIONS.items():
        basis = torch.eye(sizes[name].numel()).reshape(-1, *sizes[name][1:])
        with torch.no_grad():
            matrix = convolution._conv_forward(basis, convolution.weight, None).flatten(1).T
        exact = torch.linalg.matrix_norm(matrix.double(), 2).item()
        assert found[name] == pytest.approx(exact, rel=5e-4), name


def test_a_pointwise_convolution_is_its_flattened_matrix_and_others_lie_within_the_kernel_bound():
    found = operator_norms(CONVOLUTIONS, input_sizes(9, 9))
    for name, convolution in CONVOLUTIONS.items():
        flattened = torch.linalg.matrix_norm(convolution.weight.detach().flatten(1), 2).item()
        ratio = found[name] / flattened
        # Each of the kernel's positions is a map of at most the flattened norm, on shifted images.
        assert ratio <= math.sqrt(math.prod(convolution.kernel_size)) * (1 + 1e-3)
        if convolution.kernel_size == (1, 1):
            assert ratio == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_snapshot_names_every_layer_and_leaves_the_model_alone(scaled):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)).train()
    if scaled:
        apply_norm_scaling(model, "spectral")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = snapshot(model, (3, 8, 8))
    assert {key.partition("/")[0] for key in found} == {"singular_values", *RANKS, "operator_norm"}
    assert [key for key in found if key.startswith("operator_norm/")] == ["operator_norm/0"]
    exact = torch.linalg.svdvals(model[3].weight.detach())
    assert found["singular_values/3"] == pytest.approx(exact.tolist(), rel=1e-4)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert input_shapes(model, (3, 8, 8)) == {"0": (1, 3, 8, 8)}


class Mixed(nn.Module):
    """One shape and its transpose, several matrices in a weight, and matrices with fewer sides than steps are taken."""

    def __init__(self):
        super().__init__()
        self.wide, self.tall, self.also_wide = nn.Linear(300, 120), nn.Linear(120, 300), nn.Linear(300, 120)
        self.grouped, self.small, self.one = nn.Conv2d(8, 12, 3, groups=2), nn.Linear(7, 5), nn.Linear(1, 1)
        self.zero, self.half = nn.Linear(60, 50), nn.Linear(100, 80).bfloat16()
        nn.init.zeros_(self.zero.weight)


def norms_of(model, exclude=None):
    return {name: values.max().item() for name, values in spectral_norms(model, exclude).items()}


def test_spectral_norms_are_the_largest_singular_values():
    model = Mixed()
    # Largest singular values in a crowd, as spectral scaling leaves them: the hard case.
    left, values, right = torch.linalg.svd(model.wide.weight.detach(), full_matrices=False)
    model.wide.weight.data = left @ torch.diag(values.clamp_max(values[20])) @ right
    exact = {name: own.max().item() for name, own in singular_values(model).items()}
    assert norms_of(model) == pytest.approx(exact, rel=5e-4)
    assert list(norms_of(model)) == list(exact)
    assert norms_of(model) == norms_of(model)
    assert list(norms_of(model, "*wide")) == [name for name in exact if "wide" not in name]
    grouped = singular_values(model)["grouped"][:, 0]
    torch.testing.assert_close(spectral_norms(model)["grouped"], grouped, rtol=5e-4, atol=0)
    scaling = apply_norm_scaling(model, "spectral", target=0.7, exclude="zero")
    scaling.project()
    exact = {name: own.max().item() for name, own in singular_values(model).items()}
    assert norms_of(model) == pytest.approx(exact, rel=5e-4)


@pytest.mark.parametrize("norm", CONSTRAINTS)
def test_the_excess_is_that_of_the_norm_that_is_constrained(norm):
    model = Mixed()
    model.grouped.weight.data[:6] *= 2
    scaling = apply_norm_scaling(model, norm, exclude="zero")
    assert excesses(scaling, spectral_norms(model)) == pytest.approx(
        dict.fromkeys(norms_of(model, "zero"), 0), abs=5e-4
    )
    # The second of the group's matrices, which is the smaller one.
    model.grouped.weight.data[6:] *= 1.5
    found = excesses(scaling, spectral_norms(model))
    assert found.pop("grouped") == pytest.approx(0.5, abs=1e-3)
    assert max(found.values()) < 5e-4


def test_a_norm_that_is_not_finite_is_said_and_the_others_are_right():
    model = Mixed()
    expected = norms_of(model)
    model.wide.weight.data[3, 4] = float("nan")
    model.small.weight.data[0, 0] = float("inf")
    found = norms_of(model)
    assert [name for name, value in found.items() if math.isnan(value)] == ["wide", "small"]
    expected |= {"wide": math.nan, "small": math.nan}
    assert found == pytest.approx(expected, rel=5e-4, nan_ok=True)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_no_setting_of_float32_products_changes_a_norm(precision):
    model = Mixed()
    sizes = input_sizes(7, 6)
    before = norms_of(model), operator_norms(CONVOLUTIONS, sizes)
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert (norms_of(model), operator_norms(CONVOLUTIONS, sizes)) == before
    finally:
        torch.set_float32_matmul_precision("highest")
