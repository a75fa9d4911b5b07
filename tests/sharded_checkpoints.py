"""What ranks do with checkpoints of sharded models: each function runs on every one of them."""

import copy
import itertools
import math
import threading
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from specscale import apply_norm_scaling, orthogonal_init_, plain_state_dict, schedules
from specscale.shards import is_sharded, whole

NORMS = ("spectral", "frobenius", "schedule")
HOME = "parametrizations.weight.0."
SOLVED_ANEW = ("basis", "other_basis", "age")
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
EVERYWHERE = StateDictOptions(full_state_dict=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)

# torch's own: one process is a group too, and what it says of its formats.
IGNORED = (
    r".*torch\.distributed.* is unavailable or uninitialized",
    "TypedStorage is deprecated",
    "Please use DTensor",
    # In an output layer of a parallel plan.
    "FSDP2-wrapped module .* returned a view tensor",
)


def ignore_torchs_own():
    for text in IGNORED:
        warnings.filterwarnings("ignore", message=text)


def net(seed=0):
    """A tall weight and a wide one that the block solves, and one that it solves from the Gram matrix."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 150), nn.Tanh(), nn.Linear(150, 40), nn.Tanh(), nn.Linear(40, 10))


def scale(model, norm, **options):
    if norm == "schedule":
        return apply_norm_scaling(model, "spectral", schedule=schedules.Linear(0.5, 50), **options)
    return apply_norm_scaling(model, norm, **options)


def shard(model, mesh):
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer, mesh=mesh)


def build(norm, kind="fsdp", *, seed=0, attach=True):
    """A scaled model, whole or sharded: 'whole', 'fsdp', 'hsdp' or 'tp', a parallel plan under fully_shard."""
    model, size = net(seed), dist.get_world_size()
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (size,))
    elif kind != "whole":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("outer", "inner"))
    if kind == "tp":
        parallelize_module(model, mesh["inner"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        mesh = mesh["outer"]
    scaling = scale(model, norm)
    if kind != "whole":
        shard(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if attach:
        scaling.attach(optimizer)
    return model, scaling, optimizer


def train(model, optimizer, steps, *, parts=None):
    """Train on global batches, of which each data-parallel part takes its own; the losses of whole batches."""
    parts = parts or dist.get_world_size()
    part = dist.get_rank() * parts // dist.get_world_size()
    losses = []
    for step in steps:
        x = torch.randn(24, 40, generator=torch.Generator().manual_seed(step)).chunk(parts)[part]
        optimizer.zero_grad()
        loss = (model(x) - x[:, :10].sin()).square().mean()
        loss.backward()
        optimizer.step()
        total = loss.detach() / dist.get_world_size()
        dist.all_reduce(total)
        losses.append(total.item())
    return losses


def values_of(model):
    """What is in the model's state dict, whole."""
    return {name: whole(value.detach()).clone() for name, value in model.state_dict().items()}


def moments_of(model, optimizer):
    """What is in the optimizer's state, whole, by flat names."""
    flat = states.get_optimizer_state_dict(model, optimizer, options=FLAT)
    return {name: whole(value).clone() for name, value in flat.items() if isinstance(value, torch.Tensor)}


def is_equal(one, other):
    """Whether every value is the same; the norms of a weight that has not been solved yet are NaN."""
    same = (torch.allclose(value, other[name], rtol=0, atol=0, equal_nan=True) for name, value in one.items())
    return one.keys() == other.keys() and all(same)


def close(losses, expected):
    return all(math.isclose(one, other, rel_tol=1e-4) for one, other in zip(losses, expected, strict=True))


def known(scaling):
    """The metrics that a checkpoint brings back."""
    metrics = scaling.metrics()
    assert all(map(math.isfinite, metrics.values()))
    return {name: value for name, value in metrics.items() if not name.startswith("drift/")}


def worst_off_target(scaling):
    """How far, relative, the true norms of the whole weights are from their targets."""
    worst = []
    for weight in scaling.weights:
        matrices = weight.scaling.view.matrices(whole(weight.parameter.detach())).double()
        is_frobenius = weight.scaling.constraint.name == "frobenius"
        held = torch.linalg.matrix_norm(matrices)[:, None] if is_frobenius else torch.linalg.svdvals(matrices)
        off = (held / weight.scaling.target.double()[:, None] - 1).abs().min(dim=1).values
        worst.append(off.max().item())
    return max(worst)


def state_of(model, optimizer, **options):
    return dict(zip(("model", "optimizer"), states.get_state_dict(model, optimizer, **options), strict=True))


def put(model, optimizer, state, **options):
    states.set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], **options
    )


def load(model, optimizer, folder, planner=None, **options):
    """As torch's pages have it."""
    state = state_of(model, optimizer, **options)
    dcp.load(state, checkpoint_id=folder, planner=planner)
    put(model, optimizer, state, **options)


def short(folder):
    """One save and one load into another model."""
    ignore_torchs_own()
    model, scaling, optimizer = build("spectral")
    train(model, optimizer, range(2))
    before = values_of(model)
    dcp.save(state_of(model, optimizer), checkpoint_id=folder)
    assert is_equal(before, values_of(model))
    other, other_scaling, made = build("spectral", seed=1)
    load(other, made, folder)
    assert is_equal(before, values_of(other))
    assert known(other_scaling) == known(scaling)
    losses = [train(*one, range(2, 5)) for one in ((model, optimizer), (other, made))]
    return {"losses": losses, "off": worst_off_target(other_scaling)}


def save_and_go_on(folder, kind, parts=None):
    """Train, save, and go on: what a resumed run is to equal."""
    ignore_torchs_own()
    losses = {}
    for norm in NORMS:
        model, _, optimizer = build(norm, kind)
        train(model, optimizer, range(5), parts=parts)
        dcp.save(state_of(model, optimizer), checkpoint_id=folder / norm)
        losses[norm] = train(model, optimizer, range(5, 25), parts=parts)
    return losses


def lacks_a_block(folder):
    """What torch says of a checkpoint of a whole model."""
    ignore_torchs_own()
    model, _, optimizer = build("spectral")
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: model\.2\.\S*other_basis"):
        load(model, optimizer, folder / "spectral")


def load_and_go_on(folder, kind, planner=None, parts=None):
    """Build another model, load, and go on; attached before or after."""
    ignore_torchs_own()
    found = {}
    for norm in NORMS:
        for attached in (False, True):
            model, scaling, optimizer = build(norm, kind, seed=1, attach=attached)
            load(model, optimizer, folder / norm, planner)
            if attached:
                known(scaling)
            else:
                scaling.attach(optimizer)
            losses = train(model, optimizer, range(5, 25), parts=parts)
            found[norm, attached] = {"losses": losses, "off": worst_off_target(scaling)}
    return found


def orders():
    """torch's calls that get and set states, in every order and at every moment: none moves a weight."""
    ignore_torchs_own()
    tried = 0
    for norm in ("spectral", "frobenius"):
        model, scaling, optimizer = build(norm)
        train(model, optimizer, range(2))
        optimizer.zero_grad()
        saved = copy.deepcopy(state_of(model, optimizer))
        values, metrics = values_of(model), known(scaling)
        expected = train(model, optimizer, range(2, 4))
        calls = {
            "set model": lambda model, made, saved: states.set_model_state_dict(model, saved["model"]),
            "set optimizer": lambda model, made, saved: states.set_optimizer_state_dict(
                model, made, saved["optimizer"]
            ),
            "set both": lambda model, made, saved: put(model, made, saved),
            "get model": lambda model, made, saved: states.get_model_state_dict(model),
            "get optimizer": lambda model, made, saved: states.get_optimizer_state_dict(model, made),
            "get both": lambda model, made, saved: states.get_state_dict(model, made),
        }
        sequences = [
            *itertools.permutations(["get optimizer", "set model", "set optimizer"]),
            ("get model", "set optimizer", "get both", "set model"),
            ("get both", "set both", "get both"),
            ("set both",),
        ]
        for sequence, when in itertools.product(sequences, ("loaded, attached", "attached", "attached, stepped")):
            other, other_scaling, made = build(norm, seed=1, attach=when != "loaded, attached")
            if when == "attached, stepped":
                train(other, made, range(7, 8))
                made.zero_grad()
            for name in sequence:
                before = values_of(other)
                calls[name](other, made, copy.deepcopy(saved))
                is_new = name in ("set model", "set both")
                assert is_equal(values_of(other), values if is_new else before), (norm, sequence, when, name)
            if when == "loaded, attached":
                other_scaling.attach(made)
            assert is_equal(values_of(other), values), (norm, sequence, when)
            if when != "loaded, attached":
                # The step that torch takes to make an optimizer's state has written the weights, with nobody looking.
                assert known(other_scaling) == metrics, (norm, sequence, when)
            assert train(other, made, range(2, 4)) == expected, (norm, sequence, when)
            tried += 1
    return tried


def save_beside(state, folder, training):
    """What training gives, while a save waits with its writing until training is over."""
    trained, write = threading.Event(), dcp.FileSystemWriter.write_data

    def write_late(*args):
        trained.wait()
        return write(*args)

    with mock.patch.object(dcp.FileSystemWriter, "write_data", write_late):
        try:
            # In a group of its own, since the training's sums go through the other one meanwhile.
            saving = dcp.async_save(state, checkpoint_id=folder, process_group=dist.new_group(backend="gloo"))
            found = training()
            assert not saving.done()
        finally:
            trained.set()
        saving.result()
    return found


def options(folder):
    """Whole states from all ranks and from the first, flat names of the optimizer's, and a save beside training."""
    ignore_torchs_own()
    model, scaling, optimizer = build("spectral")
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    values, moments, metrics = values_of(model), moments_of(model, optimizer), known(scaling)
    # What is on a CPU already is not copied.
    first = copy.deepcopy(state_of(model, optimizer, options=FULL))
    flat = state_of(model, optimizer, options=FLAT)
    assert not any(isinstance(value, dict) for value in flat["optimizer"].values())
    dcp.save(flat, checkpoint_id=folder / "flat")
    assert is_equal(values_of(model), values)
    box = [first]
    dist.broadcast_object_list(box)
    assert is_equal(box[0]["model"], values)
    assert bool(first["model"]) == bool(first["optimizer"]) == (dist.get_rank() == 0)
    state = state_of(model, optimizer) | {"step": 2}
    expected = save_beside(state, folder / "beside", lambda: train(model, optimizer, range(2, 4)))

    def put_from_first(other, made):
        # torch's `set_state_dict` leaves the model out on the ranks that have no state of it, and hangs on the first.
        given = copy.deepcopy(first)
        states.set_model_state_dict(other, given["model"], options=FROM_FIRST)
        states.set_optimizer_state_dict(other, made, given["optimizer"], options=FROM_FIRST)

    def load_with_step(other, made):
        state = state_of(other, made) | {"step": 0}
        dcp.load(state, checkpoint_id=folder / "beside")
        put(other, made, state)
        assert state["step"] == 2

    ways = {
        "everywhere": lambda other, made: put(other, made, copy.deepcopy(box[0]), options=EVERYWHERE),
        "from first": put_from_first,
        "flat": lambda other, made: load(other, made, folder / "flat", options=FLAT),
        "beside": load_with_step,
    }
    for (way, bring_back), attached in itertools.product(ways.items(), (False, True)):
        other, other_scaling, made = build("spectral", seed=1, attach=attached)
        bring_back(other, made)
        found = values_of(other)
        # Without a call for the state dict before, the block of the wide weight has no place in the model yet.
        is_behind = not attached and way in ("everywhere", "from first")
        anew = {f"2.{HOME}{own}" for own in SOLVED_ANEW if is_behind}
        moved = [own for own in values if own not in anew and not torch.equal(found[own], values[own])]
        assert not moved, (way, attached, moved)
        assert is_equal(moments_of(other, made), moments), (way, attached)
        if not attached:
            other_scaling.attach(made)
        losses = train(other, made, range(2, 4))
        assert losses == expected if not anew else close(losses, expected), (way, attached)
        assert known(other_scaling).keys() == metrics.keys()


def plain(folder):
    """Plain states that come out of a sharded model, and a plain model's that goes in."""
    ignore_torchs_own()
    model, scaling, optimizer = build("spectral")
    train(model, optimizer, range(2))
    sharded = scaling.plain_state_dict()
    assert list(sharded) == list(net().state_dict())
    assert all(map(is_sharded, sharded.values()))
    full = states.get_model_state_dict(model, options=FULL)
    if dist.get_rank() == 0:
        torch.save(full, folder / "full.pt")
        alone = net(seed=2)
        alone.load_state_dict(plain_state_dict(torch.load(folder / "full.pt")), strict=True)
        whole_model, _, _ = build("spectral", "whole", seed=1)
        whole_model.load_state_dict(torch.load(folder / "full.pt"))
    for name, value in sharded.items():
        total = whole(value.detach())
        if dist.get_rank() == 0:
            assert torch.equal(alone.state_dict()[name], total)
    pretrained = net(seed=3).state_dict()
    norms = {name: torch.linalg.matrix_norm(v.double(), 2) for name, v in pretrained.items() if v.ndim == 2}
    found = {}
    for way in ("everywhere", "from first"):
        for attached in (False, True):
            model, scaling, optimizer = build("spectral", attach=attached)
            targets = {name: one for name, one in scaling.metrics().items() if "target/" in name} if attached else {}
            if way == "everywhere":
                states.set_model_state_dict(model, dict(pretrained), options=EVERYWHERE)
            else:
                # The first rank's names must be those of the scaled model.
                own = dict(pretrained)
                for weight in scaling.weights:
                    own[f"{weight.layer}.parametrizations.weight.original"] = own.pop(f"{weight.layer}.weight")
                own = own if dist.get_rank() == 0 else {}
                states.set_model_state_dict(model, own, options=FROM_FIRST)
            loaded = {name: whole(value.detach()) for name, value in scaling.plain_state_dict().items()}
            assert is_equal(loaded, {name: pretrained[name] for name in loaded})
            if not attached:
                scaling.attach(optimizer)
            scaling.retarget()
            metrics = known(scaling)
            for weight in scaling.weights:
                expected = norms[f"{weight.layer}.weight"].item()
                for kind in ("target", "norm"):
                    assert math.isclose(metrics[f"{kind}/{weight.name}"], expected, rel_tol=2e-4), (way, attached)
            assert all(metrics[name] != value for name, value in targets.items())
            train(model, optimizer, range(2))
            found[way, attached] = worst_off_target(scaling)
    return found


def of_a_whole_model():
    """The full state of a whole scaled model, from all ranks or the first: a wide weight's block is not in it."""
    ignore_torchs_own()
    source, source_scaling, made = build("spectral", "whole")
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        source(x).square().mean().backward()
        made.step()
    values = copy.deepcopy(source.state_dict())
    for way, attached in itertools.product((EVERYWHERE, FROM_FIRST), (False, True)):
        model, scaling, optimizer = build("spectral", seed=1, attach=attached)
        has_it = way is EVERYWHERE or dist.get_rank() == 0
        states.set_model_state_dict(model, copy.deepcopy(values) if has_it else {}, options=way)
        assert known(scaling) == known(source_scaling), (way, attached)
        found = values_of(model)
        anew = {f"2.{HOME}{name}" for name in SOLVED_ANEW}
        assert [name for name in values if name not in anew and not torch.equal(found[name], values[name])] == []
        assert not found["2.parametrizations.weight.0.basis"].any()
        if not attached:
            scaling.attach(optimizer)
        train(model, optimizer, range(2))
        assert worst_off_target(scaling) < 1e-3


def from_meta(folder):
    """A model that is built on the meta device, sharded, and loaded."""
    ignore_torchs_own()
    model, _, optimizer = build("spectral")
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    dcp.save(state_of(model, optimizer), checkpoint_id=folder)
    values = values_of(model)
    expected = train(model, optimizer, range(2, 4))
    for attached in (False, True):
        with torch.device("meta"):
            other = net()
        scaling = scale(other, "spectral", target=3.0)
        shard(other, init_device_mesh("cpu", (dist.get_world_size(),)))
        other.to_empty(device="cpu")
        made = torch.optim.AdamW(other.parameters(), lr=3e-3)
        if attached:
            orthogonal_init_(other)
            scaling.attach(made)
        load(other, made, folder)
        assert is_equal(values_of(other), values), attached
        if not attached:
            scaling.attach(made)
        assert train(other, made, range(2, 4)) == expected, attached


def meshes(folder, kind):
    """Save and load under a mesh of two dimensions: every bit comes back."""
    ignore_torchs_own()
    # Under a tensor parallel plan, two ranks have the same data.
    parts = dist.get_world_size() // 2 if kind == "tp" else None
    for norm in ("spectral", "frobenius"):
        model, _, optimizer = build(norm, kind)
        train(model, optimizer, range(2), parts=parts)
        optimizer.zero_grad()
        dcp.save(state_of(model, optimizer), checkpoint_id=folder / norm)
        values = values_of(model)
        expected = train(model, optimizer, range(2, 4), parts=parts)
        other, scaling, made = build(norm, kind, seed=1)
        load(other, made, folder / norm)
        assert is_equal(values_of(other), values), norm
        assert train(other, made, range(2, 4), parts=parts) == expected, norm
        assert worst_off_target(scaling) < 1e-3
