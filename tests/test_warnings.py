"""What is said of weights that train and that no step scales, and what a handle says of itself."""

import copy
import gc
import warnings

import pytest
import torch
from torch import nn

from specscale import NormScaler, apply_norm_scaling

UNOWNED = r"2 of 3 weights are in no attached optimizer, and no step scales them: '1', '2'. Attach the optimizer that"
UNSCALED = r"SGD trains scaled weights that nothing scales: its first step moved '0', '1', '2', and no scaling"


def net(count=3):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))


def sgd(*modules, lr=0.1):
    return torch.optim.SGD([parameter for module in modules for parameter in module.parameters()], lr=lr)


def step(model, *optimizers):
    model(torch.ones(2, 4)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def test_weights_that_no_attached_optimizer_has_are_named_once():
    model = net()
    scaling = apply_norm_scaling(model)
    optimizer = sgd(model[0])
    with warnings.catch_warnings(action="error"):
        scaling.attach(optimizer)
    with pytest.warns(UserWarning, match=f"^step: {UNOWNED}") as caught:
        step(model, optimizer)
    assert caught[0].filename == __file__
    with warnings.catch_warnings(action="error"):
        step(model, optimizer)
        scaling.metrics()


def test_metrics_names_them_before_the_first_step():
    model = net()
    scaling = apply_norm_scaling(model).attach(optimizer := sgd(model[0]))
    with pytest.warns(UserWarning, match=f"^metrics: {UNOWNED}") as caught:
        scaling.metrics()
    assert caught[0].filename == __file__
    with warnings.catch_warnings(action="error"):
        step(model, optimizer)


def test_many_names_are_counted():
    model = net(9)
    scaling = apply_norm_scaling(model).attach(optimizer := sgd(model[0]))
    with pytest.warns(UserWarning, match=r"8 of 9 weights .* '1', '2', '3', '4', '5' and 3 more\. Attach"):
        scaling.metrics()
    del optimizer


@pytest.mark.parametrize("handles", ["one", "of", "two"])
def test_several_optimizers_may_share_the_weights(handles):
    model = net()
    first = apply_norm_scaling(model)
    second = {"one": lambda: first, "of": lambda: NormScaler.of(model), "two": lambda: first}[handles]()
    if handles == "two":
        first.remove()
        first, second = (apply_norm_scaling(model, include=names) for names in (["0"], ["1", "2"]))
    optimizers = [sgd(model[0]), sgd(model[1], model[2])]
    first.attach(optimizers[0])
    second.attach(optimizers[1])
    for _ in range(3):
        step(model, *optimizers)
    for scaling in (first, second):
        scaling.metrics()


def test_frozen_weights_need_no_optimizer():
    model = net()
    scaling = apply_norm_scaling(model)
    model[1].requires_grad_(False)
    scaling.attach(optimizer := sgd(model[0], model[2]))
    step(model, optimizer)
    scaling.metrics()


def test_who_never_attaches_is_told_at_the_second_step():
    model = net()
    apply_norm_scaling(model)
    optimizer = sgd(model)
    step(model, optimizer)
    with pytest.warns(UserWarning, match=UNSCALED) as caught:
        step(model, optimizer)
    assert caught[0].filename == __file__
    step(model, optimizer)


def test_a_second_optimizer_that_is_not_attached_is_named():
    model = net()
    scaling = apply_norm_scaling(model)
    own, other = sgd(model[0]), torch.optim.Adam(model[1:].parameters())
    scaling.attach(own)
    with pytest.warns(UserWarning, match="2 of 3 weights are in no attached optimizer"):
        step(model, own, other)
    with pytest.warns(UserWarning, match="Adam trains scaled weights .* moved '1', '2', and no"):
        step(model, own, other)


def test_who_scales_by_hand_or_has_taken_the_scaling_off_is_told_nothing():
    model = net()
    scaling = apply_norm_scaling(model)
    optimizer = sgd(model)
    for _ in range(3):
        step(model, optimizer)
        scaling.step()
    scaling.remove()
    optimizer = sgd(model)
    for _ in range(3):
        step(model, optimizer)


def test_a_copy_that_trains_without_scaling_is_told_and_a_plain_model_is_not():
    model = net()
    scaling = apply_norm_scaling(model).attach(optimizer := sgd(model))
    copied, plain = copy.deepcopy(model), net()
    optimizers = [sgd(copied), sgd(plain)]
    for _ in range(2):
        step(plain, optimizers[1])
        step(model, optimizer)
    step(copied, optimizers[0])
    with pytest.warns(UserWarning, match=UNSCALED):
        step(copied, optimizers[0])
    with scaling.plain():
        inside = sgd(model, lr=0.0)
        for _ in range(3):
            inside.step()


def test_the_handle_says_what_it_holds_and_what_it_is_attached_to():
    model = net()
    scaling = apply_norm_scaling(model, "frobenius", include="0")
    assert repr(scaling) == "NormScaler(1 weights of Sequential, frobenius, attached to no optimizer)"
    apply_norm_scaling(model, exclude="0")
    scaling = NormScaler.of(model).attach(first := sgd(model[0])).attach(torch.optim.Adam(model[1:].parameters()))
    gc.collect()
    assert repr(scaling) == "NormScaler(3 weights of Sequential, frobenius, spectral, attached to SGD)"
    second = torch.optim.Adam(model[1:].parameters())
    scaling.attach(second)
    assert repr(scaling) == "NormScaler(3 weights of Sequential, frobenius, spectral, attached to Adam, SGD)"
    scaling.detach()
    assert repr(scaling).endswith("attached to no optimizer)")
    del first


def test_an_optimizer_that_cannot_be_hashed_steps_as_before():
    class Compared(torch.optim.SGD):
        def __eq__(self, other):
            return self is other

    apply_norm_scaling(nn.Linear(3, 3))
    layer = nn.Linear(3, 3)
    optimizer = Compared(layer.parameters(), lr=0.1)
    before = layer.weight.detach().clone()
    for _ in range(2):
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert not torch.equal(before, layer.weight)
