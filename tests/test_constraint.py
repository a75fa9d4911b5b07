"""The constraint, after every optimizer step, and what a step must not do."""

import copy

import pytest
import torch
from held import off_target, saved
from torch import nn

from specscale import SVD, Block, NonFiniteWeightError, NormScaler, Power, apply_norm_scaling
from specscale.constraints import CONSTRAINTS, Constraint, Spectral
from specscale.norms import SpectralNormBySolver

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
}

LEAN = [("sgd", torch.contiguous_format), ("adam", torch.channels_last), ("fused", torch.channels_last)]
WAYS = [
    pytest.param(
        make,
        memory_format,
        id=f"{name}-{memory_format}",
        marks=() if (name, memory_format) in LEAN else pytest.mark.slow,
    )
    for name, make in OPTIMIZERS.items()
    for memory_format in (torch.contiguous_format, torch.channels_last)
]
each_way = pytest.mark.parametrize(("make", "memory_format"), WAYS)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)
        self.up = nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.qkv = nn.Linear(150, 180)
        self.wide = nn.Linear(180, 70)
        self.head = nn.Linear(70, 1)

    def forward(self, x):
        x = self.up(self.grouped(self.conv(x).relu()).relu()).relu()
        return self.head(self.wide(self.qkv(x.flatten(1).relu())).relu())


def net(memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    return Net().to(memory_format=memory_format)


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 3, 8, 8, generator=generator)
        optimizer.zero_grad()
        (model(x) - x.sum((1, 2, 3))[:, None]).square().mean().backward()
        optimizer.step()
        yield


def matrices(weight):
    return weight.scaling.view.matrices(weight.parameter.detach()).double()


@each_way
def test_frobenius_norms_are_on_target_after_every_step(make, memory_format):
    model = net(memory_format)
    scaling = apply_norm_scaling(model, "frobenius", init="orthogonal")
    optimizer = make(model.parameters())
    scaling.attach(optimizer)
    for _ in train(model, optimizer, 10):
        for weight in scaling.weights:
            norm = torch.linalg.matrix_norm(matrices(weight))
            assert ((norm / weight.scaling.target - 1).abs() <= 1e-5).all(), weight.name


@each_way
@pytest.mark.parametrize("solver", ["block", "svd"])
def test_the_spectral_norm_is_the_larger_of_target_and_second_value(make, solver, memory_format):
    model = net(memory_format)
    scaling = apply_norm_scaling(model, "spectral", init="orthogonal", solver=solver)
    optimizer = make(model.parameters())
    before = {}
    optimizer.register_step_post_hook(
        lambda *_: before.update({w.name: torch.linalg.svdvals(matrices(w)) for w in scaling.weights})
    )
    scaling.attach(optimizer)
    tolerance = 1e-5 if solver == "svd" else 1e-3
    for _ in train(model, optimizer, 10):
        metrics = scaling.metrics()
        for weight in scaling.weights:
            old, new = before[weight.name], torch.linalg.svdvals(matrices(weight))
            target = weight.scaling.target.double()
            expected = torch.cat([target[:, None], old[:, 1:]], dim=1).sort(descending=True).values
            scale = expected[:, :1]
            assert ((new - expected).abs() <= tolerance * scale).all(), weight.name
            assert metrics[f"norm/{weight.name}"] == pytest.approx(new[:, 0].max().item(), rel=10 * tolerance)


@each_way
def test_clipping_brings_down_every_value_above_the_target_and_no_other(make, memory_format):
    model = net(memory_format)
    scaling = apply_norm_scaling(model, "clipped", init="orthogonal")
    optimizer = make(model.parameters())
    before = {}
    optimizer.register_step_post_hook(
        lambda *_: before.update({w.name: torch.linalg.svd(matrices(w), full_matrices=False) for w in scaling.weights})
    )
    scaling.attach(optimizer)
    for _ in train(model, optimizer, 10):
        for weight in scaling.weights:
            left, values, right = before[weight.name]
            target = weight.scaling.target.double()[:, None]
            values = torch.cat([target, torch.minimum(values[:, 1:], target)], dim=1)
            expected = left @ torch.diag_embed(values) @ right
            distance = torch.linalg.matrix_norm(matrices(weight) - expected, 2)
            assert (distance <= 1e-5 * target[:, 0]).all(), weight.name
            assert (torch.linalg.matrix_norm(matrices(weight), 2) <= target[:, 0] * (1 + 1e-5)).all(), weight.name
            assert torch.equal(weight.scaling.norm, weight.scaling.target)


def test_the_svd_step_moves_the_first_triple_alone():
    weight = torch.randn(40, 60)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    model = nn.Sequential(nn.Linear(60, 40))
    model[0].weight.data.copy_(weight)
    apply_norm_scaling(model, solver=SVD(), target=1.5).step()
    after = model[0].weight.detach().double()
    assert (left[:, 0] @ after @ right[0]).item() == pytest.approx(1.5, rel=1e-5)
    rest = torch.linalg.svdvals(after - 1.5 * torch.outer(left[:, 0], right[0]))[: len(values) - 1]
    torch.testing.assert_close(rest, values[1:], rtol=1e-5, atol=0)


def test_block_and_svd_walk_the_same_way():
    ends = []
    for solver in ("block", "svd"):
        model = net()
        generator = torch.Generator().manual_seed(3)
        scaling = apply_norm_scaling(model, init="orthogonal", solver=solver, generator=generator)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        scaling.attach(optimizer)
        for _ in train(model, optimizer, 5):
            pass
        ends.append({n: value for n, value in scaling.metrics().items() if not n.startswith(("residual/", "error/"))})
    assert ends[0] == pytest.approx(ends[1], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("norm", ["frobenius", "spectral", "clipped"])
def test_a_non_finite_weight_stops_the_step_before_anything_is_written(norm):
    model = net()
    scaling = apply_norm_scaling(model, norm, target=0.5)
    model.head.weight.data[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteWeightError, match="step: the weight of 'head' holds NaN or infinity"):
        scaling.step()
    assert all(torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in model.state_dict().items())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("norm", ["frobenius", "spectral", "clipped"])
def test_a_step_that_the_grad_scaler_skips_moves_nothing(norm, fused):
    model = net()
    scaling = apply_norm_scaling(model, norm, target=0.5)
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    scaling.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    before = copy.deepcopy(scaling.plain_state_dict())
    scaler.scale(model(torch.randn(2, 3, 8, 8)).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(value, before[name]) for name, value in scaling.plain_state_dict().items())


def test_the_handle_tells_the_iterations_of_the_last_step():
    model = net()
    taken = {}
    power = Power(num_iterations=30)
    for norm, solver in (("frobenius", "block"), ("spectral", power), ("clipped", "block"), ("spectral", "block")):
        scaling = apply_norm_scaling(model, norm, solver=solver)
        assert scaling.num_iterations == {}
        scaling.step()
        taken[norm, solver] = scaling.num_iterations
        scaling.remove()
    names = ["conv", "grouped", "up", "qkv", "wide", "head"]
    assert all(sorted(found) == sorted(names) for found in taken.values())
    assert set(taken["frobenius", "block"].values()) == set(taken["clipped", "block"].values()) == {0}
    assert set(taken["spectral", power].values()) == {30}
    assert {name for name, count in taken["spectral", "block"].items() if count} == {"qkv", "wide"}


def test_each_optimizer_scales_what_it_owns_and_has_stepped():
    model = net()
    scaling = apply_norm_scaling(model, "frobenius", target=0.5)
    first = torch.optim.SGD([*model.conv.parameters(), *model.up.parameters()], lr=0.1)
    scaling.attach(first)
    head = model.head.weight.clone()
    model.conv(torch.randn(1, 3, 8, 8)).sum().backward()
    up = model.up.weight.clone()
    with pytest.warns(UserWarning, match="4 of 6 weights are in no attached optimizer"):
        first.step()
    assert model.conv.weight.norm().item() == pytest.approx(0.5, rel=1e-5)
    assert torch.equal(model.up.weight, up), "no gradient, no step, no scaling"
    assert torch.equal(model.head.weight, head)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_one_handle_holds_weights_on_two_devices(norm):
    model = net()
    model.wide.cuda()
    scaling = apply_norm_scaling(model, norm, target=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
    scaling.attach(optimizer)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        assert max(map(off_target, scaling.weights)) < 1e-3
    before = [parameter.clone() for parameter in model.parameters()]
    scaling._step.take(scaling.weights, torch.ones(1, device="cuda"))
    assert all(map(torch.equal, before, model.parameters()))
    assert len(scaling.metrics()) == 6 * len(scaling.weights)


def test_attach_refuses_what_would_not_work():
    from timm.optim import Lookahead

    model = net()
    scaling = apply_norm_scaling(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="Lookahead never calls step hooks; call scaling"):
        scaling.attach(Lookahead(optimizer))
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer, found Net"):
        scaling.attach(model)
    with pytest.raises(ValueError, match="SGD owns none of the scaled weights"):
        scaling.attach(torch.optim.SGD(net().parameters(), lr=0.1))
    scaling.attach(optimizer)
    head, model.head = model.head, nn.Identity()
    for handle in (scaling, NormScaler.of(model), NormScaler.of(head)):
        with pytest.raises(ValueError, match="SGD is attached already; a second hook would scale twice"):
            handle.attach(optimizer)


def test_the_handle_is_rebuilt_from_the_model_and_lets_go():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaling = apply_norm_scaling(model, target=0.5).attach(optimizer)
    scaling.step()
    assert NormScaler.of(model).metrics() == scaling.metrics()
    assert "conv" in str(scaling)
    assert "target=0.5" in repr(model)
    scaling.remove()
    for _ in train(model, optimizer, 1):
        pass
    assert scaling.metrics() == {}


def test_who_forgets_to_attach_is_told():
    model = net()
    scaling = apply_norm_scaling(model)
    optimizer = torch.optim.SGD([*model.head.parameters(), *model.qkv.parameters()], lr=0.1)
    for _ in train(model, optimizer, 1):
        pass
    for call in (scaling.metrics, lambda: str(scaling)):
        with pytest.warns(
            UserWarning, match="the weight of 'qkv', 'head' has changed since it was last scaled.*attach"
        ) as caught:
            call()
        assert caught[0].filename == __file__
    scaling.step()
    scaling.metrics()
    for name in ("conv", "grouped", "up", "wide"):
        getattr(model, name).requires_grad_(False)
    scaling.attach(optimizer)
    for _ in train(model, optimizer, 1):
        scaling.metrics()
    NormScaler.of(copy.deepcopy(model)).metrics()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.double()
    scaling.metrics()


class Normalized(Constraint):
    """`W <- W t / ||W||`."""

    name = "normalized"
    norm_type = SpectralNormBySolver

    def write_(self, weights, measurement, target, skip_mask):
        factors = torch.where(skip_mask, 1, target / measurement.norm).split([len(weight) for weight in weights])
        for weight, factor in zip(weights, factors, strict=True):
            weight.tensor.mul_(weight.per_matrix(factor))


def test_a_new_constraint_is_one_class_and_one_entry(monkeypatch):
    monkeypatch.setitem(CONSTRAINTS, Normalized.name, Normalized)
    model = net()
    scaling = apply_norm_scaling(model, "normalized", init="orthogonal")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaling.attach(optimizer)
    for _ in train(model, optimizer, 10):
        for weight in scaling.weights:
            norm = torch.linalg.matrix_norm(matrices(weight), 2)
            torch.testing.assert_close(norm, weight.scaling.target.double(), rtol=1e-3, atol=0)
    other = apply_norm_scaling(loaded := net(), "normalized")
    loaded.load_state_dict(model.state_dict())
    assert saved(other.metrics()) == saved(scaling.metrics())
    assert "normalized, target=" in repr(model)


def test_a_constraint_keeps_its_own_solver_unless_the_call_names_one():
    for solver, expected in ((None, Block(width=8)), ("svd", SVD()), (Block(), Block())):
        scaling = apply_norm_scaling(nn.Linear(40, 50), Spectral(solver=Block(width=8)), solver=solver)
        assert scaling.weights[0].scaling.constraint.norm.solver == expected
    assert apply_norm_scaling(nn.Linear(40, 50)).weights[0].scaling.constraint.norm.solver == Block()
