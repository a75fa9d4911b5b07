"""Sharded weights, in several processes: the steps are those of whole weights, and nothing is gathered."""

import functools

import pytest
from ranks import outcomes
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
