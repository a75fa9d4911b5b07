"""What an accelerator's step must not do, on the code that it runs, which a CPU can run too."""

from dataclasses import replace

import pytest
import torch
from held import off_target
from test_constraint import matrices, net, train
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from waits import Refuse

from lib.clock import Clock
from lib.datasets import Preprocessing, load_data
from lib.distributed import Processes
from lib.presets import digits
from lib.survival import Stop
from specscale import NonFiniteWeightError, NormScaler, apply_norm_scaling
from specscale.block import Block
from specscale.pending import PendingCopies
from train import train_epoch


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setattr("specscale.linalg.can_sync", lambda tensor: False)


@pytest.mark.parametrize("look", [lambda x: x.sum().item(), lambda x: x[x > 0], torch.linalg.svdvals, torch.linalg.qr])
def test_the_guard_sees_what_it_is_for(look):
    with pytest.raises(AssertionError), Refuse():
        look(torch.randn(3, 3))


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_no_step_waits_and_every_step_holds(norm, accelerator):
    model = net()
    scaling = apply_norm_scaling(model, norm, init="orthogonal")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in train(model, optimizer, 10):
        with Refuse():
            scaling.step()
        metrics = scaling.metrics()
        for weight in scaling.weights:
            exact = torch.linalg.matrix_norm(matrices(weight), "fro" if norm == "frobenius" else 2).max().item()
            # Under spectral scaling, a second singular value above the target is estimated, from below.
            below = 1e-5 if norm == "frobenius" else 0.05
            assert exact * (1 - below) <= metrics[f"norm/{weight.name}"] <= exact * (1 + 1e-5)
            assert exact >= weight.scaling.target.max().item() * (1 - 1e-5)


class RefuseFloat64(TorchDispatchMode):
    """Raises where a tensor of a step is float64, which MPS does not have."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                raise AssertionError(f"{func} in float64")
        return out


@pytest.mark.parametrize("norm", ["frobenius", "spectral", "normalize", "orthogonal"])
def test_a_device_without_float64_is_asked_for_none(norm, accelerator, monkeypatch):
    monkeypatch.setattr("specscale.linalg.has_float64", lambda device: False)
    with pytest.raises(AssertionError, match="in float64"), RefuseFloat64():
        torch.zeros(1).double()
    with RefuseFloat64():
        model = net()
        scaling = apply_norm_scaling(model, norm, init="orthogonal")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaling.attach(optimizer)
        for _ in train(model, optimizer, 3):
            pass
    # What is reported in float64 is computed on the CPU.
    assert scaling.audit().worst_error < 1e-2
    assert "excess" in str(scaling)
    for weight in scaling.weights:
        assert off_target(weight) < 2e-3, weight.name


@pytest.mark.parametrize("norm", ["frobenius", "spectral", "normalize", "orthogonal"])
def test_a_non_finite_weight_is_held_on_the_device_and_named_a_step_later(norm, accelerator):
    model = net()
    scaling = apply_norm_scaling(model, norm, target=0.5)
    scaling.step()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    before = model.wide.weight.detach().clone()
    before[0, 0] = float("inf")
    with torch.no_grad():
        model.wide.weight.copy_(before)
    with Refuse():
        scaling.step()
    assert torch.equal(model.wide.weight, before)
    with pytest.raises(NonFiniteWeightError, match="metrics: the weight of 'wide' holds NaN or infinity"):
        scaling.metrics()
    with pytest.raises(NonFiniteWeightError, match="step: the weight of 'wide' holds NaN or infinity"):
        scaling.step()
    for name, value in model.named_buffers():
        told = name.endswith((".norm", ".norm_before", ".residual", ".error", ".age"))
        assert told or "wide" not in name or torch.equal(value, buffers[name]), name
    assert scaling.weights[0].parameter.isfinite().all()
    # It is said once: good weights can be gone on with.
    with torch.no_grad():
        model.wide.weight.normal_()
    for _ in range(2):
        scaling.step()
    scaling.metrics()


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_the_host_reads_nothing_of_a_step_in_a_graph_of_the_users(norm, accelerator, monkeypatch):
    """Neither may it wait meanwhile for the step before, nor later for an event that the graph has recorded."""
    model = net()
    scaling = apply_norm_scaling(model, norm)
    scaling.step()
    ((_, plan),) = scaling._step._plans._plans
    launched = plan.num_iterations
    # More than have been launched would be compiled during the capture.
    monkeypatch.setattr(Block, "next_num_iterations", lambda *known: 7)
    calls = []
    for name in ("__init__", "read"):
        own = getattr(PendingCopies, name)
        monkeypatch.setattr(PendingCopies, name, lambda *args, name=name, own=own: calls.append(name) or own(*args))
    with monkeypatch.context() as capturing:
        for module in ("step", "plans", "advance"):
            capturing.setattr(f"specscale.{module}.is_capturing", lambda: True)
        scaling.step()
    assert calls == []
    assert plan.num_iterations == launched
    scaling.step()
    assert set(plan.num_iterations.values()) == {7 if norm == "spectral" else None}
    assert calls == ["read", "__init__"]


def test_two_optimizers_of_two_norms_share_a_handle(accelerator):
    model = net()
    apply_norm_scaling(model, "frobenius", include=["conv", "grouped", "up"])
    apply_norm_scaling(model, "spectral", exclude=["conv", "grouped", "up"])
    scaling = NormScaler.of(model)
    parts = [model.conv, model.wide]
    for layer in (model.grouped, model.up, model.qkv, model.head):
        layer.requires_grad_(False)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]
    for optimizer in optimizers:
        scaling.attach(optimizer)
    for _ in range(3):
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    for part in parts:
        handle = part.parametrizations.weight[0]
        values = torch.linalg.svdvals(part.weight.detach().flatten(1).double())
        held = values.square().sum().sqrt() if part is model.conv else values
        assert (held / handle.target - 1).abs().min() < 1e-3


def test_the_pace_follows_the_step_before(accelerator, monkeypatch):
    model = net()
    scaling = apply_norm_scaling(model, init="orthogonal")
    planned, needed = [], []
    choose = Block.next_num_iterations
    monkeypatch.setattr(Block, "next_num_iterations", lambda *known: planned.append(choose(*known)) or planned[-1])
    for size in (0.0, 0.0, 0.3, 0.3, 0.3, *[0.0] * 8):
        for weight in scaling.weights:
            with torch.no_grad():
                weight.parameter.add_(size * torch.randn_like(weight.parameter) / weight.parameter.shape[0] ** 0.5)
        scaling.step()
        needed.append(max(scaling.num_iterations.values(), default=0))
    assert planned[0] == 2
    assert max(planned) > max(needed), "an error that is too large asks for more than one further iteration"
    assert max(planned) > 3
    # `needed` is of the step before.
    assert planned[-1] == needed[-1] + 1 < max(planned), "and a small one for one more than was needed"


def test_the_pace_is_that_of_the_weights_that_step(accelerator):
    """Optimizers that share a handle step in turn."""
    model = net()
    scaling = apply_norm_scaling(model, init="orthogonal")
    fast, *slow = sorted(scaling.weights, key=lambda weight: -min(weight.view.matrix_shape(weight.parameter)))
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for weights, size in (([fast], 0.2), (slow, 1e-4)):
            for weight in weights:
                noise = torch.randn(weight.parameter.shape, generator=generator)
                with torch.no_grad():
                    weight.parameter.add_(size * noise / noise.shape[0] ** 0.5)
            scaling._step.take(weights)
    counts = scaling.num_iterations
    assert len(counts) == len(scaling.weights)
    assert counts[fast.name] > 2 >= max(counts[weight.name] for weight in slow)


def test_the_training_loop_of_the_recipe_waits_once_an_epoch(monkeypatch):
    reads = []
    for name in ("tolist", "item", "cpu", "numpy"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda tensor, *_, name=name, read=read: reads.append(name) or read(tensor)
        )
    processes = Processes(0, 1, torch.device("cpu"))
    config = replace(digits(), limit_train=640)
    data = load_data(config, processes).to(processes.device)
    data.augment = True
    data.train.tensors = (torch.nn.functional.pad(data.train.tensors[0], [12] * 4), *data.train.tensors[1:])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 10))
    # As on a GPU: the loop over tensors reads the number of steps on a CPU.
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    preprocessing = Preprocessing(data, processes.device, torch.contiguous_format)
    clock = Clock(processes.device)
    with Refuse():
        train_epoch(config, model, optimizer, preprocessing, processes, 1, clock, "", Stop(processes))
    assert len(clock.take_ms()) == 5
    assert reads == ["tolist"]
