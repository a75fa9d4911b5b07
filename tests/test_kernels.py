"""The CUDA kernels: each step against its twin in torch operations, what they compile to, and how many are launched.

Without a GPU, Triton's interpreter runs them on the CPU, and Triton compiles them for GPUs that are not there.
"""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from held import off_target
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from lib.scaling_checks import refuse_to_wait
from specscale import LayerRule, MatrixView, NonFiniteWeightError, apply_norm_scaling, plans, step
from specscale.block import Block
from specscale.constraints import Cap, Normalize
from specscale.random import keys, signs
from specscale.weights import find_weights

triton = pytest.importorskip("triton")

from interpreted import interpreted_grouped  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from specscale import grouped, kernels  # noqa: E402

# NumPy warns where a GPU computes NaN and infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
cuda = pytest.mark.cuda
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# What is stepped.


class Experts(nn.Module):
    def __init__(self, count, inputs, outputs, **kind):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, inputs, outputs, **kind))


def with_weight(layer, weight):
    layer.weight = nn.Parameter(weight)
    return layer


def in_flat_buffer(outputs, inputs, **kind):
    """A linear layer whose weight starts 1 element behind an aligned address."""
    flat = torch.empty(outputs * inputs + 1, **kind)
    return with_weight(nn.Linear(inputs, outputs, bias=False, **kind), flat[1:].view(outputs, inputs))


def strided(outputs, inputs, **kind):
    every_other = torch.empty(outputs, 2 * inputs, **kind)[:, ::2]
    return with_weight(nn.Linear(inputs, outputs, bias=False, **kind), every_other)


LAST = torch.channels_last
LAYERS = {
    "rows contiguous": lambda **kind: nn.Linear(96, 160, **kind),
    "wide": lambda **kind: nn.Linear(160, 96, **kind),
    "columns contiguous": lambda **kind: with_weight(nn.Linear(64, 96, **kind), torch.empty(64, 96, **kind).T),
    "odd": lambda **kind: nn.Linear(75, 70, **kind),
    "odd and wide": lambda **kind: nn.Linear(131, 37, **kind),
    "300 x 200": lambda **kind: nn.Linear(200, 300, **kind),
    "long": lambda **kind: nn.Linear(40, 1100, **kind),
    "flat": lambda **kind: in_flat_buffer(64, 96, **kind),
    "strided": lambda **kind: strided(70, 50, **kind),
    "1 x 1": lambda **kind: nn.Linear(1, 1, **kind),
    "row": lambda **kind: nn.Linear(7, 1, **kind),
    "column": lambda **kind: nn.Linear(1, 70, **kind),
    "small": lambda **kind: nn.Linear(20, 5, **kind),
    "32 columns": lambda **kind: nn.Linear(32, 64, **kind),
    "20 rows": lambda **kind: nn.Linear(48, 20, **kind),
    "conv": lambda **kind: nn.Conv2d(16, 40, 3, **kind),
    "first conv": lambda **kind: nn.Conv2d(3, 64, 3, **kind).to(memory_format=LAST),
    "large first conv": lambda **kind: nn.Conv2d(3, 64, 7, **kind).to(memory_format=LAST),
    "tall channels_last": lambda **kind: nn.Conv2d(5, 64, 3, **kind).to(memory_format=LAST),
    "channels_last": lambda **kind: nn.Conv2d(16, 40, 3, **kind).to(memory_format=LAST),
    "groups": lambda **kind: nn.Conv2d(16, 80, 3, groups=2, **kind),
    "groups channels_last": lambda **kind: nn.Conv2d(16, 80, 3, groups=2, **kind).to(memory_format=LAST),
    "transposed": lambda **kind: nn.ConvTranspose2d(8, 36, 3, **kind),
    "transposed channels_last": lambda **kind: nn.ConvTranspose2d(8, 36, 3, **kind).to(memory_format=LAST),
    "conv3d": lambda **kind: nn.Conv3d(4, 36, 3, **kind).to(memory_format=torch.channels_last_3d),
    "qkv": lambda **kind: nn.MultiheadAttention(40, 4, **kind),
    "experts": lambda **kind: Experts(3, 36, 44, **kind),
    "heads": lambda **kind: nn.Linear(40, 4 * 3 * 12, **kind),
    "wide heads": lambda **kind: nn.Linear(52, 4 * 3 * 10, **kind),
}
RULES = [
    LayerRule(Experts, {"weight": MatrixView("k i o", count=3)}),
    LayerRule(lambda name, module: name.endswith("heads"), {"weight": MatrixView("(o1 k o2) i", 3, lengths={"o1": 4})}),
]


def net(names, dtype=torch.float32, device="cpu"):
    """The layers, with singular values that lie apart: 1, 0.94, 0.88 and so on."""
    model = nn.ModuleDict({name: LAYERS[name](dtype=dtype, device=device) for name in names})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in find_weights(model, rules_of(names)):
            m, n = weight.view.matrix_shape(weight.parameter)
            u, v = (torch.randn(weight.view.count, side, min(m, n), generator=generator) for side in (m, n))
            values = 0.94 ** torch.arange(min(m, n))
            made = (torch.linalg.qr(u).Q * values) @ torch.linalg.qr(v).Q.mT
            weight.view.write_(weight.parameter, made.to(device, dtype))
    return model


def rules_of(names):
    """A rule that matches no layer is refused."""
    return [rule for rule, kind in zip(RULES, ("experts", "heads"), strict=True) if any(kind in name for name in names)]


def scaled(names, norm="spectral", dtype=torch.float32, device="cpu", **options):
    return apply_norm_scaling(net(names, dtype, device), norm, init=None, rules=rules_of(names), **options)


def drift_(handles, amount, seed):
    """The same change of the weights of each handle."""
    for number, weights in enumerate(zip(*(handle.weights for handle in handles), strict=True)):
        shape = weights[0].parameter.shape
        change = torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + number))
        with torch.no_grad():
            for weight in weights:
                weight.parameter.add_((change * amount / max(shape) ** 0.5).to(weight.parameter))


# Who steps.


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=[cuda, no_cuda])])
def way(request):
    """The module `grouped` and its device."""
    if request.param == "cuda":
        yield SimpleNamespace(grouped=grouped, device=torch.device("cuda"))
    else:
        with interpreted_grouped() as interpreted:
            yield SimpleNamespace(grouped=interpreted, device=torch.device("cpu"))


def step_by_torch(handle, count, skip=None):
    with torch.no_grad():
        counts = {weight.scaling.constraint: count for weight in handle.weights}
        step.scale(plans.Plan(handle.weights, by_kernels=False), counts, skip)


def step_by_kernels(way, handle, count, skip=None):
    weights = handle.weights
    assert all(way.grouped.fits(weight) for weight in weights)
    taken = way.grouped.GroupedStep(weights)
    # What is read before it is written reaches a result.
    taken._scratch.fill_(float("nan"))
    taken.take(count, skip)
    return taken


def assert_same(
    by_torch, by_kernels, dtype=torch.float32, weight_tolerance=1e-5, residual_tolerance=2e-2, norm_tolerance=3e-6
):
    # Twice the rounding of the weight's own dtype, where that is larger.
    tolerance = max(weight_tolerance, 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 0)
    for mine, other in zip(by_torch.weights, by_kernels.weights, strict=True):
        expected, found = mine.parameter.detach().float(), other.parameter.detach().float()
        largest = expected.abs().amax().item()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * largest, msg=note(mine.name))
        one, two = mine.scaling, other.scaling
        torch.testing.assert_close(two.norm, one.norm, rtol=norm_tolerance, atol=0, msg=note(mine.name))
        torch.testing.assert_close(two.norm_before, one.norm_before, rtol=tolerance, atol=0, msg=note(mine.name))
        torch.testing.assert_close(two.residual, one.residual, rtol=residual_tolerance, atol=1e-5, msg=note(mine.name))
        torch.testing.assert_close(two.error, one.error, rtol=5e-2, atol=1e-6, msg=note(mine.name))
        if hasattr(one, "age"):
            assert torch.equal(one.age, two.age)


def note(name):
    return lambda text: f"{name}: {text}"


def off_by(handle):
    return max(off_target(weight) for weight in handle.weights)


FEW = ["rows contiguous", "wide", "first conv", "transposed channels_last"]


def check_against_twin(way, names, norm, dtype, count, steps):
    # No error is small enough to stop early.
    by_torch, by_kernels = (scaled(names, norm, dtype, way.device, solver=Block(tolerance=1e-30)) for _ in range(2))
    for number in range(steps):
        drift_([by_torch, by_kernels], 0.1, number)
        step_by_torch(by_torch, count)
        step_by_kernels(way, by_kernels, count)
        assert_same(by_torch, by_kernels, dtype, 1e-5 * (number + 1))
    if dtype == torch.float32:
        assert off_by(by_kernels) <= (2e-3 if count == 1 else 1e-5)


def test_a_step_is_the_one_of_torch(way):
    check_against_twin(way, FEW, "spectral", torch.float32, 1, 1)


CAP_LAYERS = [
    "rows contiguous", "wide", "32 columns", "20 rows", "small", "transposed channels_last", "groups channels_last",
]  # fmt: skip


def check_cap_against_twin(way, names, dtype, count, target, drift):
    by_torch, by_kernels = (
        scaled(names, Cap(), dtype, way.device, target=target, solver=Block(tolerance=1e-30)) for _ in range(2)
    )
    drift_([by_torch, by_kernels], drift, 0)
    step_by_torch(by_torch, count)
    step_by_kernels(way, by_kernels, count)
    # The parts of the values above are known to 1e-4.
    assert_same(by_torch, by_kernels, dtype, 1e-4, norm_tolerance=1e-3)
    for weight in by_kernels.weights if dtype == torch.float32 else []:
        values = torch.linalg.svdvals(weight.scaling.matrices(weight.parameter).double())
        assert values.max() <= target * (1 + 1e-3)


@pytest.mark.parametrize(
    ("names", "count", "target", "drift"),
    [
        (["wide", "20 rows", "groups channels_last"], 1, 0.3, 0.3),
        *(
            pytest.param(CAP_LAYERS, *one, marks=pytest.mark.slow)
            for one in [(1, 0.3, 0.3), (2, 1.0, 0.05), (3, 2.0, 0.05)]
        ),
    ],
)
def test_a_step_of_a_cap_is_the_one_of_torch(way, names, count, target, drift):
    check_cap_against_twin(way, names, torch.float32, count, target, drift)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cap_of_every_layer_is_the_one_of_torch(way, dtype):
    check_cap_against_twin(way, LAYERS, dtype, 2, 0.8, 0.1)


# The one-sided one meets both a matrix above its target and one below.
@pytest.mark.parametrize(
    "norm",
    [
        pytest.param(Normalize(), marks=pytest.mark.slow, id="both"),
        pytest.param(Normalize(one_sided=True), id="one-sided"),
    ],
)
def test_a_step_of_normalize_is_the_one_of_torch(way, norm):
    names, solver = ["small", "groups channels_last"], Block(tolerance=1e-30)
    by_torch, by_kernels = (scaled(names, norm, device=way.device, solver=solver) for _ in range(2))
    drift_([by_torch, by_kernels], 0.1, 0)
    # One of the two matrices is below its target now.
    for handle in (by_torch, by_kernels):
        with torch.no_grad():
            matrix_of(SimpleNamespace(weights=handle.weights[-1:]), 0).mul_(0.5)
    before = matrix_of(SimpleNamespace(weights=by_kernels.weights[-1:]), 0).clone()
    step_by_torch(by_torch, 2)
    step_by_kernels(way, by_kernels, 2)
    assert_same(by_torch, by_kernels)
    after = matrix_of(SimpleNamespace(weights=by_kernels.weights[-1:]), 0)
    assert torch.equal(before, after) == norm.one_sided


def test_a_matrix_takes_no_iteration_that_it_does_not_need(way):
    names = ["rows contiguous", "wide", "small"]
    by_torch, by_kernels = (scaled(names, device=way.device) for _ in range(2))
    drift_([by_torch, by_kernels], 0.02, 0)
    for handle in (by_torch, by_kernels):
        drift_([SimpleNamespace(weights=handle.weights[:1])], 0.3, 1)
    taken = step_by_kernels(way, by_kernels, 4)
    with torch.no_grad():
        batches = step.measure_weights(by_torch.weights, {by_torch.weights[0].scaling.constraint: 4})
    counts = {w.name: n for b in batches for w, n in zip(b.weights, b.measurement.num_iterations.tolist(), strict=True)}
    needed = taken.stats[2].tolist()
    assert needed == [counts[weight.name] for weight in by_torch.weights] == [2, 1, 0]
    for weight, count in zip(by_torch.weights, needed, strict=True):
        step_by_torch(SimpleNamespace(weights=[weight]), max(int(count), 1))
    assert_same(by_torch, by_kernels)


def test_a_frobenius_step_is_the_one_of_torch(way):
    check_against_twin(
        way, ["1 x 1", "wide", "odd", "flat", "groups channels_last"], "frobenius", torch.float32, None, 1
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "count", "steps"),
    [
        (torch.float32, 1, 3),
        (torch.float32, 2, 1),
        (torch.float32, 3, 1),
        (torch.bfloat16, 2, 1),
        (torch.float16, 1, 1),
    ],
    ids=str,
)
def test_steps_in_a_row_are_those_of_torch(way, dtype, count, steps):
    check_against_twin(way, LAYERS, "spectral", dtype, count, steps)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frobenius_steps_in_a_row_are_those_of_torch(way, dtype):
    check_against_twin(way, LAYERS, "frobenius", dtype, None, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 33), (33, 1), (2, 31), (33, 33), (64, 32), (65, 129), (200, 300)], ids=str
)
@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_every_shape(way, norm, shape, monkeypatch):
    monkeypatch.setitem(LAYERS, "one", lambda **kind: nn.Linear(*shape, **kind))
    check_against_twin(way, ["one"], norm, torch.float32, 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("outputs", "inputs", "stride"), [(41, 40, 2**26), (34, 40, 2**26), (41, 40, 2**26 + 1)])
def test_elements_beyond_the_range_of_32_bits(way, outputs, inputs, stride, monkeypatch):
    def far_apart(**kind):
        # Memory that nothing touches is not taken.
        rows = torch.empty(outputs * stride, **kind).view(outputs, stride)
        return with_weight(nn.Linear(inputs, outputs, **kind), rows[:, :inputs])

    monkeypatch.setitem(LAYERS, "far apart", far_apart)
    for norm in ("frobenius", "spectral"):
        handle = scaled(["far apart"], norm, torch.bfloat16, way.device)
        drift_([handle], 0.1, 0)
        before = off_by(handle)
        step_by_kernels(way, handle, 1)
        # bfloat16 has 8 digits, and the interpreter cuts the others off.
        assert off_by(handle) <= min(2**-8, before / 4)


# What is not ordinary.


def matrix_of(handle, number):
    return handle.weights[0].view.split(handle.weights[0].parameter.detach()).tensor[number]


BAD = ["frobenius", pytest.param("spectral", marks=pytest.mark.slow)]


@pytest.mark.parametrize("norm", BAD)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["experts", pytest.param("small", marks=pytest.mark.slow)])
def test_a_matrix_that_is_not_finite_is_left_alone(way, norm, bad, name):
    by_torch, by_kernels = (scaled([name], norm, device=way.device) for _ in range(2))
    drift_([by_torch, by_kernels], 0.1, 0)
    for handle in (by_torch, by_kernels):
        matrix_of(handle, 0)[3, 2] = bad
    kept = {key: value.clone() for key, value in by_kernels.weights[0].scaling.named_buffers()}
    before = matrix_of(by_kernels, 0).clone()
    step_by_torch(by_torch, 2)
    taken = step_by_kernels(way, by_kernels, 2)
    scaling = by_kernels.weights[0].scaling
    assert torch.equal(matrix_of(by_kernels, 0).view(torch.int32), before.view(torch.int32))
    assert not scaling.norm[0].isfinite()
    assert not taken.stats[0, 0].isfinite()
    assert scaling.norm[1:].isfinite().all()
    if "basis" in kept:
        assert torch.equal(scaling.basis[0], kept["basis"][0])
    for number in range(1, scaling.view.count):
        expected = matrix_of(by_torch, number)
        torch.testing.assert_close(matrix_of(by_kernels, number), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("norm", BAD)
def test_a_skipped_step_and_a_skipped_matrix_move_nothing(way, norm):
    by_torch, by_kernels = (scaled(["experts"], norm, device=way.device) for _ in range(2))
    drift_([by_torch, by_kernels], 0.1, 0)
    before = by_kernels.weights[0].parameter.detach().clone()
    for skip in (torch.ones(1), torch.ones(1, dtype=torch.float64), torch.zeros(1)):
        for handle in (by_torch, by_kernels):
            handle.weights[0].scaling.skip_mask[1] = 1
        step_by_torch(by_torch, 1, skip.to(way.device))
        step_by_kernels(way, by_kernels, 1, skip.to(way.device))
        assert_same(by_torch, by_kernels)
        moved = (by_kernels.weights[0].parameter != before).flatten(1).any(1)
        assert moved.tolist() == ([False] * 3 if skip > 0 else [True, False, True])


@pytest.mark.parametrize("norm", BAD)
def test_a_weight_that_is_skipped_by_its_own_number_keeps_its_state(way, norm):
    by_torch, by_kernels = (scaled(["rows contiguous", "small"], norm, device=way.device) for _ in range(2))
    drift_([by_torch, by_kernels], 0.1, 0)
    for off in ([1.0, 0.0], [0.0, 1.0]):
        before = [copied(weight) for weight in by_kernels.weights]
        skip = torch.tensor(off, device=way.device)
        step_by_torch(by_torch, 1, skip)
        step_by_kernels(way, by_kernels, 1, skip)
        assert_same(by_torch, by_kernels)
        for weight, was, is_off in zip(by_kernels.weights, before, off, strict=True):
            is_same = {name: torch.equal(value, was[name]) for name, value in copied(weight).items()}
            assert all(is_same.values()) if is_off else not is_same["weight"]


def copied(weight):
    tensors = {"weight": weight.parameter, **dict(weight.scaling.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("norm", BAD)
def test_zero_and_rank_one(way, norm):
    handles = [scaled(["odd", "small"], norm, device=way.device, target=0.5) for _ in range(2)]
    by_torch, by_kernels = handles
    with torch.no_grad():
        for handle in handles:
            for weight in handle.weights:
                weight.parameter.zero_()
    step_by_torch(by_torch, 1)
    step_by_kernels(way, by_kernels, 1)
    for weight in by_kernels.weights:
        assert weight.scaling.norm.tolist() == [0]
        assert not weight.parameter.any()
    with torch.no_grad():
        for handle in handles:
            for weight in handle.weights:
                m, n = weight.parameter.shape
                column, row = torch.arange(1, m + 1.0), torch.arange(1, n + 1.0)
                weight.parameter.copy_(column[:, None] * row / 10)
    # The block of a zero matrix stays what it was at random: the first step takes off what it sees.
    for _ in range(1 if norm == "frobenius" else 3):
        step_by_torch(by_torch, 2)
        step_by_kernels(way, by_kernels, 2)
    assert off_by(by_kernels) <= 1e-5


@pytest.mark.parametrize("norm", BAD)
@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_squares_beyond_float32_once_the_norm_is_known(way, norm, size):
    handle = scaled(["odd"], norm, device=way.device)
    scaling = handle.weights[0].scaling
    with torch.no_grad():
        for tensor in (handle.weights[0].parameter, scaling.norm, scaling.target):
            tensor.mul_(size)
    drift_([handle], 0.05 * size, 0)
    step_by_kernels(way, handle, 2)
    assert off_by(handle) <= 1e-4


@pytest.mark.parametrize("norm", BAD)
def test_a_jump_is_followed(way, norm):
    handle = scaled(["odd"], norm, device=way.device)
    with torch.no_grad():
        handle.weights[0].parameter.mul_(1000)
    for _ in range(2):
        step_by_kernels(way, handle, 2)
    assert off_by(handle) <= 1e-3


def test_the_noise_is_that_of_torch(way):
    handle = scaled(["tall channels_last"], device=way.device)
    (weight,) = handle.weights
    scaling = weight.scaling
    taken = way.grouped.GroupedStep(handle.weights)
    stop_after(taken, "residuals", way)
    row = dict(zip(("v", "y", "r"), (taken._rows[0][field.value] for field in _BLOCKS), strict=True))
    n = 45
    at = (row["r"] - taken._scratch.data_ptr()) // 4
    last = taken._scratch[at : at + 16 * n].reshape(n, 16)[:, 15]
    matrix = weight.view.matrices(weight.parameter.detach())[0]
    images = matrix @ scaling.basis[0]
    plain = (matrix.T @ images - scaling.basis[0] @ (images.T @ images))[:, 15]
    # In the order of memory: a column's pixels first, then its channel.
    own_order = last.reshape(9, 5).T.reshape(-1)
    scale = 2.0 ** math.floor(math.log2(scaling.norm.item()))
    noise = own_order * scale**2 - plain
    expected = signs(keys(scaling.age), (n,))[0]
    torch.testing.assert_close(noise.sign(), expected)
    largest = (images.T @ images).diagonal().max()
    torch.testing.assert_close(noise.abs(), (0.05 * largest / n**0.5).expand(n), rtol=1e-3, atol=0)


_BLOCKS = (kernels.V_, kernels.Y_, kernels.R_)


def stop_after(taken, name, way):
    """Take a step as far as a launch."""

    class Stopped(Exception):
        pass

    prepare = way.grouped._prepare

    def prepare_to_stop(kernel, *rest):
        launch = prepare(kernel, *rest)

        def run(skip):
            launch(skip)
            if kernel.__name__ == name:
                raise Stopped

        return run

    way.grouped._prepare = prepare_to_stop
    try:
        with pytest.raises(Stopped):
            taken.take(1, None)
    finally:
        way.grouped._prepare = prepare


@pytest.mark.parametrize("norm", BAD)
def test_a_training_step_goes_by_kernels_and_says_what_it_found(way, norm, monkeypatch):
    if way.device.type == "cpu":
        monkeypatch.setattr("specscale.linalg.can_sync", lambda tensor: False)
        monkeypatch.setattr(plans, "_has_kernels", lambda device: True)
        monkeypatch.setattr(plans, "_grouped", lambda: way.grouped)
    handle = scaled(["odd", "small"], norm, device=way.device)
    odd, small = (weight.parameter for weight in handle.weights)
    optimizers = [torch.optim.SGD([parameter], lr=0.05) for parameter in (odd, small)]
    for optimizer in optimizers:
        handle.attach(optimizer)
    for _ in range(2):
        for parameter, optimizer in zip((odd, small), optimizers, strict=True):
            parameter.grad = torch.ones_like(parameter)
            version = parameter._version
            optimizer.step()
            assert parameter._version > version + 1, "autograd knows that the weight was written to"
            assert off_by(handle) <= 1e-3
    assert [bool(plan.groups) for _, plan in handle._step._plans._plans] == [True, True]
    assert not any(plan.rest for _, plan in handle._step._plans._plans)
    metrics = handle.metrics()
    assert metrics["norm/odd"] == pytest.approx(metrics["target/odd"], rel=1e-3)
    small.grad[0, 0] = float("nan")
    optimizers[1].step()
    with pytest.raises(
        NonFiniteWeightError, match="the weight of 'small' holds NaN or infinity; the last step did not"
    ):
        handle.step()


def test_a_launch_is_compiled_once_and_takes_another_skip_each_time():
    compiled, launched = [], []

    def warmup(*args, grid, **constants):
        compiled.append((args, grid, constants))
        return {grid: lambda *args: launched.append(args)}

    kernel = SimpleNamespace(arg_names=["table", "skip", "tolerance", "FIRST", "LAST"], warmup=warmup)
    constants = {"LAST": False, "FIRST": True, "num_warps": 4}
    launch = grouped._prepare(kernel, 7, ("table", grouped.SKIP, 0.5), constants)
    launch("this")
    launch("that")
    assert compiled == [(("table", torch.float32, 0.5), (7, 1, 1), constants | {"enable_fp_fusion": True})]
    assert launched == [("table", found, 0.5, True, False) for found in ("this", "that")]


# What only a device can show.


@cuda
@no_cuda
def test_long_sums_are_as_accurate_as_float32():
    """Tensor cores cut off what they add up, which lowers a norm the more, the longer the sum."""
    layer = nn.Linear(4096, 4096, bias=False, device="cuda")
    handle = apply_norm_scaling(layer, init=None)
    square = layer.weight.detach().double()
    exact = torch.linalg.eigvalsh(square.T @ square)[-1].sqrt().item()
    taken = grouped.GroupedStep(handle.weights)
    # A skipped step reports the first singular value.
    taken.take(8, torch.ones(1, device="cuda"))
    assert taken.stats[0, 0].item() == pytest.approx(exact, rel=2e-6)


@cuda
@no_cuda
@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_repeats_and_replays_are_equal_bit_for_bit(norm):
    eager, again, replayed = (scaled(LAYERS, norm, device="cuda") for _ in range(3))
    handles = [eager, again, replayed]
    taken = [grouped.GroupedStep(handle.weights) for handle in handles]
    graph = torch.cuda.CUDAGraph()
    for number in range(4):
        drift_(handles, 0.05, number)
        taken[0].take(2, None)
        taken[1].take(2, None)
        if number == 0:
            taken[2].take(2, None)
        elif number == 1:
            with torch.cuda.graph(graph):
                taken[2].take(2, None)
        if number > 0:
            graph.replay()
        for other in (again, replayed):
            for mine, its in zip(eager.weights, other.weights, strict=True):
                assert torch.equal(mine.parameter, its.parameter), mine.name
                for name, value in mine.scaling.named_buffers():
                    assert torch.equal(value, its.scaling.get_buffer(name)), f"{name} of {mine.name}"


@cuda
@no_cuda
@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
@pytest.mark.parametrize("captured", [False, True])
def test_a_step_waits_for_nothing_and_weights_may_move(norm, captured):
    stays, moves = (scaled(FEW, norm, device="cuda") for _ in range(2))
    if captured:
        moves.capture()
    homes = [[weight.parameter.data, weight.parameter.data.clone()] for weight in moves.weights]
    for number in range(12):
        drift_([stays, moves], 0.05, number)
        stays.step()
        with refuse_to_wait(torch.device("cuda")):
            moves.step()
        assert_same(stays, moves, weight_tolerance=1e-4)
        for weight, (one, other) in zip(moves.weights, homes, strict=True):
            here, there = (one, other) if number % 2 == 0 else (other, one)
            there.copy_(here)
            weight.parameter.data = there


@cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_may_be_the_current_one():
    here, there = (scaled(FEW, device="cuda:1") for _ in range(2))
    for number in range(3):
        drift_([here, there], 0.05, number)
        for current, handle in ((1, here), (0, there)):
            with torch.cuda.device(current):
                handle.step()
    for weight, other in zip(here.weights, there.weights, strict=True):
        assert torch.equal(weight.parameter, other.parameter)
    assert here.num_iterations == there.num_iterations


# What is launched, and where a step goes.


class CountOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_cpu(monkeypatch):
    """Weights on the CPU go by kernels, as far as their launch."""
    launched = []
    monkeypatch.setattr("specscale.linalg.can_sync", lambda tensor: False)
    monkeypatch.setattr(plans, "_has_kernels", lambda device: True)
    monkeypatch.setattr(
        grouped,
        "_prepare",
        lambda kernel, _, args, options: lambda skip: launched.append((kernel, args, options)),
    )
    return launched


@pytest.fixture
def unsolved(monkeypatch):
    """A model is put under scaling without being measured."""
    monkeypatch.setattr("specscale.apply.solve_anew_", lambda scaling, weight: None)


def resnet50():
    return pytest.importorskip("torchvision").models.resnet50()


def narrow_resnet50():
    """Four blocks of ResNet-50, with an eighth of their channels."""
    resnet = pytest.importorskip("timm").models.resnet
    return resnet.ResNet(resnet.Bottleneck, (1, 1, 1, 1), channels=(8, 16, 32, 64))


def vit():
    return pytest.importorskip("timm").create_model("vit_small_patch16_224")


def lstm():
    return nn.Sequential(nn.LSTM(33, 47), nn.Linear(47, 1), nn.Conv1d(7, 14, 3, groups=7), nn.Conv2d(3, 64, 7))


@pytest.mark.parametrize(
    "make",
    [narrow_resnet50, lstm, *(pytest.param(large, marks=pytest.mark.slow) for large in (resnet50, vit))],
)
def test_the_number_of_launches_does_not_grow_with_the_model(make, on_cpu, unsolved, monkeypatch):
    model = make()
    by_solver = [("spectral", 1), ("spectral", 2), ("spectral", 3), ("cap", 2), ("normalize", 2)]
    for norm, count in [("frobenius", None), *by_solver]:
        handle = apply_norm_scaling(model, norm, target=1.0, init=None)
        monkeypatch.setattr(Block, "next_num_iterations", lambda *args, count=count: count)
        handle._step.take(handle.weights)
        on_cpu.clear()
        with CountOperations() as counted:
            handle._step.take(handle.weights)
        # The copy to the host is no operation where the device is the host.
        copies = 1
        total = len(on_cpu) + len(counted.names) + copies
        assert total <= (3 if count is None else 2 + 6 * count), counted.names
        assert len(on_cpu) == (2 if count is None else 1 + 6 * count)
        handle.remove()


def test_each_dtype_and_constraint_has_launches_of_its_own(on_cpu, unsolved):
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 60).bfloat16(), nn.Linear(60, 70).half())
    handle = apply_norm_scaling(model, target=1.0, init=None)
    handle._step.take(handle.weights)
    assert len(on_cpu) == 3 * 13
    assert {options["DTYPE"] for _, _, options in on_cpu if "DTYPE" in options} == set(grouped._TYPES.values())


def addresses(launched):
    return {row[0] for _, args, _ in launched for row in args[0].tolist()}


def moved(parameter):
    parameter.data = parameter.data.clone()


def strides_changed(parameter):
    """Other strides, at the same address."""
    parameter.data = parameter.data.as_strided(parameter.shape, parameter.to(memory_format=LAST).stride())


def dtype_changed(parameter):
    parameter.data = parameter.data.bfloat16()


@pytest.mark.parametrize("change", [moved, strides_changed, dtype_changed])
def test_a_weight_that_is_elsewhere_is_found_there(change, on_cpu, unsolved):
    handle = apply_norm_scaling(nn.Sequential(nn.Conv2d(5, 64, 3), nn.Linear(40, 50)), target=1.0, init=None)
    (conv, linear) = (weight.parameter for weight in handle.weights)
    handle._step.take(handle.weights)
    on_cpu.clear()
    change(conv)
    handle._step.take(handle.weights)
    rows = {row[kernels.WEIGHT.value]: row for _, args, _ in on_cpu for row in args[0].tolist()}
    assert rows.keys() == {conv.data_ptr(), linear.data_ptr()}
    assert rows[conv.data_ptr()][kernels.ORDER_LENGTH.value] == (5 if change is strides_changed else 1)
    sizes = {options["VECTOR"] for _, _, options in on_cpu if "VECTOR" in options}
    assert sizes == ({4, 8} if change is dtype_changed else {4})


def test_state_that_is_elsewhere_is_found_there(on_cpu, unsolved):
    handle = apply_norm_scaling(nn.Linear(40, 50), target=1.0, init=None)
    (weight,) = handle.weights
    handle._step.take(handle.weights)
    for name in ("basis", "norm", "target_spectral", "skip_mask", "age", "error", "residual"):
        setattr(weight.scaling, name, weight.scaling.get_buffer(name).clone())
        on_cpu.clear()
        handle._step.take(handle.weights)
        rows = on_cpu[0][1][0].tolist()
        assert weight.scaling.get_buffer(name).data_ptr() in rows[0], name


def test_what_is_where_it_was_is_not_planned_again(on_cpu, unsolved):
    handle = apply_norm_scaling(nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 60)), target=1.0, init=None)
    tables = set()
    for _ in range(3):
        for weights in (handle.weights, handle.weights[:1], handle.weights[1:]):
            on_cpu.clear()
            handle._step.take(weights)
            tables.add(on_cpu[0][1][0])
    assert len(tables) == 3


def test_plans_for_many_selections_are_bounded(on_cpu, unsolved):
    model = nn.Sequential(*(nn.Linear(33, 34) for _ in range(12)))
    handle = apply_norm_scaling(model, target=1.0, init=None)
    weights = handle.weights
    # One optimizer for each weight: all are kept.
    for _ in range(2):
        for weight in weights:
            handle._step.take([weight])
    known = handle._step._plans._plans
    assert len(known) == 12
    for last in range(2, 12):
        handle._step.take(weights[:last])
    assert sum(weights[0].scaling in plan.scalings for _, plan in known) == plans.Plans.MOST
    on_cpu.clear()
    handle._step.take(weights[:2])
    assert addresses(on_cpu) == {weight.parameter.data_ptr() for weight in weights[:2]}


def test_what_no_kernel_fits_steps_in_torch(on_cpu):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 40).double(), nn.Linear(40, 36))
    handle = apply_norm_scaling(model, init=None)
    # Of another model of the handle's: a state that a kernel would misread.
    misfit = handle.weights[2]
    misfit.scaling.basis = misfit.scaling.basis.double()
    drift_([handle], 0.1, 0)
    rest = SimpleNamespace(weights=handle.weights[1:])
    before = off_by(rest)
    handle._step.take(handle.weights)
    assert addresses(on_cpu) == {model[0].weight.data_ptr()}
    assert off_by(rest) <= before / 20


@pytest.mark.parametrize(
    "options", [{"norm": "clipped"}, {"solver": "power"}, {"solver": Block(width=8)}, {"solver": "svd"}], ids=str
)
def test_other_constraints_and_solvers_step_in_torch(options, on_cpu):
    handle = apply_norm_scaling(nn.Linear(40, 50), init=None, **options)
    drift_([handle], 0.1, 0)
    handle._step.take(handle.weights)
    assert not on_cpu


def test_the_default_dtype_and_device_are_the_users(on_cpu, unsolved):
    handle = apply_norm_scaling(nn.Linear(40, 50), target=1.0, init=None)
    torch.set_default_dtype(torch.float64)
    try:
        taken = grouped.GroupedStep(handle.weights)
        with torch.device("meta"):
            other = grouped.GroupedStep(handle.weights)
    finally:
        torch.set_default_dtype(torch.float32)
    for one in (taken, other):
        assert {one.stats.dtype, one._scratch.dtype, one._unit_vectors.dtype, one._never.dtype} == {torch.float32}
        assert {one.stats.device, one.table.device, *(t.device for t in one.tiles.values())} == {torch.device("cpu")}


def test_a_plan_is_not_made_while_a_graph_is_captured(on_cpu, unsolved, monkeypatch):
    handle = apply_norm_scaling(nn.Linear(40, 50), target=1.0, init=None)
    with monkeypatch.context() as capturing:
        capturing.setattr(plans, "is_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="step: a CUDA graph is being captured, and the kernels' memory must"):
            handle.step()
    handle.step()
    with monkeypatch.context() as capturing:
        capturing.setattr(plans, "is_capturing", lambda: True)
        handle.step()
    assert handle._step._plans._captured == {plan for _, plan in handle._step._plans._plans}


def test_another_dtype_at_the_same_address_is_another_plan():
    """As when the same memory is filled again, from which parameters and buffers are swapped in."""
    handle = apply_norm_scaling(nn.Linear(40, 50), target=1.0, init=None)
    memory = torch.ones(1, dtype=torch.float64)
    handle.weights[0].scaling.norm.data = memory.view(torch.float32)[:1]
    before = plans.fingerprint(handle.weights)
    handle.weights[0].scaling.norm.data = memory
    assert plans.fingerprint(handle.weights) != before


def test_where_triton_cannot_launch_a_warning_says_so(monkeypatch):
    def fail(device):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(grouped, "try_to_launch", fail)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    expected = r"steps without its kernels on cuda:7, .* cannot launch them \(RuntimeError: Failed to find C compiler\)"
    with pytest.warns(UserWarning, match=expected):
        assert not plans._has_kernels.__wrapped__(torch.device("cuda:7"))


# What the kernels compile to.


@pytest.fixture
def mesh():
    """Two processes, of which this is one; the other is not there."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


NORMS = ("spectral", "cap", "normalize", Normalize(one_sided=True), "frobenius")


def launched_variants(dtype, monkeypatch, counts, mesh, norms=NORMS):
    """Every kernel with every set of constants that a step launches it with, of whole weights and of sharded ones."""
    monkeypatch.setattr("specscale.apply.solve_anew_", lambda scaling, weight: None)
    found = set()
    for norm in norms:
        for is_sharded in (False, True):
            layer = nn.Linear(40, 50, dtype=dtype)
            if is_sharded:
                layer.weight = nn.Parameter(DTensor.from_local(layer.weight.detach()[:25], mesh, [Shard(0)]))
            weights = apply_norm_scaling(layer, norm, target=1.0, init=None).weights
            step = grouped.GroupedStep(weights)
            launches = [one for count in counts for one in step.launches(count)]
            assert any(isinstance(one, grouped.AllReduce) for one in launches) == is_sharded
            kernels_of = [one for one in launches if isinstance(one, grouped.Launch)]
            found |= {(one.kernel, tuple(one.constants.items())) for one in kernels_of}
    return found


def source_and_options(kernel, options):
    options = dict(options) | grouped.OPTIONS
    names = [parameter.name for parameter in kernel.params]
    constants = {name: options.pop(name) for name in names if name in options}

    def type_of(name):
        if name in constants:
            return "constexpr"
        if name.startswith("num_"):
            return "i32"
        return {"table": "*i64", "totals": "*i64", "skip": "*fp32", "tolerance": "fp32"}.get(name, "*i32")

    return ASTSource(kernel, {name: type_of(name) for name in names}, constants), options


def compiled(kernel, options, capability):
    source, options = source_and_options(kernel, options)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


PUBLIC = {name for name, one in vars(kernels).items() if hasattr(one, "params") and not name.startswith("_")}
THREADS = 128


def check_compiled(kernel, options, capability):
    built = compiled(kernel, options, capability)
    code = built.asm["ptx"]
    # What every card from Ampere on gives a program.
    assert built.metadata.shared <= 99 * 1024
    assert ".local" not in code.replace(".local_", "")
    constants = dict(options)
    if "DEPTH" in constants:
        # Each stage of the two layouts that are contiguous reads a tile of the weight, and each of the three the block,
        # which some versions of Triton (3.5 and 3.9) copy in smaller pieces in one of them.
        tile = constants["TILE"] * constants["DEPTH"] // constants["VECTOR"]
        block = constants["DEPTH"] * 16 // 4
        expected = [constants["num_stages"] * (2 * tile + num_blocks * block) // THREADS for num_blocks in (2, 3)]
        assert len(re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10", code)) in expected
    elif "DTYPE" in constants:
        strip = kernels.STRIP.value * kernels.SIDE // constants["VECTOR"] // THREADS
        assert len(re.findall(r"ld\.global[\w.]*\.v4\.b32", code)) >= strip
        if kernel.__name__ != "squares":
            assert len(re.findall(r"st\.global[\w.]*\.v4\.b32", code)) >= strip
    return code


def test_every_kernel_is_launched_and_no_other(monkeypatch, mesh):
    variants = launched_variants(torch.float32, monkeypatch, (1, 2, 3), mesh)
    assert {kernel.__name__ for kernel, _ in variants} == PUBLIC
    assert len(PUBLIC) == 13


@pytest.mark.parametrize("name", ["products", "update"])
def test_a_weight_is_read_and_written_16_bytes_at_a_time(name, monkeypatch, mesh):
    for kernel, options in launched_variants(torch.float32, monkeypatch, (1,), mesh, ["spectral"]):
        if kernel.__name__ == name:
            code = check_compiled(kernel, options, 90)
            if name == "products":
                # Of each factor's high and low part, 8 rows at a time: for two of the three layouts, and for the other
                # one transposed, 8 of its columns at a time, each warp its own.
                depth = 3 * grouped.DEPTH // 8
                assert len(re.findall(r"wgmma[\w.]*\.f32\.tf32\.tf32", code)) == 2 * depth
                assert len(re.findall(r"mma\.sync[\w.]*\.f32\.tf32\.tf32", code)) == depth * grouped.TILE // 8 // 4


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_compiles_for_every_card(capability, dtype, monkeypatch, mesh):
    for kernel, options in launched_variants(dtype, monkeypatch, (1, 2, 3), mesh):
        if dtype == torch.float32 or "DTYPE" in dict(options):
            check_compiled(kernel, options, capability)
