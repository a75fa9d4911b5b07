"""How much a step on sharded weights sends: counted, on the weights of whole blocks, with a process group that does
nothing."""

from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from sharded import reductions
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from specscale import LayerRule, MatrixView, apply_norm_scaling

RULE = LayerRule(lambda name, module: name.endswith("qkv"), {"weight": MatrixView("(k o) i", 3)})


@pytest.fixture(autouse=True)
def _group():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def block(width):
    layers = {"qkv": (width, 3 * width), "proj": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    # A layer with these layers in it: fully_shard takes no mere container.
    return nn.Sequential(OrderedDict({name: nn.Linear(*shape, bias=False) for name, shape in layers.items()}))


def vision_transformer():
    model = block(768)
    model.patches = nn.Conv2d(3, 768, 16, bias=False)
    model.head = nn.Linear(768, 1000, bias=False)
    return model


def gpt():
    return block(2048)


def fsdp(model):
    return apply_norm_scaling(model, target=1.0, rules=[RULE]), lambda: fully_shard(model)


def tensor_parallel(model):
    mesh = init_device_mesh("cpu", (2,))
    plan = {"qkv": ColwiseParallel(), "up": ColwiseParallel(), "proj": RowwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    return apply_norm_scaling(model, target=1.0, rules=[RULE]), lambda: None


@pytest.mark.parametrize(
    ("build", "share", "most"),
    [
        (vision_transformer, fsdp, 0.018),
        pytest.param(gpt, fsdp, 0.0065, marks=pytest.mark.slow),
        pytest.param(gpt, tensor_parallel, 0.0065, marks=pytest.mark.slow),
    ],
)
def test_an_iteration_sends_a_small_part_of_the_weights(build, share, most):
    with torch.device("meta"):
        model = build()
    scaling, wrap = share(model)
    wrap()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    weights = scaling.weights
    for weight in weights:
        weight.scaling.follow_(weight.parameter)
    size = sum(weight.parameter.numel() for weight in weights)
    for num_iterations in (1, 2):
        operands = [weight.scaling.operand(weight.parameter) for weight in weights]
        states = [weight.scaling.init_solver_state(weight.parameter) for weight in weights]
        norm = weights[0].scaling.constraint.norm
        with torch.no_grad(), reductions() as lengths:
            norm.measure(operands, states, num_iterations=num_iterations)
        part = sum(lengths) / num_iterations / size
        print(f"{build.__name__} {share.__name__}: {num_iterations} iterations, {part:.4%} an iteration, {lengths}")
        assert len(lengths) == 2 * num_iterations
        # What a check of nothing would find.
        assert 0.001 < part <= most
