"""Data-parallel processes that share the scaling step: every bit is as it is where each takes all of it."""

import copy
import itertools

import pytest
import torch
from ranks import on_ranks
from shared_training import (
    NORMS,
    Net,
    all_trained,
    as_on_an_accelerator,
    collectives,
    everything,
    in_small_batches,
    train,
)
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from waits import Refuse

from specscale import SVD, Block, NormScaler, Power, apply_norm_scaling, step
from specscale.sharing import Form, Sharing, _tensors, owners
from specscale.step import _batches, measure_weights

CASES = [("spectral", torch.float32, False), ("mixed", torch.float64, True)]
"""Norm, dtype, and whether to step as on an accelerator."""


@pytest.fixture(autouse=True)
def small_batches():
    with in_small_batches():
        yield


def assert_same(found, expected):
    """Every bit of every weight and buffer at every step, and what is reported."""
    for number, (own, other) in enumerate(zip(found["states"], expected["states"], strict=True)):
        assert own.keys() == other.keys()
        for name in own:
            assert torch.equal(own[name], other[name]), (number, name)
    assert found["metrics"] == expected["metrics"]
    assert found["num_iterations"] == expected["num_iterations"]


def assert_shared(by_rank, costly):
    """All ranks and both ways have the same bits, and each rank has measured some of the weights for the others."""
    first = by_rank[0]["alone"]
    for rank, found in enumerate(by_rank):
        assert_same(found["alone"], first)
        assert_same(found["shared"], first)
        assert found["collectives"] == ["all_gather"]
        for at_step in found["measured"]:
            others = [name for other in by_rank for name in other["measured"][0]]
            assert at_step == by_rank[rank]["measured"][0]
            assert 0 < len(costly & set(at_step)) < len(costly)
            assert all((others.count(name) == 1) == (name in costly) for name in others)


def costly_weights(norm):
    scaling = apply_norm_scaling(Net(), NORMS[norm])
    return {weight.name for weight in scaling.weights if weight.scaling.constraint.name not in ("frobenius", "rows")}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two real processes have seen."""
    return on_ranks(everything, 2, tmp_path_factory.mktemp("ranks"), CASES, 3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_two_ranks_train_as_each_alone_with_one_collective_a_step(case, two_ranks):
    assert_shared([found["trained"][case] for found in two_ranks], costly_weights(case[0]))


@pytest.mark.slow
def test_four_ranks_train_as_each_alone(tmp_path):
    dtypes = itertools.cycle([torch.float32, torch.float32, torch.float64, torch.float64])
    cases = list(zip(NORMS, dtypes, itertools.cycle([False, True]), strict=False))
    by_rank = on_ranks(all_trained, 4, tmp_path, cases, 50, False, timeout=3000)
    for case in cases:
        assert_shared([found[case] for found in by_rank], costly_weights(case[0]))


def test_every_rank_names_a_weight_that_is_not_finite(two_ranks):
    named = "step: the weight of 'narrow' holds NaN or infinity; "
    for found in two_ranks:
        said, written = found["not finite"][False]
        assert [text.startswith(named + "no weight was scaled") for text in said] == [True, True]
        assert written == []
        # An accelerator says so at the next step.
        said, written = found["not finite"][True]
        assert said[0] is None
        assert said[1].startswith(named + "the last step did not scale it")
        assert "narrow.parametrizations.weight.original" not in written
        assert "wide.parametrizations.weight.original" in written


def test_ranks_that_do_not_hold_the_same_are_refused(two_ranks):
    for rank, found in enumerate(two_ranks):
        other = 1 - rank
        advice = "give all processes the same seed, or load the same weights, before apply_norm_scaling"
        differs = f"the weight of '0' or its target is another on rank {other} than on rank {rank}; {advice}"
        assert found["refused"] == {
            "seed": f"share: {differs}",
            "target": f"share: {differs}",
            "weights": f"share: rank {other} has other weights under this scaling than rank {rank}",
            "nothing": None,
        }


@pytest.fixture
def group(tmp_path):
    """A group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def scaled(norm, dtype=torch.float32):
    torch.manual_seed(0)
    model = Net().to(dtype)
    return model, apply_norm_scaling(model, NORMS[norm], init="orthogonal")


def send_to_oneself(scaling):
    """Share as with several processes, where there is one."""
    scaling._step._sharing = Sharing(None, scaling.weights)


def trained_twice(model, scaling):
    """As each process alone would train it, and with everything sent."""
    twin = copy.deepcopy(model)
    send_to_oneself(scaling_of_twin := NormScaler.of(twin))
    alone = train(scaling, model, 2)
    return train(scaling_of_twin, twin, 2), alone


@pytest.mark.parametrize(("norm", "is_accelerator"), [*zip(NORMS, itertools.cycle([False, True]), strict=False)])
def test_what_has_travelled_gives_the_same_bits(norm, is_accelerator, group):
    with as_on_an_accelerator(is_accelerator):
        assert_same(*trained_twice(*scaled(norm, torch.float64 if is_accelerator else torch.float32)))


def test_a_state_of_another_dtype_travels_as_it_is(group):
    model, scaling = scaled("spectral")
    model.attention.parametrizations.in_proj_weight[0].double()
    assert_same(*trained_twice(model, scaling))


def test_project_is_not_shared_since_one_process_alone_may_call_it(group):
    _, scaling = scaled("spectral")
    send_to_oneself(scaling)
    for call, expected in ((scaling.project, []), (scaling.step, ["all_gather"])):
        with collectives() as called:
            call()
        assert called == expected


def test_a_shared_step_on_an_accelerator_does_not_wait(group):
    with as_on_an_accelerator():
        _, scaling = scaled("spectral")
        send_to_oneself(scaling)
        scaling.step()
        with Refuse():
            scaling.step()


@pytest.mark.parametrize("solver", [Block(), Block(width=9), Power(40), Power(5, warm=True), SVD(), None])
def test_the_form_is_that_of_a_measurement(solver):
    """With the order of the axes in memory: products depend on it."""
    model = nn.Sequential(nn.Conv2d(80, 80, 1, groups=2), nn.Conv2d(36, 10, 2), nn.Linear(36, 5), nn.Linear(41, 36))
    norm = "clipped" if solver is None else "cap"
    scaling = apply_norm_scaling(model, norm, init="orthogonal", solver=solver)
    for batch, measurement in measure_weights(scaling.weights):
        for leaf, layout in zip(_tensors(measurement), Form.of(batch).layouts, strict=True):
            assert (layout.size, layout.dtype, layout.device) == (leaf.shape, leaf.dtype, leaf.device)
            there = zip(leaf.shape, layout.stride, torch.empty_like(leaf).stride(), strict=True)
            assert all(own == other for size, own, other in there if size > 1)


def test_batches_go_to_ranks_by_their_cost():
    assert owners([5, 3, 0, 3, 2, 1], 2) == [0, 1, None, 1, 0, 1]
    assert owners([1, 1, 1], 4) == [0, 1, 2]
    # The others would wait for the only one.
    assert owners([0, 7, 0], 2) == [None, None, None]


def test_a_large_model_is_several_batches_where_they_cost_next_to_nothing(monkeypatch):
    model = nn.Sequential(*[nn.Linear(40, 40) for _ in range(6)])
    scaling = apply_norm_scaling(model, {"5": "frobenius", "*": "spectral"}, init="orthogonal")

    def sizes():
        return [len(batch) for batch in _batches(scaling.weights)]

    # By memory: a solver's scratch is more than such a weight, where nothing is free.
    assert sizes() == [1, 1, 1, 1, 1, 1]
    with monkeypatch.context() as usual:
        usual.setattr(step, "FREE_SCRATCH", 2**18)
        assert sizes() == [5, 1]
    monkeypatch.setattr("specscale.norms.SpectralNormBySolver.scratch_elements", lambda *args: 1)
    assert sizes() == [5, 1]
    monkeypatch.setattr(step, "MOST_OPERATIONS", 2 * 96 * 40 * 40)
    assert sizes() == [2, 2, 1, 1]
    with as_on_an_accelerator():
        assert sizes() == [5, 1]


def test_a_group_of_one_process_changes_nothing(group):
    _, scaling = scaled("spectral")
    assert scaling.share() is scaling
    assert scaling.share(distributed.group.WORLD)._step._sharing is None


def test_share_says_what_it_needs(tmp_path):
    model, scaling = scaled("spectral")
    with pytest.raises(
        ValueError,
        match=r"^share: torch.distributed is not initialized; call torch.distributed.init_process_group in every",
    ):
        scaling.share()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"^share: this process is not in the process group; call share in the "):
            scaling.share(distributed.GroupMember.NON_GROUP_MEMBER)
        with pytest.raises(TypeError, match=r"^share: expected a torch.distributed.ProcessGroup, found str$"):
            scaling.share("gloo")
        chain = model.wide.parametrizations.weight
        chain.original = nn.Parameter(distribute_tensor(chain.original, init_device_mesh("cpu", (1,))))
        with pytest.raises(ValueError, match=r"^share: the weight of 'wide' is sharded.*work of its own"):
            scaling.share()
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("shares_first", [True, False])
def test_a_step_with_a_collective_is_not_captured(shares_first, group, monkeypatch):
    monkeypatch.setattr(step, "capture_blocker", lambda parameters: None)
    monkeypatch.setattr(step.CapturedSteps, "take", lambda *args: pytest.fail("it was to be captured"))
    _, scaling = scaled("spectral")
    sharing = Sharing(None, scaling.weights)
    sharing.num_ranks = 2
    monkeypatch.setattr(step, "Sharing", lambda group, weights: sharing)
    calls = [scaling.share, scaling.capture]
    first, second = calls if shares_first else reversed(calls)
    first()
    with pytest.warns(
        UserWarning, match=r"^capture: no CUDA graph, since 2 processes share the step, and a graph"
    ) as found:
        second()
    assert found[0].filename == __file__
    sharing.num_ranks = 1
    with as_on_an_accelerator():
        scaling.step()


def test_what_is_not_shared_is_captured(group, monkeypatch):
    monkeypatch.setattr(step, "capture_blocker", lambda parameters: None)
    captured = []
    monkeypatch.setattr(step.CapturedSteps, "take", lambda self, *args: captured.append(args) or [])
    model = nn.Linear(40, 40)
    scaling = apply_norm_scaling(model, "frobenius")
    send_to_oneself(scaling)
    scaling.capture()
    with as_on_an_accelerator():
        scaling.step()
    assert len(captured) == 1
