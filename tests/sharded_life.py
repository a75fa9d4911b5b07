"""What befalls a sharded model in training: checks that several processes run together; see `ranks`."""

import copy

import pytest
import torch
import torch.distributed as dist
from sharded import assert_equal_on_all, assert_held, backward, inputs, mesh_of, mlp, sgd, sharded, spectrum, train
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from specscale import NonFiniteWeightError, apply_norm_scaling, orthogonal_init_
from specscale.shards import local, whole


def train_and_assert_held(model, optimizer, scaling):
    """Three steps, after each of which every weight is held, and at the end the same on all ranks."""
    for step in range(3):
        train(model, optimizer, step)
        for weight in scaling.weights:
            assert_held(weight)
    assert_equal_on_all(model)


def trained(norm="spectral", steps=2):
    scaling = sharded("fsdp", model := mlp(), norm)
    optimizer = sgd(model)
    scaling.attach(optimizer)
    for step in range(steps):
        train(model, optimizer, step)
    return model, scaling, optimizer


def weights_of(model):
    return [whole(parameter.detach()).clone() for parameter in model.parameters()]


def assert_same(before, after):
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def a_mixed_precision_policy():
    scaling = apply_norm_scaling(model := mlp(), "spectral")
    fully_shard(model, mesh=mesh_of("fsdp"), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    scaling.attach(optimizer := sgd(model))
    for step in range(3):
        train(model, optimizer, step)
        assert all(weight.parameter.dtype == torch.float32 for weight in scaling.weights)
        assert max(map(assert_held, scaling.weights)) < 1e-3
    assert_equal_on_all(model)


def gradients_accumulated_without_sync():
    model, scaling, optimizer = trained()
    for step in range(4):
        model.set_requires_gradient_sync(step % 2 == 1)
        backward(model, step)
        if step % 2:
            before = weights_of(model)
            optimizer.step()
            optimizer.zero_grad()
            assert not torch.equal(before[0], weights_of(model)[0])
            for weight in scaling.weights:
                assert_held(weight)
    assert_equal_on_all(model)


def a_grad_scaler():
    model, scaling, optimizer = trained()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        optimizer.zero_grad()
        x = inputs(model, step)
        loss = model(x).square().mean() * (torch.inf if step == 1 else 1)
        scaler.scale(loss).backward()
        if step == 2 and dist.get_rank() == 0:
            # In the shard of one process alone: all have to hear of it.
            local(scaling.weights[0].parameter.grad)[0, 0] = torch.inf
        before = weights_of(model)
        scaler.step(optimizer)
        scaler.update()
        assert all(map(torch.equal, before, weights_of(model))) == (step in (1, 2))
        for weight in scaling.weights:
            assert_held(weight)
    assert_equal_on_all(model)


def frozen_weights():
    model = mlp()
    scaling = apply_norm_scaling(model, "spectral")
    model[0].parametrizations.weight.original.requires_grad_(False)
    fully_shard(model, mesh=mesh_of("fsdp"))
    scaling.attach(optimizer := sgd(model, weight_decay=0.1))
    before = weights_of(model)
    for step in range(2):
        train(model, optimizer, step)
    frozen = [number for number, one in enumerate(model.parameters()) if not one.requires_grad]
    after = weights_of(model)
    assert len(frozen) == 1
    assert [torch.equal(one, other) for one, other in zip(before, after, strict=True)].count(True) == 1
    assert torch.equal(before[frozen[0]], after[frozen[0]])
    for weight in scaling.weights:
        assert_held(weight)


def two_optimizers():
    scaling = sharded("fsdp", model := mlp(), {"0": "frobenius", "*": "spectral"})
    one = torch.optim.SGD(model[0].parameters(), lr=0.1, foreach=False)
    two = torch.optim.Adam([p for layer in model[1:] for p in layer.parameters()], lr=0.01, foreach=False)
    scaling.attach(one).attach(two)
    for step in range(3):
        backward(model, step)
        for optimizer in (one, two):
            optimizer.step()
            optimizer.zero_grad()
        for weight in scaling.weights:
            assert_held(weight)
    assert_equal_on_all(model)


def a_model_made_on_the_meta_device():
    with torch.device("meta"):
        model = mlp()
    scaling = apply_norm_scaling(model, "spectral", target="channels")
    fully_shard(model, mesh=mesh_of("fsdp"))
    model.to_empty(device="cpu")
    # Every process draws its own numbers: the first one's are taken.
    torch.manual_seed(dist.get_rank())
    orthogonal_init_(model)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    for weight in scaling.weights:
        m, n = weight.view.matrix_shape(weight.parameter)
        values = spectrum(weight)
        gain = (m / n) ** 0.5
        assert torch.allclose(values, torch.full_like(values, gain), rtol=1e-5)
        assert weight.scaling.target.item() == pytest.approx(gain)
    scaling.attach(optimizer := sgd(model, 0.01))
    train_and_assert_held(model, optimizer, scaling)


def calls_of_the_handle():
    model, scaling, _ = trained()
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).mul_(2)
    targets = [weight.scaling.target.clone() for weight in scaling.weights]
    scaling.project()
    for weight, target in zip(scaling.weights, targets, strict=True):
        assert torch.equal(weight.scaling.target, target)
        assert_held(weight, 1e-5)
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).mul_(3)
    scaling.retarget()
    for weight in scaling.weights:
        assert weight.scaling.target.item() == pytest.approx(spectrum(weight).max().item(), rel=1e-5)
    assert_equal_on_all(model)
    audit = scaling.audit()
    assert audit.worst_error < 1e-4
    assert [one.shape for one in audit.certificates] == [(150, 64), (64, 150), (10, 64), (1, 10)]


def a_report_of_one_rank_alone():
    model, scaling, optimizer = trained()
    if dist.get_rank() == dist.get_world_size() - 1:
        metrics = scaling.metrics()
        assert metrics["norm/0"] == pytest.approx(metrics["target/0"], rel=1e-3)
        assert "150x64" in str(scaling)
    # The others are not behind.
    train(model, optimizer, 3)
    assert_equal_on_all(model)


def nan_in_the_shard_of_one_rank():
    for norm in ("spectral", "frobenius"):
        model, scaling, optimizer = trained(norm)
        train(model, optimizer, 2)
        backward(model, 3)
        if dist.get_rank() == dist.get_world_size() - 1:
            local(scaling.weights[0].parameter)[-1, -1] = torch.nan
        before = [local(parameter).clone() for parameter in model.parameters()]
        buffers = [buffer.clone() for buffer in model.buffers()]
        with pytest.raises(NonFiniteWeightError, match=r"step: the weight of '0' holds NaN or infinity; no weight"):
            scaling.step()
        for one, other in zip(before, model.parameters(), strict=True):
            assert torch.equal(one.nan_to_num(), local(other).nan_to_num())
        assert_same(buffers, list(model.buffers()))
        for call in (scaling.project, scaling.audit, scaling.retarget):
            with pytest.raises(NonFiniteWeightError, match="the weight of '0' holds NaN or infinity"):
                call()
        # Good weights go on.
        if dist.get_rank() == dist.get_world_size() - 1:
            local(scaling.weights[0].parameter)[-1, -1] = 0
        scaling.step()
        for weight in scaling.weights:
            assert_held(weight)
        assert_equal_on_all(model)


def a_forward_pass_without_a_backward_pass():
    model, scaling, _ = trained()
    # The root keeps its weights whole after a forward pass.
    with torch.no_grad():
        model(inputs(model, 0))
    for call in (scaling.step, scaling.project):
        with pytest.raises(ValueError, match=r"the weight of '0' is gathered.*call reshard\(\) of every FSDPModule"):
            call()
    model.reshard()
    scaling.step()
    for weight in scaling.weights:
        assert_held(weight)
    assert_equal_on_all(model)


def several_kinds_of_weights_under_several_norms():
    norms = {"0": "cap", "2": "rows", "4": "normalize", "*": "frobenius"}
    scaling = sharded("fsdp", model := mlp(), norms)
    scaling.attach(optimizer := sgd(model, 0.1))
    train_and_assert_held(model, optimizer, scaling)


def a_layer_sharded_on_its_own_and_the_rest():
    model = mlp()
    twin = copy.deepcopy(model)
    scaling, twins = apply_norm_scaling(model), apply_norm_scaling(twin)
    mesh = mesh_of("fsdp")
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizers = sgd(model), sgd(twin)
    scaling.attach(optimizers[0])
    twins.attach(optimizers[1])
    for step in range(3):
        train(model, optimizers[0], step)
        train(twin, optimizers[1], step)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(whole(one.detach()), other.detach(), rtol=1e-3, atol=1e-5)
    assert_equal_on_all(model)


def weights_that_no_optimizer_has():
    model = mlp()
    scaling = apply_norm_scaling(model, "spectral")
    # Wide: its block changes sides, and has to be solved anew.
    model[2].parametrizations.weight.original.requires_grad_(False)
    fully_shard(model, mesh=mesh_of("fsdp"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, foreach=False)
    scaling.attach(optimizer)
    assert scaling.metrics()["norm/2"] == pytest.approx(scaling.metrics()["target/2"], rel=1e-3)


def sharded_after_they_were_shared():
    scaling = apply_norm_scaling(model := mlp(), {"0": "spectral", "*": "normalize"}).share()
    fully_shard(model, mesh=mesh_of("fsdp"))
    scaling.attach(optimizer := sgd(model))
    with pytest.raises(
        ValueError, match="step: the weight of '0' is sharded, so that every process has work of its own"
    ):
        train(model, optimizer, 0)


def a_change_in_plain_that_one_rank_has():
    scaling = sharded("tp", model := mlp())
    with scaling.plain(), torch.no_grad():
        if dist.get_rank() == 0:
            local(model[0].weight)[0].zero_()
    for weight in scaling.weights:
        assert weight.scaling.norm.item() == pytest.approx(spectrum(weight).max().item(), rel=1e-4)
    assert_equal_on_all(model)


def fewer_shards_after_a_forward_pass():
    if dist.get_world_size() < 4:
        return
    scaling = apply_norm_scaling(model := mlp(), "spectral")
    mesh = mesh_of("fsdp")
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=2)
    fully_shard(model, mesh=mesh)
    scaling.attach(optimizer := sgd(model))
    train(model, optimizer, 0)
    with torch.no_grad():
        model(inputs(model, 0))
    with pytest.raises(ValueError, match="the weight of '0' is gathered"):
        scaling.step()
    scaling.metrics()
    train(model, optimizer, 1)
    for weight in scaling.weights:
        assert_held(weight)


LIFE = [
    a_mixed_precision_policy,
    gradients_accumulated_without_sync,
    a_grad_scaler,
    frozen_weights,
    two_optimizers,
    a_model_made_on_the_meta_device,
    calls_of_the_handle,
    a_report_of_one_rank_alone,
    nan_in_the_shard_of_one_rank,
    a_forward_pass_without_a_backward_pass,
    several_kinds_of_weights_under_several_norms,
    a_layer_sharded_on_its_own_and_the_rest,
    weights_that_no_optimizer_has,
    sharded_after_they_were_shared,
    a_change_in_plain_that_one_rank_has,
    fewer_shards_after_a_forward_pass,
]
