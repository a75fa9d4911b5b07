"""State without values, on the meta device or in memory that `to_empty` gave, and tensors made for inference."""

import copy
import io

import pytest
import torch
from held import off_target
from torch import nn

from specscale import NormScaler, apply_norm_scaling, spectral_norms

both = pytest.mark.parametrize("norm", ["frobenius", "spectral"])


def scaled(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 10))
    return model, apply_norm_scaling(model, norm, target=0.7)


def skeleton_of(model):
    return copy.deepcopy(model).to("meta")


def train(model, handle):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    handle.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 40)).square().mean().backward()
        optimizer.step()
        assert max(map(off_target, handle.weights)) < 1e-3


@both
@pytest.mark.parametrize("by_memory", [False, True])
def test_a_skeleton_prints_loads_and_trains(norm, by_memory):
    model, _ = scaled(norm)
    checkpoint = copy.deepcopy(model.state_dict())
    skeleton = skeleton_of(model)
    assert f"NormScaling({norm}, target=0.7, without values)" in str(skeleton)
    if by_memory:
        skeleton.to_empty(device="cpu").load_state_dict(checkpoint)
    else:
        skeleton.load_state_dict(checkpoint, assign=True)
    assert str(skeleton) == str(model)
    assert all(torch.equal(value, checkpoint[name]) for name, value in skeleton.state_dict().items())
    train(skeleton, NormScaler.of(skeleton))


@both
def test_a_skeleton_is_saved_made_plain_and_copied(norm):
    model, scaling = scaled(norm)
    skeleton = skeleton_of(model)
    handle = NormScaler.of(skeleton)
    torch.save(skeleton.state_dict(), io.BytesIO())
    assert list(handle.plain_state_dict()) == list(scaling.plain_state_dict())
    with handle.plain():
        assert type(skeleton[0]) is nn.Linear
    loaded = copy.deepcopy(skeleton)
    loaded.load_state_dict(model.state_dict(), assign=True)
    assert NormScaler.of(loaded).metrics() == scaling.metrics()


@both
@pytest.mark.parametrize("call", ["step", "project", "retarget", "metrics", "audit"])
def test_calls_that_need_values_say_so(norm, call):
    handle = NormScaler.of(skeleton_of(scaled(norm)[0]))
    with pytest.raises(ValueError, match=f"{call}: the weight of '0' is on the meta device.*to_empty"):
        getattr(handle, call)()
    with pytest.raises(ValueError, match="print: the weight of '0' is on the meta device"):
        str(handle)


@both
@pytest.mark.parametrize("by_hand", [False, True])
def test_targets_survive_the_meta_device(norm, by_hand):
    model, scaling = scaled(norm)
    empty = skeleton_of(model).to_empty(device="cpu")
    plain = scaling.plain_state_dict()
    if by_hand:
        for name, value in NormScaler.of(empty).plain_state_dict().items():
            value.copy_(plain[name])
    else:
        empty.load_state_dict(plain)
    metrics = NormScaler.of(empty).metrics()
    assert metrics["target/0"] == pytest.approx(0.7)
    assert metrics["norm/0"] == pytest.approx(scaling.metrics()["norm/0"], rel=1e-5)
    train(empty, NormScaler.of(empty))


@both
def test_tensors_made_for_inference(norm):
    model, scaling = scaled(norm)
    with torch.inference_mode():
        checkpoint = copy.deepcopy(model.state_dict())
        copied = copy.deepcopy(model)
        # Inside, they can be written.
        scaling.project(copied)
        handle = NormScaler.of(copied)
        handle.step()
    # Outside, they can be read.
    handle.metrics()
    assert handle.audit().worst_error < 1e-3
    spectral_norms(copied)
    for call in ("step", "project"):
        with pytest.raises(ValueError, match=rf"{call}: the weight of '0' was made under torch.inference_mode\(\)"):
            getattr(handle, call)()
    model.load_state_dict(checkpoint)
    train(model, scaling)
