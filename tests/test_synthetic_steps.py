"""Steps of an optimizer that move no weight: the scaling moves none either, and what follows is as without them."""

import contextlib
import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from held import off_target
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp

from specscale import apply_norm_scaling, attach, plans, step

NORMS = ("frobenius", "spectral")
each_norm = pytest.mark.parametrize("norm", NORMS)

OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "tensor rate": lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(1e-3), foreach=False),
    "fused": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, fused=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3),
}


@pytest.fixture(scope="module", autouse=True)
def _one_rank(tmp_path_factory):
    # Distributed checkpoints ask for a process group.
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def scaled(norm="spectral", optimizer="adam", target="channels"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 42))
    scaling = apply_norm_scaling(model, norm, init="orthogonal", gain=1.3, target=target)
    made = OPTIMIZERS[optimizer](model.parameters())
    scaling.attach(made)
    return model, scaling, made


def train(model, optimizer, num_steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(torch.randn(8, 40, generator=generator)).square().mean().backward()
        optimizer.step()


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@contextlib.contextmanager
def nothing_moves(model):
    before = copied(model)
    yield
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(("norm", "optimizer"), [("frobenius", "adam"), *(("spectral", one) for one in OPTIMIZERS)])
def test_a_resume_by_distributed_checkpoints_is_bit_exact(norm, optimizer):
    model, _, made = scaled(norm, optimizer)
    train(model, made, 2)
    made.zero_grad()
    state, optimizer_state = copy.deepcopy(dcp.get_state_dict(model, made))
    train(model, made, 2, seed=1)

    calls = {
        "model": lambda model, made: dcp.set_model_state_dict(model, copy.deepcopy(state)),
        "optimizer": lambda model, made: dcp.set_optimizer_state_dict(model, made, copy.deepcopy(optimizer_state)),
        "get": lambda model, made: dcp.get_optimizer_state_dict(model, made),
    }
    orders = list(itertools.permutations(calls))
    # One kind of optimizer in every order, the others in two.
    for order in orders if optimizer == "adam" else orders[1::3]:
        other, _, other_made = scaled(norm, optimizer)
        for name in order:
            untouched = nothing_moves(other) if name != "model" else contextlib.nullcontext()
            with untouched:
                calls[name](other, other_made)
        train(other, other_made, 2, seed=1)
        after = other.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items()), order


@each_norm
@pytest.mark.parametrize("rate", [0, 0.0, torch.tensor(0.0), torch.tensor(0.0, dtype=torch.float64)])
def test_a_rate_of_zero_moves_nothing_and_makes_nothing_stale(norm, rate):
    model, scaling, made = scaled(norm)
    train(model, made, 2)
    made.param_groups[0]["lr"] = rate
    reported = scaling.metrics()
    with nothing_moves(model):
        train(model, made, 5)
    # Without a warning.
    assert scaling.metrics() == reported


@each_norm
def test_a_frozen_group_stays_and_the_others_are_held(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 42))
    scaling = apply_norm_scaling(model, norm, init="orthogonal", gain=1.3, target="channels")
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    made = torch.optim.Adam(groups, lr=1e-3)
    scaling.attach(made)
    frozen = model[0].weight.detach().clone()
    for number in range(10):
        train(model, made, 1, number)
        assert torch.equal(model[0].weight, frozen)
        assert off_target(scaling.weights[1]) < 1e-3
    # A frozen group that is thawed is put on its target.
    made.param_groups[0]["lr"] = 1e-3
    train(model, made, 1)
    assert off_target(scaling.weights[0]) < 1e-3


@each_norm
def test_the_first_step_of_a_warm_up_waits_and_the_second_is_held(norm):
    model, scaling, made = scaled(norm, "sgd")
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda epoch: min(epoch / 4, 1))
    with nothing_moves(model):
        train(model, made, 1)
    for _ in range(3):
        schedule.step()
        train(model, made, 1)
        assert max(map(off_target, scaling.weights)) < 1e-3


@each_norm
def test_without_gradients_nothing_moves_whatever_was_written_before(norm):
    model, _, made = scaled(norm)
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    with nothing_moves(model):
        made.step()
        made.step()


@each_norm
@pytest.mark.parametrize("moved_by", ["momentum", "decay", "an optimizer that clears gradients"])
def test_what_moves_without_a_gradient_of_its_own_is_held(norm, moved_by):
    class Clearing(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.zero_grad()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 42))
    scaling = apply_norm_scaling(model, norm, init="orthogonal")
    momentum, decay = (0.9, 0.0) if moved_by == "momentum" else (0.0, 0.1)
    kind = Clearing if "clears" in moved_by else torch.optim.SGD
    made = kind(model.parameters(), lr=0.1, momentum=momentum, weight_decay=decay)
    scaling.attach(made)
    train(model, made, 1)
    made.zero_grad(set_to_none=False)
    before = model[0].weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    assert not torch.equal(model[0].weight, before) or (norm == "frobenius" and moved_by != "momentum")
    assert max(map(off_target, scaling.weights)) < 1e-3


@each_norm
def test_a_real_step_goes_to_a_target_that_is_not_the_weights_norm(norm):
    model, scaling, made = scaled(norm, "sgd", target=2.5)
    with nothing_moves(model):
        dcp.get_optimizer_state_dict(model, made)
    train(model, made, 1)
    assert max(map(off_target, scaling.weights)) < 1e-3


@each_norm
def test_step_and_project_act_whenever_they_are_called(norm):
    for call in ("step", "project"):
        model, scaling, made = scaled(norm)
        made.param_groups[0]["lr"] = 0.0
        train(model, made, 1)
        getattr(scaling, call)()
        assert max(map(off_target, scaling.weights)) < 1e-3


class TestOnAnAccelerator:
    """Where the host reads nothing: rates and skipped steps are known to the device alone."""

    @pytest.fixture(autouse=True)
    def _reads_nothing(self, monkeypatch):
        monkeypatch.setattr("specscale.linalg.can_sync", lambda tensor: False)

    @staticmethod
    def flags(weights, *numbers):
        return torch.tensor([float(number) for number, _ in zip(numbers, weights, strict=True)])

    @each_norm
    def test_each_weight_is_skipped_by_its_own_number(self, norm):
        model, scaling, _ = scaled(norm)
        weights = scaling.weights
        before = copied(model)
        scaling._step.take(weights, self.flags(weights, 1, 0))
        after = model.state_dict()
        unchanged = {name for name, value in before.items() if torch.equal(value, after[name])}
        assert {name for name in before if name.startswith("0.")} <= unchanged
        assert "2.parametrizations.weight.original" not in unchanged
        with nothing_moves(model):
            scaling._step.take(weights, torch.ones(1))

    def test_a_plan_gives_each_of_its_parts_their_numbers(self):
        weights = scaled()[1].weights
        plan = plans.Plan(weights, by_kernels=False)
        skip = self.flags(weights, 1, 0)
        assert plan.part(None, weights) is None
        assert plan.part(skip, weights) is skip
        assert plan.part(torch.ones(1), weights[1:]).tolist() == [1]
        assert plan.part(skip, weights[1:]).tolist() == [0]
        assert plan.part(skip, weights[::-1]).tolist() == [0, 1]

    @each_norm
    def test_rates_on_the_device_are_read_there(self, norm, monkeypatch):
        class OnDevice(torch.Tensor):
            """A tensor that says that it is not on the CPU."""

            is_cpu = False

        model, scaling, _ = scaled(norm)
        rates = [torch.tensor(rate).as_subclass(OnDevice) for rate in (0.0, 1e-3)]
        groups = [{"params": list(model[i].parameters())} for i in (0, 2)]
        made = torch.optim.SGD(groups, lr=1e-3)
        scaling.detach()
        scaling.attach(made)
        for group, rate in zip(made.param_groups, rates, strict=True):
            group["lr"] = rate
        given = []
        take = step.ScalingStep.take
        monkeypatch.setattr(
            step.ScalingStep, "take", lambda self, weights, skip: given.append(skip) or take(self, weights, skip)
        )
        frozen = model[0].weight.detach().clone()
        train(model, made, 2)
        assert [skip.tolist() for skip in given] == [[1, 0], [1, 0]]
        assert torch.equal(model[0].weight, frozen)
        assert off_target(scaling.weights[1]) < 2e-3
        # One rate for all is one number; a skipped step skips all.
        made.param_groups[0]["lr"] = made.param_groups[1]["lr"]
        train(model, made, 1)
        assert given[-1].tolist() == [0]
        assert attach._skip([rates[1]] * 2, torch.ones(())).tolist() == [1]
        assert attach._skip(rates[::-1], torch.zeros(1)).tolist() == [0, 1]
        assert attach._skip([None, rates[0]], None).tolist() == [0, 1]
        assert attach._skip([None, None], None) is None
