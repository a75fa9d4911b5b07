"""Layers and optimizers that other code swaps, copies or rebuilds: their weights are followed, or it is said."""

import copy
import io

import pytest
import torch
from held import off_target, saved
from torch import nn
from torch.optim.swa_utils import AveragedModel

from specscale import NormScaler, apply_norm_scaling, remove_norm_scaling

both = pytest.mark.parametrize("norm", ["frobenius", "spectral"])


class Fast(nn.Linear):
    @classmethod
    def of(cls, old):
        new = cls(old.in_features, old.out_features)
        new.weight, new.bias = old.weight, old.bias
        return new


class Fused(nn.Module):
    """Holds the parameters of two layers under names of its own."""

    def __init__(self, first, second):
        super().__init__()
        self.first_weight, self.first_bias = first.weight, first.bias
        self.second = nn.ParameterList([second.weight, second.bias])

    def forward(self, x):
        x = nn.functional.linear(x, self.first_weight, self.first_bias).relu()
        return nn.functional.linear(x, *self.second)


def swap_layers(model):
    for index in (0, 2):
        model[index] = Fast.of(model[index])


def wrap_layers(model):
    for index in (0, 2):
        model[index] = nn.Sequential(nn.Identity(), model[index])


def fuse_layers(model):
    model[0], model[1], model[2] = Fused(model[0], model[2]), nn.Identity(), nn.Identity()


def rename_layers(model):
    old = list(model)
    del model[:]
    model.extend([nn.Identity(), *old])


def scaled(norm="spectral"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 44))
    scaling = apply_norm_scaling(model, norm, init="orthogonal")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return model, scaling, optimizer


def train(model, optimizer, num_steps=3, then=lambda: None):
    for seed in range(num_steps):
        optimizer.zero_grad()
        model(torch.randn(8, 40, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        optimizer.step()
        then()


@both
@pytest.mark.parametrize("swap", [swap_layers, wrap_layers, fuse_layers, rename_layers])
def test_weights_are_followed_to_other_layers(swap, norm):
    model, scaling, optimizer = scaled(norm)
    scaling.attach(optimizer)
    train(model, optimizer)
    buffers = [weight.scaling.state_dict(keep_vars=True) for weight in scaling.weights]
    parameters = {id(weight.parameter) for weight in scaling.weights}
    swap(model)
    train(model, optimizer, then=lambda: check(scaling))
    assert {id(weight.parameter) for weight in scaling.weights} == parameters
    # The state is the one that it was, and is in the state dict again.
    held = {id(value) for value in model.state_dict(keep_vars=True).values()}
    assert all(id(value) in held for own in buffers for value in own.values())
    assert len(scaling.metrics()) == 12
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict())
    assert saved(NormScaler.of(other).metrics()) == saved(scaling.metrics())


def check(scaling):
    assert len(scaling.weights) == 2
    assert max(map(off_target, scaling.weights)) < 1e-3


@both
def test_swapped_before_attach_and_without_it(norm):
    model, scaling, optimizer = scaled(norm)
    swap_layers(model)
    scaling.attach(optimizer)
    train(model, optimizer, then=lambda: check(scaling))
    scaling.detach()
    swap_layers(model)
    train(model, optimizer, then=lambda: (scaling.step(), check(scaling)))
    scaling.remove()
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert type(model[0]) is Fast


def test_layers_that_are_out_for_a_while_are_held_again():
    model, scaling, optimizer = scaled()
    scaling.attach(optimizer)
    train(model, optimizer)
    first = model[0]
    model[0] = nn.Linear(40, 48)
    with pytest.warns(UserWarning, match="step: the weight of '0' is not in the model any more"):
        train(model, optimizer, 1)
    assert [weight.name for weight in scaling.weights] == ["2"]
    model[0] = first
    train(model, optimizer, then=lambda: check(scaling))
    scaling.metrics()


@both
def test_a_layer_that_was_replaced_is_named_once_by_each_call(norm):
    model, scaling, optimizer = scaled(norm)
    scaling.attach(optimizer)
    train(model, optimizer)
    model[2] = nn.Linear(48, 44)
    optimizer.add_param_group({"params": model[2].parameters()})
    text = "the weight of '2' is not in the model any more, and is no longer scaled. Replace layers inside"
    with pytest.warns(UserWarning, match=f"step: {text}") as caught:
        train(model, optimizer, 1)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=f"metrics: {text}") as caught:
        assert "norm/0" in scaling.metrics()
    assert caught[0].filename == __file__
    train(model, optimizer)
    scaling.metrics()
    assert [weight.name for weight in scaling.weights] == ["0"]


def test_when_all_are_lost_every_call_says_so():
    model, scaling, _ = scaled()
    model[0], model[2] = nn.Linear(40, 48), nn.Linear(48, 44)
    with pytest.warns(UserWarning, match="metrics: the weight of '0', '2' is not in the model any more"):
        assert scaling.metrics() == {}
    for call in (scaling.step, scaling.audit, scaling.project):
        with pytest.raises(ValueError, match="no weight of Sequential is under this scaling any more"):
            call()


def test_what_a_call_has_removed_is_not_missed():
    model, scaling, optimizer = scaled()
    scaling.attach(optimizer)
    remove_norm_scaling(model[2])
    train(model, optimizer)
    scaling.metrics()
    remove_norm_scaling(model)
    train(model, optimizer)
    assert scaling.metrics() == {}


# Optimizers that have lost the hook.


def deep_copied(model, optimizer):
    return copy.deepcopy((model, optimizer))


def copied_and_rebuilt(model, optimizer):
    copied = copy.deepcopy(model)
    return copied, torch.optim.Adam(copied.parameters(), lr=1e-3)


def unpickled(model, optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    loaded.param_groups[0]["params"] = optimizer.param_groups[0]["params"]
    return model, loaded


def rebuilt(model, optimizer):
    return model, type(optimizer)(optimizer.param_groups)


@pytest.mark.parametrize("norm", ["spectral"])
@pytest.mark.parametrize("copied", [deep_copied, copied_and_rebuilt, unpickled, rebuilt])
@pytest.mark.parametrize("look", [NormScaler.metrics, str, NormScaler.audit])
def test_what_trains_unscaled_is_told_of(look, copied, norm):
    model, scaling, optimizer = scaled(norm)
    scaling.attach(optimizer)
    train(model, optimizer)
    other, other_optimizer = copied(model, optimizer)
    handle = scaling if other is model else NormScaler.of(other)
    look(handle)
    train(other, other_optimizer, 1)
    with pytest.warns(
        UserWarning, match="the weight of '0', '2' has changed since it was last scaled.*attach"
    ) as caught:
        look(handle)
    assert caught[0].filename == __file__
    look(scaling) if other is not model else None
    # Attached, it is held.
    handle.attach(other_optimizer)
    train(other, other_optimizer, then=lambda: check(handle))
    look(handle)


@both
def test_a_copy_that_is_averaged_and_projected_is_not_scolded(norm):
    model, scaling, optimizer = scaled(norm)
    scaling.attach(optimizer)
    average = AveragedModel(model)
    train(model, optimizer, then=lambda: average.update_parameters(model))
    scaling.project(average)
    handle = NormScaler.of(average)
    handle.metrics()
    str(handle)
    assert handle.audit().worst_error < 1e-3
    check(handle)


@both
def test_a_model_that_was_moved_is_told_of_all_the_same(norm):
    model, scaling, optimizer = scaled(norm)
    scaling.step()
    model.to("cpu").float()
    train(model, optimizer, 1)
    with pytest.warns(UserWarning, match="the weight of '0', '2' has changed since it was last scaled"):
        scaling.metrics()
