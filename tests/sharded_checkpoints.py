"""What the processes of `test_sharded_checkpoints` do: each function is called in every process of a group."""

import json
import math
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from specscale import apply_norm_scaling, orthogonal_init_, schedules
from specscale.shards import whole

NORMS = ("spectral", "frobenius", "schedule")
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def net(seed=0):
    """A tall weight and a wide one that the block solves, and one that it solves from the Gram matrix."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 150), nn.Tanh(), nn.Linear(150, 40), nn.Tanh(), nn.Linear(40, 10))


def scaled(norm, seed=0):
    model = orthogonal_init_(net(seed))
    if norm == "schedule":
        return model, apply_norm_scaling(model, "spectral", schedule=schedules.Linear(0.5, 50))
    return model, apply_norm_scaling(model, norm)


def mesh_of(kind):
    size = dist.get_world_size()
    if kind == "fsdp":
        return init_device_mesh("cpu", (size,))
    return init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("replicate" if kind == "hsdp" else "shard", "in"))


def build(norm, kind="fsdp", *, seed=0, attach=True):
    """A scaled model, sharded as `kind` says: 'whole', 'fsdp', 'hsdp' or 'tp', which is under fully_shard too."""
    mesh = None if kind == "whole" else mesh_of(kind)
    if kind == "tp":
        # Scaled by what the parallel plan has made of the layers.
        torch.manual_seed(seed)
        model = orthogonal_init_(net(seed))
        parallelize_module(model, mesh["in"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        scaling = apply_norm_scaling(model, "spectral" if norm == "schedule" else norm)
        mesh = mesh["shard"]
    else:
        model, scaling = scaled(norm, seed)
    if mesh is not None:
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if attach:
        scaling.attach(optimizer)
    return model, scaling, optimizer


def train(model, optimizer, steps, *, parts=None, part=None):
    """Train on global batches, of which each data-parallel process takes its part; returns the global losses."""
    parts = parts or dist.get_world_size()
    part = dist.get_rank() if part is None else part
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(24, 40, generator=generator).chunk(parts)[part]
        y = x[:, :10].sin()
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        total = loss.detach() / parts
        if parts > 1:
            dist.all_reduce(total)
        losses.append(total.item())
    return losses


def values_of(model):
    return {name: whole(value.detach()).clone() for name, value in model.state_dict().items()}


def is_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def weights_of(values):
    return {name: value for name, value in values.items() if ".0." not in name}


def tell(**found):
    if dist.get_rank() == 0:
        print(json.dumps(found))


def states(model, optimizer):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def save_and_go_on(folder, kind):
    """Train, save, and go on: what a run that is resumed is to be equal to."""
    losses = {}
    for norm in NORMS:
        model, _, optimizer = build(norm, kind)
        train(model, optimizer, range(5))
        dcp.save(states(model, optimizer), checkpoint_id=f"{folder}/{norm}")
        losses[norm] = train(model, optimizer, range(5, 25))
    tell(losses=losses)


def load_and_go_on(folder, kind):
    """Build another model, load, and go on; before `attach` and after it."""
    losses, drift, off = {}, {}, {}
    for norm in NORMS:
        for attached in (False, True):
            model, scaling, optimizer = build(norm, kind, seed=1, attach=attached)
            found = states(model, optimizer)
            dcp.load(found, checkpoint_id=f"{folder}/{norm}")
            set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
            known = scaling.metrics()
            assert all(math.isfinite(value) for value in known.values())
            if not attached:
                scaling.attach(optimizer)
            now = scaling.metrics()
            drift[norm] = max(abs(now[name] / known[name] - 1) for name in known if name.startswith("norm/"))
            losses[f"{norm}, {attached=}"] = train(model, optimizer, range(5, 25))
            off[norm] = worst_off_target(scaling)
    tell(losses=losses, drift=drift, off=off)


def worst_off_target(scaling):
    """How far, relative, the true norms of the whole weights are from their targets."""
    worst = 0.0
    for weight in scaling.weights:
        matrices = weight.scaling.view.matrices(whole(weight.parameter.detach())).double()
        held = (
            torch.linalg.matrix_norm(matrices)[:, None]
            if weight.scaling.constraint.name == "frobenius"
            else torch.linalg.svdvals(matrices)
        )
        worst = max(worst, (held / weight.scaling.target.double()[:, None] - 1).abs().min(1).values.max().item())
    return worst


def short():
    """One save and one load into another model, in two processes."""
    import tempfile

    folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(folder)
    model, scaling, optimizer = build("spectral")
    train(model, optimizer, range(2))
    before = values_of(model)
    dcp.save(states(model, optimizer), checkpoint_id=folder[0])
    assert is_equal(before, values_of(model))
    other, other_scaling, other_optimizer = build("spectral", seed=1)
    found = states(other, other_optimizer)
    dcp.load(found, checkpoint_id=folder[0])
    set_state_dict(other, other_optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    assert is_equal(before, values_of(other))
    assert other_scaling.metrics() == {
        name: value if not name.startswith("drift/") else other_scaling.metrics()[name]
        for name, value in scaling.metrics().items()
    }
    tell(losses=[train(model, optimizer, range(2, 5)), train(other, other_optimizer, range(2, 5))])
    assert worst_off_target(other_scaling) < 1e-3


if __name__ == "__main__":
    sys.exit("called by test_sharded_checkpoints.py")
