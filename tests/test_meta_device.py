"""Scaling a model on the meta device: targets are set there, values come later, and the first call solves them."""

import copy
import functools
import warnings
from contextlib import nullcontext

import pytest
import torch
from held import off_target
from test_every_constraint import CASES, Zoo, each_case, frobenius, matrices, train
from torch import nn
from waits import Refuse

from specscale import NormScaler, Relative, apply_norm_scaling, is_norm_scaled, orthogonal_init_
from specscale.schedules import Linear

NORMS = ["frobenius", "rows", "spectral"]


def on_meta(build=Zoo):
    with torch.device("meta"):
        return build()


def reset(model):
    torch.manual_seed(0)
    for module in model.modules():
        for name in ("reset_parameters", "_reset_parameters"):
            if hasattr(module, name):
                getattr(module, name)()


def initialized(build=Zoo):
    torch.manual_seed(0)
    return build()


def by_plain_checkpoint(model, norm):
    model.to_empty(device="cpu").load_state_dict(initialized().state_dict())


def by_assignment(model, norm):
    model.load_state_dict(initialized().state_dict(), assign=True)


def by_scaled_checkpoint(model, norm):
    saved = initialized()
    apply_norm_scaling(saved, norm, target="channels")
    model.to_empty(device="cpu").load_state_dict(saved.state_dict())


def by_reset(model, norm):
    reset(model.to_empty(device="cpu"))


def by_orthogonal_init(model, norm):
    reset(model.to_empty(device="cpu"))
    orthogonal_init_(model, gain=2.0)


def by_parameters_alone(model, norm):
    """As code does that puts each parameter in its place itself, and leaves buffers alone."""
    values = initialized().state_dict()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="cpu"))
    for name, value in NormScaler.of(model).plain_state_dict().items():
        value.copy_(values[name])


WAYS = [by_plain_checkpoint, by_assignment, by_scaled_checkpoint, by_reset, by_orthogonal_init, by_parameters_alone]
each_norm = pytest.mark.parametrize("norm", NORMS)


def assert_held(model, scaling, case, targets, steps=3):
    """In float64, after every step: the constraint's own check, and the targets that were set on the meta device."""
    for _ in train(model, torch.optim.Adam(model.parameters(), lr=1e-2), steps):
        before = {weight.name: matrices(weight) for weight in scaling.weights}
        scaling.step()
        metrics = scaling.metrics()
        for weight in scaling.weights:
            name, target = weight.name, weight.scaling.target
            assert target.tolist() == pytest.approx(targets[name]), name
            case.check(before[name], matrices(weight), target.double())
            norm = torch.linalg.matrix_norm(matrices(weight), "fro" if case.check is frobenius else 2)
            assert metrics[f"norm/{name}"] == pytest.approx(norm.max().item(), rel=case.reported), name


@functools.cache
def targets_by_channels(norm):
    scaling = apply_norm_scaling(initialized(), norm, target="channels")
    return {weight.name: weight.scaling.target.tolist() for weight in scaling.weights}


@pytest.mark.slow
@each_case
def test_every_constraint_holds_from_the_first_step(case):
    scaling = apply_norm_scaling(model := on_meta(), case.norm, target="channels")
    by_reset(model, case.norm)
    assert_held(model, scaling, case, targets_by_channels(case.norm), steps=2)


# The rows' weights come as the Frobenius ones do.
@pytest.mark.parametrize("norm", ["frobenius", pytest.param("rows", marks=pytest.mark.slow), "spectral"])
@pytest.mark.parametrize("bring_values", WAYS)
def test_values_come_in_any_way(norm, bring_values):
    scaling = apply_norm_scaling(model := on_meta(), norm, target="channels")
    bring_values(model, norm)
    targets = targets_by_channels(norm)
    metrics = scaling.metrics()
    for weight in scaling.weights:
        assert max(targets[weight.name]) == pytest.approx(metrics[f"target/{weight.name}"])
        exact = torch.linalg.matrix_norm(matrices(weight), 2 if norm == "spectral" else "fro").max().item()
        assert metrics[f"norm/{weight.name}"] == pytest.approx(exact, rel=1e-3)
    assert scaling.audit().worst_error < 1e-3
    assert_held(model, scaling, CASES[norm], targets, steps=2)


@each_norm
def test_project_retarget_and_reports_work_before_the_first_step(norm):
    scaling = apply_norm_scaling(model := on_meta(), norm, target="channels")
    by_reset(model, norm)
    assert str(scaling).count("tall") == 1
    scaling.project()
    assert max(map(off_target, scaling.weights)) < 1e-3
    assert scaling.audit().worst_error < 1e-3
    scaling = apply_norm_scaling(model := on_meta(), norm, target="channels")
    by_reset(model, norm)
    scaling.retarget()
    for weight in scaling.weights:
        exact = torch.linalg.matrix_norm(matrices(weight), 2 if norm == "spectral" else "fro")
        torch.testing.assert_close(weight.scaling.target.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_on_an_accelerator_no_step_waits_after_the_first(norm, monkeypatch):
    monkeypatch.setattr("specscale.linalg.can_sync", lambda tensor: False)
    scaling = apply_norm_scaling(model := on_meta(), norm, target="channels")
    by_reset(model, norm)
    targets = targets_by_channels(norm)
    for number, _ in enumerate(train(model, torch.optim.Adam(model.parameters(), lr=1e-2), 3)):
        with Refuse() if number else nullcontext():
            scaling.step()
        for weight in scaling.weights:
            assert weight.scaling.target.tolist() == pytest.approx(targets[weight.name])
            assert off_target(weight) < 1e-3, weight.name


@each_norm
def test_a_report_changes_nothing_that_ranks_compute(norm):
    models = []
    for reports in (False, True):
        scaling = apply_norm_scaling(model := on_meta(), norm, target="channels")
        by_reset(model, norm)
        scaling.attach(optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
        if reports:
            scaling.metrics()
            scaling.audit()
            print(scaling)
        for _ in train(model, optimizer, 2):
            pass
        models.append(model.state_dict())
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


@each_norm
def test_it_is_the_same_as_scaling_the_model_with_its_values(norm):
    scaling = apply_norm_scaling(model := on_meta(), norm, target=0.5)
    by_plain_checkpoint(model, norm)
    other = apply_norm_scaling(real := initialized(), norm, target=0.5)
    # A load has solved it, from the same start.
    assert all(torch.equal(value, real.state_dict()[name]) for name, value in model.state_dict().items())
    scaling.step()
    other.step()
    assert all(torch.equal(value, real.state_dict()[name]) for name, value in model.state_dict().items())


def by_name(name, module):
    return [1.0, 2.0, 4.0, 8.0] if name == "rnn.weight_ih_l0" else 0.3


TARGETS = {
    "number": (0.5, [0.5], [0.5] * 4),
    "rule": ("matrix", [(40 / 70) ** 0.5], [(36 / 10) ** 0.5] * 4),
    "patterns": ({"wide": 0.25, "*": 3.0}, [0.25], [3.0] * 4),
    "function": (by_name, [0.3], [1.0, 2.0, 4.0, 8.0]),
}


@pytest.mark.parametrize(("target", "wide", "rnn"), TARGETS.values(), ids=TARGETS)
def test_targets_that_need_no_values(target, wide, rnn):
    scaling = apply_norm_scaling(model := on_meta(), "frobenius" if target == 0.5 else "spectral", target=target)
    by_reset(model, "")
    scaling.project()
    found = {weight.name: weight.scaling.target.tolist() for weight in scaling.weights}
    assert found["wide"] == pytest.approx(wide)
    assert found["rnn.weight_ih_l0"] == pytest.approx(rnn)
    assert max(map(off_target, scaling.weights)) < 1e-3


def test_features_are_measured_by_a_batch_on_the_meta_device():
    def build():
        return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Flatten(), nn.Linear(72, 5))

    model = on_meta(build)
    scaling = apply_norm_scaling(model, target="features", example_input=torch.randn(1, 3, 8, 8, device="meta"))
    reset(model.to_empty(device="cpu"))
    real = apply_norm_scaling(build(), target="features", example_input=torch.randn(1, 3, 8, 8))
    targets = [{k: v for k, v in one.metrics().items() if k.startswith("target/")} for one in (scaling, real)]
    assert targets[0] == targets[1]


@pytest.mark.parametrize("target", ["initial", Relative(0.5), lambda name, module, norms: norms, None])
def test_a_target_that_needs_a_norm_is_refused(target):
    model = on_meta(lambda: nn.Sequential(nn.Linear(40, 48), nn.Linear(48, 10)))
    text = "weight of '0' is on the meta device and holds no numbers; .* a target that needs none: a number, 'channels'"
    with pytest.raises(ValueError, match=text):
        apply_norm_scaling(model, target=target)
    with pytest.raises(ValueError, match=text.replace("'0'", "'1'")):
        apply_norm_scaling(model, target={"0": 1.0, "1": target or "initial"})
    assert not is_norm_scaled(model)


def test_an_init_is_refused_and_the_call_that_works_is_named():
    model = on_meta(lambda: nn.Sequential(nn.Linear(40, 48)))
    with pytest.raises(ValueError, match=r"leave out init='orthogonal' here, and call orthogonal_init_\(model\) after"):
        apply_norm_scaling(model, init="orthogonal", target=1.0)
    scaling = apply_norm_scaling(model, target=1.0)
    with pytest.raises(ValueError, match="orthogonal_init_: the weight of '0' is on the meta device"):
        orthogonal_init_(model)
    orthogonal_init_(model.to_empty(device="cpu"), gain=0.5)
    assert scaling.metrics()["excess/0"] == pytest.approx(-0.5)


def test_an_optimizer_of_parameters_that_will_be_replaced_is_refused():
    scaling = apply_norm_scaling(model := on_meta(), target=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match="attach: the weight of 'tall' is on the meta device, and to_empty puts another"
    ):
        scaling.attach(optimizer)


@pytest.mark.parametrize("call", ["step", "project", "retarget", "metrics", "audit", "__str__"])
def test_calls_that_need_values_say_so(call):
    scaling = apply_norm_scaling(on_meta(), target=1.0)
    with pytest.raises(ValueError, match=r"the weight of 'tall' is on the meta device.*to_empty"):
        getattr(scaling, call)()


@pytest.mark.parametrize("call", ["step", "project", "retarget", "metrics", "audit", "__str__"])
def test_values_that_are_not_finite_are_named(call):
    scaling = apply_norm_scaling(model := on_meta(), target=1.0)
    by_reset(model, "spectral")
    with torch.no_grad():
        model.wide.weight[0, 0] = torch.nan
    before = [weight.parameter.clone() for weight in scaling.weights]
    with pytest.raises(ValueError, match="the weight of 'wide' holds NaN or infinity"):
        getattr(scaling, call)()
    for weight, own in zip(scaling.weights, before, strict=True):
        torch.testing.assert_close(weight.parameter, own, rtol=0, atol=0, equal_nan=True)
    reset(model)
    scaling.project()


def test_a_part_of_the_model_may_be_there_already():
    model = nn.Sequential(nn.Linear(40, 48), nn.Linear(48, 10, device="meta"))
    scaling = apply_norm_scaling(model, target={"0": "initial", "1": 0.5})
    exact = torch.linalg.matrix_norm(model[0].weight.detach().double(), 2).item()
    model[1].to_empty(device="cpu").reset_parameters()
    metrics = scaling.metrics()
    assert (metrics["target/0"], metrics["target/1"]) == (pytest.approx(exact), 0.5)
    scaling.step()
    assert max(map(off_target, scaling.weights)) < 1e-3


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x)))


@each_norm
def test_tied_weights_that_to_empty_has_untied_are_tied_again(norm):
    scaling = apply_norm_scaling(model := on_meta(Tied), norm, target=0.5)
    assert [weight.name for weight in scaling.weights] == ["first", "head"]
    model.to_empty(device="cpu")
    # As of any model: torch gives each layer memory of its own.
    assert model.second.weight is not model.first.weight
    model.second.weight = model.first.weight
    reset(model)
    scaling.attach(optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 40)).square().mean().backward()
        optimizer.step()
        assert model.second.weight is model.first.weight
        assert max(map(off_target, scaling.weights)) < 1e-3
        assert {one for weight in scaling.weights for one in weight.scaling.target.tolist()} == {0.5}


@each_norm
def test_copies_and_checkpoints_from_before_and_after_the_values(norm):
    apply_norm_scaling(model := on_meta(), norm, target="channels")
    targets = targets_by_channels(norm)
    # A copy on the meta device, and one of memory without values.
    copies = [copy.deepcopy(model)]
    model.to_empty(device="cpu")
    reset(model)
    copies.append(copy.deepcopy(model))
    by_reset(copies[0], norm)
    # A checkpoint of values that nothing has solved yet.
    loaded = initialized()
    apply_norm_scaling(loaded, norm, target=9.0)
    loaded.load_state_dict(copy.deepcopy(model.state_dict()))
    again = on_meta()
    apply_norm_scaling(again, norm, target=9.0)
    again.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    for one in (*copies, loaded, again, model):
        assert_held(one, NormScaler.of(one), CASES[norm], targets, steps=1)
    # A checkpoint of one that has been stepped, bit for bit.
    once_more = on_meta()
    apply_norm_scaling(once_more, norm, target=9.0)
    once_more.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert all(torch.equal(value, once_more.state_dict()[name]) for name, value in model.state_dict().items())


@each_norm
def test_a_load_of_some_layers_leaves_the_others_to_be_solved(norm):
    scaling = apply_norm_scaling(model := on_meta(), norm, target=1.0)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for weight in scaling.weights:
            weight.parameter.fill_(torch.nan)
    part = {name: value for name, value in initialized().state_dict().items() if name.startswith("tall")}
    model.load_state_dict(part, strict=False)
    assert model.tall.parametrizations.weight[0].norm.isfinite().all()
    reset(model)
    model.load_state_dict(part, strict=False)
    scaling.step()
    assert scaling.audit().worst_error < 1e-3


@pytest.mark.parametrize("schedule", [Linear(final=0.5, steps=2), lambda step: 1 - step / 4], ids=["built-in", "own"])
def test_a_schedule_begins_with_the_first_step(schedule):
    scaling = apply_norm_scaling(model := on_meta(), target=2.0, schedule=schedule)
    by_reset(model, "spectral")
    assert scaling.metrics()["target/tall"] == 2.0
    for expected in (1.5, 1.0):
        scaling.step()
        assert scaling.metrics()["target/tall"] == pytest.approx(expected)
        assert max(map(off_target, scaling.weights)) < 1e-3


@pytest.mark.parametrize("to_empty_inside", [False, True])
def test_other_code_works_on_it_inside_plain(to_empty_inside):
    scaling = apply_norm_scaling(model := on_meta(), target={"row": "matrix", "*": 0.5})
    with scaling.plain():
        assert type(model.tall) is nn.Linear
        model.row = nn.Linear(80, 2, device="meta")
        if to_empty_inside:
            model.to_empty(device="cpu")
    if not to_empty_inside:
        model.to_empty(device="cpu")
    reset(model)
    metrics = scaling.metrics()
    assert (metrics["target/tall"], metrics["target/row"]) == (0.5, pytest.approx((2 / 80) ** 0.5))
    scaling.step()
    assert max(map(off_target, scaling.weights)) < 1e-3


def test_another_shape_whose_target_is_relative_is_let_go_inside_plain():
    model = initialized()
    scaling = apply_norm_scaling(model, "frobenius")
    text = "'row' .it is on the meta device in another shape, and its target is relative"
    with pytest.warns(UserWarning, match=text), scaling.plain():
        model.row = nn.Linear(80, 2, device="meta")
    assert "row" not in [weight.name for weight in scaling.weights]


def test_remove_gives_the_plain_model_on_the_meta_device():
    plain = list(on_meta().state_dict())
    scaling = apply_norm_scaling(on_meta(), target=1.0)
    model = scaling.remove()
    assert list(model.state_dict()) == plain
    assert all(parameter.is_meta for parameter in model.parameters())


def test_dtypes_change_there_and_targets_stay_as_they_are():
    scaling = apply_norm_scaling(model := on_meta(), target=0.3)
    model.bfloat16()
    model.to_empty(device="cpu")
    reset(model)
    assert model.tall.weight.dtype == torch.bfloat16
    for weight in scaling.weights:
        assert weight.scaling.target.dtype == torch.float32
        assert (weight.scaling.target == torch.tensor(0.3)).all()
    assert scaling.metrics()["target/tall"] == torch.tensor(0.3).item()
    apply_norm_scaling(model := on_meta(), target=0.3)
    by_reset(model.double(), "spectral")
    NormScaler.of(model).project()
    assert max(map(off_target, NormScaler.of(model).weights)) < 1e-6


@pytest.mark.parametrize("swap", [False, True])
def test_no_warning_comes_on_the_way(swap):
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scaling = apply_norm_scaling(model := on_meta(Tied), target=0.5)
            by_reset(model, "spectral")
            scaling.attach(optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
            for _ in range(2):
                optimizer.zero_grad()
                model(torch.ones(2, 40)).square().mean().backward()
                optimizer.step()
                assert max(map(off_target, scaling.weights)) < 1e-3
            scaling.metrics()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def test_a_compiled_step_asks_for_a_call_before_it():
    scaling = apply_norm_scaling(model := on_meta(lambda: nn.Sequential(nn.Linear(40, 48))), "frobenius", target=0.5)
    reset(model.to_empty(device="cpu"))
    compiled = torch.compile(scaling.step, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"on the meta device and have not been solved since.*scaling.project\(\)"):
        compiled()
    scaling.project()
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    compiled()
    assert max(map(off_target, scaling.weights)) < 1e-3
