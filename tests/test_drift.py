"""The drift: the norm that the optimizer has left, before the step puts it back, over the target."""

import copy

import pytest
import torch
from torch import nn

from specscale import NormScaler, apply_norm_scaling

NORMS = ["frobenius", "spectral", "clipped"]


class Net(nn.Module):
    """A weight that the block solves, one of several matrices, and one that is solved exactly."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.grouped, self.head = nn.Linear(60, 50), nn.Conv2d(8, 12, 3, groups=2), nn.Linear(20, 3)


def moved(model, factor):
    """The model with every weight changed, as an optimizer might."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.mul_(factor).add_(noise, alpha=1e-3)


def exact(scaling):
    """Each weight's largest norm over its target, in float64."""
    found = {}
    for weight in scaling.weights:
        kind = "fro" if weight.scaling.constraint.name == "frobenius" else 2
        matrices = weight.scaling.view.matrices(weight.parameter.detach()).double()
        ratios = torch.linalg.matrix_norm(matrices, kind) / weight.scaling.target
        found[f"drift/{weight.name}"] = pytest.approx(ratios[weight.scaling.skip_mask == 0].max().item(), rel=1e-3)
    return found


def drifts(scaling):
    return {name: value for name, value in scaling.metrics().items() if name.startswith("drift/")}


def stands(scaling):
    """The drift if the optimizer had left the weights as they are."""
    excess = {name: value for name, value in scaling.metrics().items() if name.startswith("excess/")}
    return {name.replace("excess", "drift"): 1 + value for name, value in excess.items()}


@pytest.mark.parametrize("is_accelerator", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_the_drift_is_the_norm_before_the_step_over_the_target(norm, is_accelerator, monkeypatch):
    if is_accelerator:
        monkeypatch.setattr("specscale.linalg.can_sync", lambda tensor: False)
    scaling = apply_norm_scaling(model := Net(), norm, target=0.5)
    # No step has been taken: it is where the weight stands.
    assert drifts(scaling) == exact(scaling)
    scaling.step()
    for factor in (1.1, 0.8):
        moved(model, factor)
        expected = exact(scaling)
        scaling.step()
        assert drifts(scaling) == expected != pytest.approx(1, abs=0.05)
        assert "drift" in str(scaling)


@pytest.mark.parametrize("norm", NORMS[:2])
def test_a_matrix_that_is_not_scaled_has_no_drift(norm):
    model = Net()
    model.grouped.weight.data[6:] = 0
    with pytest.warns(UserWarning, match="holds a zero matrix"):
        scaling = apply_norm_scaling(model, norm)
    model.grouped.weight.data[6:] = 100
    model.grouped.weight.data[:6] *= 1.5
    scaling.step()
    assert drifts(scaling)["drift/grouped"] == pytest.approx(1.5, rel=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_that_is_skipped_keeps_the_drift(norm):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaling = apply_norm_scaling(model, norm).attach(optimizer)

    def step():
        for parameter in model.parameters():
            parameter.grad = -parameter.detach()
        optimizer.step()

    step()
    before = drifts(scaling)
    assert before == pytest.approx(dict.fromkeys(before, 1.1), rel=1e-3)
    optimizer.param_groups[0]["lr"] = 0.0
    step()
    assert drifts(scaling) == before
    optimizer.param_groups[0]["lr"] = 0.2
    scaling._step.take(scaling.weights, torch.ones(1))
    assert drifts(scaling) == before
    expected = {name: pytest.approx(1.2 * value, rel=1e-3) for name, value in stands(scaling).items()}
    step()
    assert drifts(scaling) == expected


@pytest.mark.parametrize("norm", NORMS)
def test_what_measures_anew_says_where_the_weight_stands(norm):
    scaling = apply_norm_scaling(model := Net(), norm, target=0.5)
    moved(model, 1.5)
    expected = exact(scaling)
    scaling.project()
    assert drifts(scaling) == expected
    scaling.retarget()
    assert drifts(scaling) == pytest.approx(dict.fromkeys(expected, 1))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_no_checkpoint_holds_it(norm, assign):
    scaling = apply_norm_scaling(model := Net(), norm)
    moved(model, 1.5)
    scaling.step()
    # Neither casts nor copies put it into the state dict.
    other = copy.deepcopy(model).half().float()
    assert drifts(NormScaler.of(other)) == drifts(scaling)
    for one in (model, other):
        assert not any("norm_before" in name for name in one.state_dict())
    skeleton = copy.deepcopy(model).to("meta")
    for loaded in (other, skeleton if assign else skeleton.to_empty(device="cpu")):
        loaded.load_state_dict(model.state_dict(), assign=assign)
        assert drifts(NormScaler.of(loaded)) == pytest.approx(stands(NormScaler.of(loaded)), rel=1e-6)
