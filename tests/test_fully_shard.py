"""Sharded weights, in several processes: the steps are those of whole weights, and nothing is gathered."""

import functools
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks, outcomes
from sharded import (
    CONSTRAINTS,
    ColumnWise,
    RowWise,
    check,
    collectives,
    columns_of,
    float64_stays_with_the_whole,
    mlp,
    other_layers,
    steps_are_those_of_the_whole,
)
from sharded_life import LIFE
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from specscale import apply_norm_scaling, measure


def equal(kind, build, names=CONSTRAINTS, **options):
    return {
        f"{kind}, {build.__name__}, {name}": check(
            steps_are_those_of_the_whole, kind, build, CONSTRAINTS[name], **options
        )
        for name in names
    }


def in_float64(kind, names=CONSTRAINTS, **options):
    return {
        f"{kind}, float64, {name}": check(float64_stays_with_the_whole, kind, mlp, CONSTRAINTS[name], **options)
        for name in names
    }


def counted(kind, per_iteration, names=("spectral", "frobenius", "cap"), build=mlp):
    return {
        f"{kind}, {build.__name__}, collectives, {name}": check(
            collectives, kind, build, CONSTRAINTS[name], per_iteration
        )
        for name in names
    }


LIVES = {function.__name__.replace("_", " "): function for function in LIFE}

# The one-sided one ends on the same target here.
NORMS = [name for name in CONSTRAINTS if name != "normalize"]
LONGER = {"frozen weights", "two optimizers", "several kinds of weights under several norms"}
"""What only the slow tests run."""

DEFAULT = (
    equal("fsdp", mlp, NORMS, steps=2)
    | counted("fsdp", 2, ["spectral"])
    | in_float64("fsdp", ["spectral"], steps=10)
    | {name: LIVES[name] for name in LIVES if name not in LONGER}
)

SLOW = {
    (2, "fsdp"): equal("fsdp", mlp, steps=10) | in_float64("fsdp") | counted("fsdp", 2),
    (2, "other layers"): equal("fsdp", other_layers),
    (2, "columns"): equal("fsdp", mlp, placement=columns_of),
    (2, "tp"): equal("tp", mlp) | in_float64("tp") | counted("tp", 2),
    (4, "fsdp"): equal("fsdp", mlp) | in_float64("fsdp") | counted("fsdp", 2) | LIVES,
    (4, "other layers"): equal("fsdp", other_layers),
    (4, "hsdp"): equal("hsdp", mlp) | in_float64("hsdp") | counted("hsdp", 2) | equal("hsdp", other_layers),
    (4, "tp and fsdp"): equal("tpfsdp", mlp)
    | in_float64("tpfsdp")
    | counted("tpfsdp", 4, build=RowWise)
    | counted("tpfsdp", 2, build=ColumnWise)
    | equal("tpfsdp", RowWise)
    | equal("tpfsdp", ColumnWise)
    | counted("tpfsdp", 5),
}


@functools.cache
def started(world, group):
    return outcomes(world, DEFAULT if group is None else SLOW[world, group])


@pytest.mark.parametrize("name", DEFAULT)
def test_on_two_processes(name):
    error = started(2, None)[name]
    assert error is None, error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "group", "name"), [(*start, name) for start, checks in SLOW.items() for name in checks]
)
def test_on_several_processes(world, group, name):
    error = started(world, group)[name]
    assert error is None, error


ALONE = {
    "audit": lambda model, scaling: scaling.audit(),
    "measure": lambda model, scaling: measure(model),
    "step": lambda model, scaling: scaling.step(),
    "metrics": lambda model, scaling: scaling.metrics(),
    "print": lambda model, scaling: str(scaling),
}


def called_on_one_rank():
    """What each call raises that the first of the processes makes alone, while the others wait for it elsewhere."""
    found = {}
    for name, call in ALONE.items():
        group = dist.new_group(timeout=timedelta(seconds=3))
        torch.manual_seed(0)
        scaling = apply_norm_scaling(model := mlp())
        # By its name: torch takes meshes of the same ranks for one mesh, and so the first one's group.
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu", mesh_dim_names=(name,)))
        scaling.attach(optimizer := torch.optim.SGD(model.parameters()))
        found[name] = None
        if dist.get_rank() == 0:
            try:
                call(model, scaling)
            except RuntimeError as error:
                found[name] = str(error)
        dist.barrier()
        del optimizer
    return found


@pytest.mark.slow
def test_one_rank_alone_waits_for_the_others_until_the_group_gives_up(tmp_path):
    found, others = on_ranks(called_on_one_rank, 2, tmp_path)
    assert set(others.values()) == {None}
    for name in ("audit", "measure", "step"):
        assert "Timed out waiting 3000ms for recv operation to complete" in found[name]
    assert found["metrics"] is found["print"] is None
