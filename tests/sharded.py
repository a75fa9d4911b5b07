"""Models in the shards of several processes, and the checks that these run; see `ranks`."""

import copy
import functools
from collections import Counter
from contextlib import contextmanager
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from specscale import LayerRule, MatrixView, Relative, apply_norm_scaling
from specscale.constraints import Normalize
from specscale.shards import _place, is_sharded, layout_of, whole

CONSTRAINTS = {name: name for name in ("spectral", "frobenius", "rows", "columns", "cap", "normalize")} | {
    "normalize, one-sided": Normalize(one_sided=True)
}


class RowWise(nn.Sequential):
    """One layer, which tensor parallelism splits along its inputs."""

    plan: ClassVar = {"0": RowwiseParallel(input_layouts=Replicate())}

    def __init__(self, dtype=torch.float32):
        super().__init__(nn.Linear(64, 150, dtype=dtype))


class ColumnWise(nn.Sequential):
    """One layer, which tensor parallelism splits along its outputs."""

    plan: ClassVar = {"0": ColwiseParallel(output_layouts=Replicate())}

    def __init__(self, dtype=torch.float32):
        super().__init__(nn.Linear(64, 150, dtype=dtype))


def plan_of(model):
    return getattr(model, "plan", {"0": ColwiseParallel(), "2": RowwiseParallel()})


class Experts(nn.Module):
    """Four matrices in one tensor."""

    def __init__(self, dtype):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 40, 48, dtype=dtype) / 7)

    def forward(self, x):
        return torch.einsum("bi,kio->bo", x, self.w).tanh()


class Attention(nn.Module):
    """Its query, key and value weights are one tensor of three matrices."""

    def __init__(self, dtype):
        super().__init__()
        self.attention = nn.MultiheadAttention(40, 4, batch_first=True, dtype=dtype)

    def forward(self, x):
        return self.attention(x[:, None], x[:, None], x[:, None], need_weights=False)[0][:, 0]


RULES = [LayerRule(Experts, {"w": MatrixView("k i o", 4)})]


def mlp(dtype=torch.float32):
    """Tall, wide, a head of 10 rows, and one of 1 row, of which most processes have none."""
    layers = nn.Linear(64, 150), nn.ReLU(), nn.Linear(150, 64), nn.Tanh(), nn.Linear(64, 10), nn.Linear(10, 1)
    return nn.Sequential(*layers).to(dtype)


def other_layers(dtype=torch.float32):
    """A fused projection, stacked experts, and convolutions: plain, in groups, and transposed."""
    return nn.Sequential(
        Attention(dtype),
        Experts(dtype),
        nn.Unflatten(1, (3, 4, 4)),
        nn.Conv2d(3, 40, 3, padding=1),
        nn.Conv2d(40, 80, 2),
        nn.Conv2d(80, 80, 2, groups=2),
        nn.ConvTranspose2d(80, 36, 2),
        nn.Flatten(),
        nn.Linear(36 * 9, 1),
    ).to(dtype)


def inputs(model, step):
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    width = 40 if isinstance(model[0], Attention) else 64
    return torch.randn(16, width, generator=generator, dtype=dtype)


def mesh_of(kind):
    world = dist.get_world_size()
    if kind in ("fsdp", "tp"):
        return init_device_mesh("cpu", (world,), mesh_dim_names=(kind,))
    return init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp" if "tp" in kind else "shard"))


def sharded(kind, model, norm="spectral", placement=None, **options):
    """The model, scaled and sharded in the order that is supported, and its handle."""
    mesh = mesh_of(kind)
    if "tp" in kind:
        parallelize_module(model, mesh["tp"], plan_of(model))
    scaling = apply_norm_scaling(model, norm, rules=RULES if _has_experts(model) else (), **options)
    if kind != "tp":
        own = {} if placement is None else {"shard_placement_fn": placement}
        fully_shard(model, mesh=mesh["dp"] if "tp" in kind else mesh, **own)
    return scaling


def _has_experts(model):
    return any(isinstance(module, Experts) for module in model.modules())


def twins(kind, build, norm, dtype=torch.float32, prepare=None, **options):
    """A model, whole in every process, and the same in shards: both with their handles."""
    torch.manual_seed(0)
    model = build(dtype)
    if prepare is not None:
        prepare(model)
    other = copy.deepcopy(model)
    placement = options.pop("placement", None)
    whole_scaling = apply_norm_scaling(model, norm, rules=RULES if _has_experts(model) else (), **options)
    return model, whole_scaling, other, sharded(kind, other, norm, placement, **options)


def sgd(model, lr=0.02, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, foreach=False, **options)


def backward(model, step):
    x = inputs(model, step)
    (model(x) - 1 - x[:, :1]).square().mean().backward()


def train(model, optimizer, step):
    optimizer.zero_grad()
    backward(model, step)
    optimizer.step()


def spectrum(weight):
    """The singular values of the whole weight in float64, by torch.linalg."""
    return torch.linalg.svdvals(weight.view.matrices(whole(weight.parameter.detach())).double())


def assert_held(weight, tolerance=None):
    """That the whole weight is as its constraint says, by torch.linalg in float64."""
    matrices = weight.view.matrices(whole(weight.parameter.detach())).double()
    target = weight.scaling.target.double()
    constraint = weight.scaling.constraint
    name = constraint.name
    if name in ("frobenius", "rows", "columns"):
        off = (torch.linalg.matrix_norm(matrices) / target - 1).abs()
        tolerance = tolerance or 2e-6
    else:
        values = torch.linalg.svdvals(matrices) / target[:, None]
        if name == "spectral":
            off = (values - 1).abs().amin(-1)
        elif name == "cap" or getattr(constraint, "one_sided", False):
            off = values.amax(-1) - 1
        else:
            off = (values.amax(-1) - 1).abs()
        tolerance = tolerance or 1e-3
    assert off.max() <= tolerance, (weight.name, name, off.max().item())
    return off.max().item()


def assert_equal_on_all(model):
    """That all processes hold the same bits in every buffer."""
    flat = torch.cat([buffer.detach().double().reshape(-1) for buffer in model.buffers()])
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    flat = flat.nan_to_num()
    assert all(torch.equal(flat, other.nan_to_num()) for other in others)


def write(parameter, values):
    """Write the whole tensor into a parameter, in whatever shards it is."""
    with torch.no_grad():
        if is_sharded(parameter):
            place = _place(tuple(parameter.shape), parameter.device_mesh, tuple(parameter.placements))
            parameter._local_tensor.copy_(values[place])
        else:
            parameter.copy_(values)


def add_noise_(model, seed, size):
    """Noise of this size relative to each parameter, the same in all processes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        found = whole(parameter.detach())
        noise = torch.randn(found.shape, generator=generator, dtype=found.dtype)
        write(parameter, found + noise * (size * found.square().mean().sqrt()))


def copy_over(source, target):
    """Give every parameter and every buffer of the sharded model to the other one, as far as they fit."""
    for (name, own), other in zip(source.named_parameters(), target.parameters(), strict=True):
        assert own.shape == other.shape, name
        write(other, whole(own.detach()))
    buffers, own_buffers = dict(target.named_buffers()), dict(source.named_buffers())
    for name, other in buffers.items():
        # A block on the other side has another name, and zeros in its own place.
        if not (name.endswith(".basis") and name.replace("basis", "other_basis") in own_buffers):
            other.copy_(own_buffers[name])


def steps_are_those_of_the_whole(kind, build, norm, steps=5, tolerance=1e-5, **options):
    """From equal weights and states every step leaves what the step of the whole weights leaves.

    A weight whose block lies on another side than that of the whole one has another state; its norm is checked.
    """
    if norm == "cap" or getattr(norm, "one_sided", False):
        # So low that it has to act at every step.
        options["target"] = Relative(0.9)
    model, scaling, other, sharding = twins(kind, build, norm, **options)
    optimizers = sgd(model), sgd(other)
    scaling.attach(optimizers[0])
    sharding.attach(optimizers[1])
    sharding.step()
    scaling.detach()
    sharding.detach()
    worst = {}
    for step in range(steps):
        copy_over(other, model)
        train(other, optimizers[1], step)
        # More than such a step of the optimizer moves them.
        add_noise_(other, step, 0.05)
        for own, others in zip(model.parameters(), other.parameters(), strict=True):
            write(own, whole(others.detach()))
        before = [spectrum(weight).amax(-1) for weight in scaling.weights]
        scaling.step()
        sharding.step()
        for one, two, norms in zip(scaling.weights, sharding.weights, before, strict=True):
            assert_held(two)
            mine, theirs = one.parameter.detach(), whole(two.parameter.detach())
            is_comparable = _same_side(two)
            error = (mine - theirs).norm().item() / mine.norm().item()
            if two.scaling.constraint.norm.name == "spectral":
                off = (two.scaling.norm_before.double() / norms - 1).abs().max().item()
                worst["s"] = max(worst.get("s", 0), off)
                worst["s of the whole"] = max(
                    worst.get("s of the whole", 0), (one.scaling.norm_before.double() / norms - 1).abs().max().item()
                )
                assert off <= 1e-3, (one.name, off)
            key = "weight" if is_comparable else "weight on the other side"
            worst[key] = max(worst.get(key, 0), error)
            if is_comparable:
                assert error <= tolerance, (one.name, error)
    assert_equal_on_all(other)
    report(f"{kind} {norm} {build.__name__}", worst)


def _same_side(weight):
    layout = layout_of(weight.parameter, weight.view)
    if layout is None:
        return True
    m, n = layout.shape
    return layout.block_on_rows == (m < n) or weight.scaling.constraint.norm.name != "spectral" or min(m, n) <= 32


def report(what, figures):
    if dist.get_rank() == 0:
        print(f"{what}:", ", ".join(f"{name} {value:.1e}" for name, value in figures.items()), flush=True)


def separate_(model, ratio=0.8):
    """Give every weight singular values that are a geometric series."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            flat = parameter.detach().reshape(len(parameter), -1).double()
            U, S, Vh = torch.linalg.svd(flat, full_matrices=False)
            values = ratio ** torch.arange(len(S), dtype=torch.float64)
            parameter.data.copy_((U * values @ Vh).reshape(parameter.shape))


def float64_stays_with_the_whole(kind, build, norm, steps=50, tolerance=1e-8, **options):
    """In float64 from separated singular values, 50 steps of training end where those of the whole weights end.

    They stay separated: where two values cross, the first one is another's, and errors of any size grow.
    """
    model, scaling, other, sharding = twins(kind, build, norm, torch.float64, separate_, **options)
    starts = [weight.parameter.detach().clone() for weight in scaling.weights]
    optimizers = sgd(model), sgd(other)
    scaling.attach(optimizers[0])
    sharding.attach(optimizers[1])
    for step in range(steps):
        for one, optimizer in zip((model, other), optimizers, strict=True):
            train(one, optimizer, step)
        for weight in sharding.weights:
            assert_held(weight)
    if norm == "cap":
        # How much it lowers is estimated from the block's own residuals, which differ from one block to another.
        tolerance = 1e-5
    worst, moved = {}, []
    for one, two, start in zip(scaling.weights, sharding.weights, starts, strict=True):
        mine, theirs = one.parameter.detach(), whole(two.parameter.detach())
        moved.append((mine - start).norm() / start.norm())
        key = one.name + ("" if _same_side(two) else " (other side)")
        worst[key] = (mine - theirs).norm().item() / mine.norm().item()
    report(f"float64 {kind} {norm}", worst)
    assert_equal_on_all(other)
    assert max(moved) > 0.01, "they have been trained"
    assert max(worst.values()) <= tolerance, worst


@contextmanager
def reductions():
    """The lengths of the buffers that are all-reduced."""
    lengths = []
    real = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        lengths.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        yield lengths
    finally:
        dist.all_reduce = real


def collectives(kind, build, norm, per_iteration, **options):
    """A step gathers nothing, and reduces at most so often in an iteration."""
    scaling = sharded(kind, model := build(), norm, **options)
    optimizer = sgd(model)
    scaling.attach(optimizer)
    for step in range(3):
        backward(model, step)
        # The more they move, the more iterations there are.
        add_noise_(model, step, 0.3 * step)
        with CommDebugMode() as comm, reductions() as lengths:
            optimizer.step()
        counts = Counter({str(name).rpartition(".")[2]: count for name, count in comm.get_comm_counts().items()})
        iterations = max(1, *scaling.num_iterations.values())
        report(f"collectives {kind} {norm}, {iterations} iterations", counts)
        assert set(counts) <= {"allreduce_", "all_reduce"}, counts
        assert counts.total() == len(lengths)
        assert counts.total() <= per_iteration * iterations
    assert_equal_on_all(model)


def check(function, *args, **kwargs):
    return functools.partial(function, *args, **kwargs)


def columns_of(parameter):
    """Sharding along the second dimension, where that divides."""
    if parameter.ndim == 2 and parameter.shape[1] % dist.get_world_size() == 0:
        return Shard(1)
    return None
