"""Schedules of targets: the exact target after every step, whatever happens between steps."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreted import interpreted_grouped
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from waits import Refuse

from specscale import NormScaler, Relative, apply_norm_scaling, schedules
from specscale.advance import Advance


def cosine(initial, final, steps):
    return lambda n: final + (initial - final) * (1 + math.cos(math.pi * min(n / steps, 1))) / 2


SCHEDULES = {
    "constant": (schedules.Constant(0.5), lambda n: 0.5),
    "linear": (schedules.Linear(final=0.1, steps=7), lambda n: 1 - 0.9 * min(n / 7, 1)),
    "warm-up": (schedules.Linear(final=1.0, steps=4, initial=0.2), lambda n: 0.2 + 0.8 * min(n / 4, 1)),
    "cosine": (schedules.Cosine(final=0.3, steps=5), cosine(1, 0.3, 5)),
    "own": (lambda step: 0.9**step, lambda n: 0.9**n),
}
each_schedule = pytest.mark.parametrize("name", SCHEDULES)


@pytest.fixture(params=["cpu", "accelerator"])
def way(request, monkeypatch):
    """A step as on a CPU, and as on an accelerator, which the host must not read."""
    if request.param == "accelerator":
        monkeypatch.setattr("specscale.linalg.can_sync", lambda tensor: False)
    return request.param


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setattr("specscale.linalg.can_sync", lambda tensor: False)


def net(dtype=torch.float32):
    torch.manual_seed(0)
    layers = {"qkv": nn.Linear(6, 18), "mid": nn.Linear(18, 40), "head": nn.Linear(40, 3)}
    return nn.ModuleDict(layers).to(dtype)


def scaled(schedule, norm="frobenius", dtype=torch.float32, **options):
    model = net(dtype)
    scaling = apply_norm_scaling(model, norm, schedule=schedule, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaling.attach(optimizer)
    return model, scaling, optimizer


def gradients(model, seed, without=()):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        is_left_out = any(name.startswith(one) for one in without)
        parameter.grad = None if is_left_out else torch.randn(parameter.shape, generator=generator).to(parameter)


def train(model, optimizer, start, end, **options):
    for step in range(start, end):
        gradients(model, step, **options)
        optimizer.step()


def held(weight):
    matrices = weight.scaling.view.matrices(weight.parameter.detach()).double()
    if weight.scaling.constraint.name == "frobenius":
        return torch.linalg.matrix_norm(matrices)
    # The first singular value is put on the target: where it then is the second, another one is the norm.
    values, target = torch.linalg.svdvals(matrices), weight.scaling.target.double()[:, None]
    return values.gather(1, (values - target).abs().argmin(1, keepdim=True))[:, 0]


def bases(scaling):
    return {weight.name: weight.scaling.target.double().clone() for weight in scaling.weights}


def assert_at(scaling, base, factor, rtol=1e-6):
    for weight in scaling.weights:
        exact = base[weight.name] * (factor[weight.name] if isinstance(factor, dict) else factor)
        torch.testing.assert_close(weight.scaling.target.double(), exact, rtol=rtol, atol=0)
        slack = 1 if weight.scaling.constraint.name == "frobenius" else 1e3
        torch.testing.assert_close(held(weight), exact, rtol=slack * rtol, atol=0)


@each_schedule
@pytest.mark.parametrize(
    ("norm", "dtype", "rtol"),
    [("frobenius", torch.float64, 1e-12), ("frobenius", torch.float32, 1e-6), ("spectral", torch.float32, 1e-6)],
)
def test_targets_are_exact_after_every_step(name, norm, dtype, rtol, way):
    schedule, factor = SCHEDULES[name]
    base = bases(apply_norm_scaling(net(dtype), norm, target=Relative(0.8)))
    model, scaling, optimizer = scaled(schedule, norm, dtype, target=Relative(0.8))
    for weight in scaling.weights:
        torch.testing.assert_close(weight.scaling.target.double(), factor(0) * base[weight.name], rtol=rtol, atol=0)
    for step in range(9):
        train(model, optimizer, step, step + 1)
        assert_at(scaling, base, factor(step + 1), rtol)
        for weight in scaling.weights:
            assert weight.scaling.num_steps.tolist() == [step + 1] * weight.scaling.view.count


@given(
    initial=st.floats(1e-3, 1e3), final=st.floats(1e-3, 1e3), steps=st.integers(1, 10**6), part=st.floats(0, 2)
)  # fmt: skip
def test_the_factors_are_those_of_the_formulas(initial, final, steps, part):
    step = round(part * steps)
    time = min(step / steps, 1)
    linear, curved = schedules.Linear(final, steps, initial), schedules.Cosine(final, steps, initial)
    assert linear(step) == pytest.approx(initial + (final - initial) * time, rel=1e-9)
    assert curved(step) == pytest.approx(cosine(initial, final, steps)(step), rel=1e-9)
    for one in (linear, curved):
        assert (one(0), one(steps), one(3 * steps)) == (initial, final, final)
        in_float32 = one.factors(torch.tensor([float(step)])).item()
        assert in_float32 == pytest.approx(one(step), rel=1e-5, abs=1e-6 * max(initial, final))


def test_schedules_by_pattern_in_one_handle(way):
    model, scaling, optimizer = scaled(
        {"qkv": SCHEDULES["own"][0], "mid": schedules.Linear(0.5, 4), "*": schedules.Constant()}
    )
    base = bases(scaling)
    for step in range(5):
        train(model, optimizer, step, step + 1)
        factors = {"qkv": 0.9 ** (step + 1), "mid": 1 - 0.5 * min((step + 1) / 4, 1), "head": 1}
        assert_at(scaling, base, factors)


@each_schedule
def test_a_resumed_run_is_bit_equal_to_one_that_went_on(name, way, tmp_path):
    # The spectral solver's number of iterations on an accelerator is planned from what the handle has found.
    schedule, norm = SCHEDULES[name][0], "spectral" if way == "cpu" else "frobenius"
    model, _, optimizer = scaled(schedule, norm)
    train(model, optimizer, 0, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    train(model, optimizer, 3, 6)

    resumed, _, its_optimizer = scaled(schedule, norm)
    # The steps before the load are forgotten.
    train(resumed, its_optimizer, 7, 9)
    saved = torch.load(tmp_path / "saved.pt")
    assert all(value.is_floating_point() for value in saved["model"].values())
    resumed.load_state_dict(saved["model"])
    its_optimizer.load_state_dict(saved["optimizer"])
    train(resumed, its_optimizer, 3, 6)
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["cosine", "own"])
def test_skipped_steps_do_not_count_and_move_nothing(name, way):
    schedule, factor = SCHEDULES[name]
    model, scaling, optimizer = scaled(schedule)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    scaling.detach()
    scaling.attach(optimizer)
    base = bases(scaling)
    train(model, optimizer, 0, 2)

    def nothing_moves(step):
        before = copy.deepcopy(model.state_dict())
        step()
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)

    optimizer.param_groups[0]["lr"] = 0.0
    nothing_moves(lambda: train(model, optimizer, 2, 3))
    optimizer.param_groups[0]["lr"] = 1e-2
    # What GradScaler gives a fused optimizer, which then skips by itself.
    for found_inf, count in ((1.0, 2), (1.0, 2), (0.0, 3), (1.0, 3), (0.0, 4)):
        optimizer.found_inf = torch.tensor(found_inf)
        if found_inf:
            nothing_moves(lambda: train(model, optimizer, 2, 3))
        else:
            train(model, optimizer, 2, 3)
        assert_at(scaling, base, factor(count))
    del optimizer.found_inf
    train(model, optimizer, 5, 6)
    assert_at(scaling, base, factor(5))


@pytest.mark.parametrize("name", ["cosine", "own"])
def test_a_weight_counts_its_own_steps(name, way):
    schedule, factor = SCHEDULES[name]
    model, scaling, optimizer = scaled(schedule)
    base = bases(scaling)
    optimizer.zero_grad()
    train(model, optimizer, 0, 2)
    train(model, optimizer, 2, 4, without=["mid"])
    assert_at(scaling, base, {"qkv": factor(4), "mid": factor(2), "head": factor(4)})
    train(model, optimizer, 4, 5)
    assert_at(scaling, base, {"qkv": factor(5), "mid": factor(3), "head": factor(5)})
    # The handle's own step counts; a projection does not.
    scaling.step()
    assert_at(scaling, base, {"qkv": factor(6), "mid": factor(4), "head": factor(6)})
    with torch.no_grad():
        model["mid"].weight.mul_(3)
    scaling.project()
    assert_at(scaling, base, {"qkv": factor(6), "mid": factor(4), "head": factor(6)})


@pytest.mark.parametrize("name", ["cosine", "own"])
def test_a_scheduled_step_does_not_wait(name, accelerator):
    schedule, factor = SCHEDULES[name]
    _, scaling, _ = scaled(schedule)
    base = bases(scaling)
    skip = torch.tensor([0.0, 1.0, 0.0])
    scaling.step()
    for _ in range(2):
        with Refuse():
            scaling.step()
    with Refuse():
        scaling._step.take(scaling.weights, skip)
    assert_at(scaling, base, {"qkv": factor(4), "mid": factor(3), "head": factor(4)})
    # A real copy to the host is read there, by an item of a tensor that this device has too.
    scaling.step()
    assert_at(scaling, base, {"qkv": factor(5), "mid": factor(4), "head": factor(5)})


class Count(TorchDispatchMode):
    """Counts the operations that launch something: views do not."""

    def __init__(self):
        super().__init__()
        self.num_launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_launches += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("skip", [None, torch.zeros(1)], ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_launches_do_not_grow_with_the_weights(name, skip):
    counts = []
    for depth in (2, 9):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)))
        weights = apply_norm_scaling(model, "frobenius", schedule=SCHEDULES[name][0]).weights
        addresses = [weight.scaling.target.data_ptr() for weight in weights]
        with Count() as count:
            Advance().advance_(weights, skip)
        counts.append(count.num_launches - (name == "own") * depth)
        assert [weight.scaling.target.data_ptr() for weight in weights] == addresses
    assert counts[0] == counts[1] <= 20


@pytest.mark.slow
def test_a_compiled_step_follows_a_schedule_without_compiling_anew():
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 3))
    scaling = apply_norm_scaling(model, "frobenius", schedule=SCHEDULES["cosine"][0])
    base = bases(scaling)
    step = torch.compile(scaling.step, fullgraph=True, backend="aot_eager")
    for count in range(4):
        with torch.compiler.set_stance("fail_on_recompile" if count else "default"):
            step()
        assert_at(scaling, base, SCHEDULES["cosine"][1](count + 1), rtol=1e-5)


@pytest.mark.slow
def test_an_own_function_is_not_compiled_in():
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(9, 8))
    scaling = apply_norm_scaling(model, "frobenius", schedule=SCHEDULES["own"][0])
    base = bases(scaling)
    with pytest.raises(Exception, match="is asked on the host, which a compiled step"):
        torch.compile(scaling.step, fullgraph=True, backend="aot_eager")()
    # Without `fullgraph`, the compiler leaves it to Python, and may warn of what it finds on the way.
    warnings.simplefilter("ignore")
    step = torch.compile(scaling.step, backend="aot_eager")
    for count in range(3):
        step()
        assert_at(scaling, base, SCHEDULES["own"][1](count + 1))


def test_a_checkpoint_of_a_schedule_without_one_holds_what_was_in_force():
    source, scaling, optimizer = scaled(schedules.Linear(0.5, 4))
    train(source, optimizer, 0, 2)
    model, plain_scaling, its_optimizer = scaled(None)
    text = (
        "load_state_dict: the checkpoint's targets followed a schedule, which the model was not given: they stay as "
        "they were at its last step. To go on, give apply_norm_scaling the schedule before loading"
    )
    with pytest.warns(UserWarning, match="schedule") as said:
        model.load_state_dict(source.state_dict())
    assert [str(one.message) for one in said] == [text]
    assert said[0].filename == __file__
    assert bases(plain_scaling).keys() == bases(scaling).keys()
    in_force = bases(scaling)
    train(model, its_optimizer, 2, 4)
    assert_at(plain_scaling, in_force, 1)
    assert not any(key.endswith(("base_target", "num_steps")) for key in model.state_dict())


def test_a_checkpoint_of_another_solver_brings_its_schedule():
    options = {"schedule": schedules.Linear(0.5, 4), "norm": "spectral"}
    wide = [nn.Sequential(nn.Linear(50, 40)) for _ in range(2)]
    source = apply_norm_scaling(wide[0], solver="svd", **options)
    scaling = apply_norm_scaling(wide[1], **options)
    source.step()
    source.step()
    base = {name: target / 0.75 for name, target in bases(source).items()}
    wide[1].load_state_dict(wide[0].state_dict())
    scaling.step()
    assert_at(scaling, base, 1 - 0.5 * 3 / 4)


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_without_a_schedule_begins_one(assign):
    source, scaling, _ = scaled(None)
    base = bases(scaling)
    model, its_scaling, optimizer = scaled(schedules.Linear(0.5, 4, initial=0.9), target=1.0)
    train(model, optimizer, 0, 2)
    model.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
    its_scaling.detach()
    its_scaling.attach(optimizer := torch.optim.Adam(model.parameters()))
    for weight in its_scaling.weights:
        torch.testing.assert_close(weight.scaling.target.double(), 0.9 * base[weight.name], rtol=1e-6, atol=0)
    for step in range(2):
        train(model, optimizer, step, step + 1)
        assert_at(its_scaling, base, 0.9 - 0.1 * (step + 1))


def test_a_plain_checkpoint_keeps_the_schedule_where_it_is():
    model, scaling, optimizer = scaled(schedules.Linear(0.5, 4))
    base = bases(scaling)
    train(model, optimizer, 0, 2)
    model.load_state_dict(net().state_dict())
    train(model, optimizer, 2, 3)
    assert_at(scaling, base, 1 - 0.5 * 3 / 4)
    assert not any("base_target" in key or "num_steps" in key for key in scaling.plain_state_dict())


@pytest.mark.parametrize("name", ["cosine", "own"])
def test_a_copy_goes_on_with_the_schedule_and_its_handle_too(name, way):
    schedule, factor = SCHEDULES[name]
    model, scaling, optimizer = scaled(schedule)
    base = bases(scaling)
    train(model, optimizer, 0, 2)
    copied = copy.deepcopy(model)
    other = NormScaler.of(copied)
    assert all(weight.scaling.schedule is schedule for weight in other.weights)
    other.step()
    assert_at(other, base, factor(3))
    for weight in scaling.weights:
        assert weight.scaling.num_steps[0] == 2


@pytest.mark.parametrize("name", ["cosine", "own"])
def test_retargeting_goes_on_from_the_norms_that_are_there(name):
    schedule, factor = SCHEDULES[name]
    model, scaling, optimizer = scaled(schedule)
    train(model, optimizer, 0, 2)
    with torch.no_grad():
        for weight in scaling.weights:
            weight.parameter.mul_(3)
    now = {weight.name: held(weight) for weight in scaling.weights}
    scaling.retarget()
    assert_at(scaling, now, 1)
    train(model, optimizer, 2, 3)
    assert_at(scaling, now, factor(3) / factor(2))


@pytest.mark.parametrize("name", ["cosine", "own"])
def test_a_plain_while_changes_nothing_and_new_shapes_go_on_at_the_same_step(name):
    schedule, factor = SCHEDULES[name]
    model, scaling, optimizer = scaled(schedule, target={"head": 2.0, "mid": "matrix", "*": Relative(0.5)})
    base = bases(scaling)
    train(model, optimizer, 0, 2)
    before = copy.deepcopy(model.state_dict())
    with scaling.plain():
        pass
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    scaling.detach()
    with scaling.plain():
        model["mid"].double()
    scaling.attach(optimizer := torch.optim.Adam(model.parameters(), lr=1e-2))
    train(model, optimizer, 2, 3)
    assert_at(scaling, base, factor(3))
    scaling.detach()
    with scaling.plain():
        model["qkv"], model["head"] = nn.Linear(6, 36), nn.Linear(40, 5)
    now = {weight.name: held(weight) for weight in scaling.weights}
    now["head"], now["mid"] = torch.tensor([2 * factor(3)]).double(), factor(3) * base["mid"]
    now["qkv"] *= 0.5
    scaling.project()
    assert_at(scaling, now, 1)
    scaling.step()
    assert_at(scaling, now, factor(4) / factor(3))


def test_a_pattern_may_have_no_schedule():
    _, scaling, _ = scaled({"head": schedules.Linear(0.5, 2), "*": None})
    before = {weight.name: weight.scaling.target.clone() for weight in scaling.weights}
    scaling.step()
    for weight in scaling.weights:
        factor = 0.75 if weight.name == "head" else 1
        torch.testing.assert_close(weight.scaling.target, factor * before[weight.name])


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: scaled(0.5), TypeError,
         "apply_norm_scaling: schedule takes a function of the step, such as schedules.Cosine(final=0.1, steps=1000) "
         "or lambda step: 0.999**step, found float"),
        (lambda: scaled(schedules.Cosine), TypeError, "apply_norm_scaling: schedule takes a function of the step"),
        (lambda: scaled({"qkv": schedules.Constant()}), ValueError,
         "apply_norm_scaling: no pattern of schedule matches 'mid', 'head'; add '*': None for the rest"),
        (lambda: scaled(lambda step: -1.0), ValueError,
         "apply_norm_scaling: schedule must be finite and positive at step 0, found -1.0"),
        (lambda: scaled(lambda step: "a"), TypeError,
         "apply_norm_scaling: schedule must be a number at step 0, found str"),
        (lambda: schedules.Constant(0), ValueError, "Constant: factor must be finite and positive, found 0.0"),
        (lambda: schedules.Linear(0.0, 5), ValueError, "Linear: final must be finite and positive, found 0.0"),
        (lambda: schedules.Cosine(0.5, 5, initial=math.inf), ValueError,
         "Cosine: initial must be finite and positive, found inf"),
        (lambda: schedules.Cosine(0.5, 0), ValueError, "Cosine: steps must be a positive integer, found 0"),
        (lambda: schedules.Linear(0.5, 2.5), ValueError, "Linear: steps must be a positive integer, found 2.5"),
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_named(make, error, text):
    with pytest.raises(error) as raised:
        make()
    assert str(raised.value).startswith(text)


def test_a_factor_that_is_not_positive_names_the_step_and_nothing_is_written(way):
    model, scaling, optimizer = scaled(lambda step: math.nan if step == 3 else 1.0)
    train(model, optimizer, 0, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="step: schedule must be finite and positive at step 3, found nan"):
        scaling.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_what_an_own_function_raises_passes_through_with_the_step():
    _, scaling, _ = scaled(lambda step: [1.0, 0.5][step])
    scaling.step()
    with pytest.raises(IndexError) as raised:
        scaling.step()
    assert raised.value.__notes__ == ["raised by the schedule at step 2"]


def test_a_zero_matrix_stays_left_alone():
    model = net()
    with torch.no_grad():
        model["qkv"].weight[:6] = 0
    with pytest.warns(UserWarning, match="holds a zero matrix"):
        scaling = apply_norm_scaling(model, "frobenius", schedule=schedules.Linear(0.5, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaling.step()
    assert scaling.weights[0].scaling.target[0] == 0
    assert not model["qkv"].weight[:6].any()


def test_kernels_read_the_targets_that_are_in_force(accelerator, monkeypatch):
    schedule, factor = SCHEDULES["cosine"]
    with interpreted_grouped() as grouped:
        monkeypatch.setattr("specscale.plans._has_kernels", lambda device: True)
        monkeypatch.setattr("specscale.plans._grouped", lambda: grouped)
        model, scaling, optimizer = scaled(schedule)
        base = bases(scaling)
        for step in range(3):
            train(model, optimizer, step, step + 1)
            assert_at(scaling, base, factor(step + 1))
    ((_, plan),) = scaling._step._plans._plans
    assert plan.groups
    assert not plan.rest


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
@pytest.mark.parametrize("name", ["cosine", "own"])
def test_replayed_steps_follow_the_schedule(name, norm):
    schedule, factor = SCHEDULES[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(90, 80), nn.Linear(80, 70)).cuda()
    scaling = apply_norm_scaling(model, norm, schedule=schedule).capture()
    base = {key: value.cpu() for key, value in bases(scaling).items()}
    for step in range(8):
        scaling.step()
        for weight in scaling.weights:
            exact = base[weight.name] * factor(step + 1)
            torch.testing.assert_close(weight.scaling.target.double().cpu(), exact, rtol=1e-6, atol=0)
            torch.testing.assert_close(held(weight).cpu(), exact, rtol=1e-3, atol=0)
    graphs = [graph for _, plan in scaling._step._plans._plans for graph in plan.graphs.values()]
    assert any(graph is not None for graph in graphs), "something was replayed"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_a_graph_around_the_step_follows_a_built_in_schedule(norm):
    schedule, factor = SCHEDULES["cosine"]
    model = nn.Sequential(nn.Linear(90, 80), nn.Linear(80, 70)).cuda()
    scaling = apply_norm_scaling(model, norm, schedule=schedule)
    base = {key: value.cpu() for key, value in bases(scaling).items()}
    tolerance = 1e-6 if norm == "frobenius" else 1e-3

    def check(step):
        for weight in scaling.weights:
            exact = base[weight.name] * factor(step)
            torch.testing.assert_close(held(weight).cpu(), exact, rtol=tolerance, atol=0)

    scaling.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scaling.step()
    for step in range(1, 6):
        graph.replay()
        check(step + 1)
    # Steps without the graph go on from it.
    for step in range(6, 8):
        scaling.step()
        check(step + 1)
    scaling.metrics()
