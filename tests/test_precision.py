"""Precision is the library's own: whatever torch's switches say, every call is as right as without and leaves them."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from held import off_target
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from specscale import Power, apply_norm_scaling, linalg, measure, orthogonal_init_, singular_values, spectral_norms
from specscale.linalg import add_product, product, product_of_parts

AUTOCAST = ("cpu", "cuda")
PRODUCTS = {"mm", "bmm", "mv", "dot", "addmm", "addmv", "baddbmm", "addbmm"}


def keep_digits(tensor, digits):
    """float32 rounded to so many binary digits: 8 as bfloat16, 11 as TF32."""
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32:
        return tensor
    if digits == 8:
        return tensor.bfloat16().float()
    dropped = 1 << (24 - digits)
    return ((tensor.view(torch.int32) + dropped // 2) & -dropped).view(torch.float32)


class RoundedProducts(TorchDispatchMode):
    """Rounds every float32 factor, as hardware does that a switch of torch's has freed to, while `is_on()`."""

    def __init__(self, digits=8, is_on=lambda: True):
        super().__init__()
        self.digits, self.is_on = digits, is_on

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS and self.is_on():
            args = [keep_digits(argument, self.digits) for argument in args]
        return func(*args, **(kwargs or {}))


def set_precision(backend, value):
    """The newer API: `torch.backends.<backend>.fp32_precision = value`."""
    module = torch.backends
    for name in backend.split(".") if backend else ():
        module = getattr(module, name)
    module.fp32_precision = value


def unset_precision():
    torch.set_float32_matmul_precision("highest")
    for backend in ("", "cuda.matmul", "mkldnn.matmul"):
        set_precision(backend, "none")


def cpu_rounds():
    return torch.backends.mkldnn.matmul.fp32_precision not in ("ieee", "none")


@contextlib.contextmanager
def restored():
    """Leave every switch as it is without: the older setter writes the newer settings too, hence it comes first."""
    deterministic, dtype = torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()
    # Another test may have set what is the default.
    unset_precision()
    before = switches()
    try:
        yield
    finally:
        unset_precision()
        torch.use_deterministic_algorithms(deterministic)
        torch.set_default_dtype(dtype)
        assert switches() == before


def switches():
    """All that can be read of the switches; the older getters raise once the newer API was used."""
    read = {
        "matmul": torch.get_float32_matmul_precision,
        "tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
        "all": lambda: torch.backends.fp32_precision,
        "cuda": lambda: torch.backends.cuda.matmul.fp32_precision,
        "mkldnn": lambda: torch.backends.mkldnn.fp32_precision,
        "cpu": lambda: torch.backends.mkldnn.matmul.fp32_precision,
        "cudnn": lambda: (torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision),
        "deterministic": torch.are_deterministic_algorithms_enabled,
        "dtype": torch.get_default_dtype,
        "autocast": lambda: [(torch.is_autocast_enabled(one), torch.get_autocast_dtype(one)) for one in AUTOCAST],
        "cache": torch.is_autocast_cache_enabled,
        "grad": torch.is_grad_enabled,
    }
    found = {}
    for name, getter in read.items():
        try:
            found[name] = getter()
        except RuntimeError:
            found[name] = "cannot be read"
    return found


LEGACY = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
}
NEWER = {
    "all tf32": lambda: set_precision("", "tf32"),
    "all bf16": lambda: set_precision("", "bf16"),
    "mkldnn.matmul bf16": lambda: set_precision("mkldnn.matmul", "bf16"),
    "mkldnn bf16": lambda: set_precision("mkldnn", "bf16"),
    "cuda.matmul tf32": lambda: set_precision("cuda.matmul", "tf32"),
}
OTHERS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "float64": lambda: torch.set_default_dtype(torch.float64),
    "bfloat16": lambda: torch.set_default_dtype(torch.bfloat16),
    # As a context: torch 2.9 cannot undo set_default_device.
    "default device": lambda: torch.device("meta"),
}
SETTINGS = LEGACY | NEWER | OTHERS
ROUNDING_ON_CPU = ("high", "medium", "all tf32", "all bf16", "mkldnn.matmul bf16", "mkldnn bf16")
PLACES = [
    *((name, "this machine") for name in SETTINGS),
    *((name, "a CPU that rounds") for name in ROUNDING_ON_CPU),
    ("medium", "an accelerator that rounds"),
]
QUICK = [(name, "this machine") for name in ("high", "medium", "default device")] + [("medium", "a CPU that rounds")]
"""Those that go by every way that a product can take."""


@pytest.fixture
def switched(request, monkeypatch):
    """Under a setting, on this machine, or where it makes the hardware round: the place."""
    name, place = request.param
    with restored(), contextlib.ExitStack() as stack:
        context = SETTINGS[name]()
        if name in ("autocast", "default device"):
            stack.enter_context(context)
        if place == "an accelerator that rounds":
            monkeypatch.setattr("specscale.linalg.can_sync", lambda tensor: False)
            monkeypatch.setattr("specscale.linalg._has_fast_float64", lambda factor: False)
        if place != "this machine":
            stack.enter_context(RoundedProducts(11 if "tf32" in name or name == "high" else 8, cpu_rounds))
        before = switches()
        yield place
        assert switches() == before
        assert before["matmul" if name in LEGACY else "cpu"] != "cannot be read"


SOME = [
    *QUICK,
    ("autocast", "this machine"),
    ("bfloat16", "this machine"),
    ("high", "a CPU that rounds"),
    ("mkldnn bf16", "a CPU that rounds"),
    ("medium", "an accelerator that rounds"),
]


def chosen(places):
    """Of all settings, those that the default tests go through."""
    return pytest.mark.parametrize(
        "switched",
        [pair if pair in places else pytest.param(pair, marks=pytest.mark.slow) for pair in PLACES],
        indirect=True,
        ids=lambda pair: "-".join(pair),
    )


every_setting = pytest.mark.parametrize("switched", PLACES, indirect=True, ids=lambda pair: "-".join(pair))
few_settings, some_settings = chosen(QUICK), chosen(SOME)


def net(seed=0):
    """A convolution of two groups, two weights for the block on either side, and one that is small."""
    generator = torch.Generator().manual_seed(seed)
    options = {"bias": False, "dtype": torch.float32, "device": "cpu"}
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2, **options),
        nn.Flatten(),
        nn.Linear(96, 80, **options),
        nn.ReLU(),
        nn.Linear(80, 90, **options),
        nn.Linear(90, 1, **options),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel()
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu"))
            parameter.mul_(fan_in**-0.5)
    return model


def matrices(weight):
    return weight.view.matrices(weight.parameter.detach()).double()


def spectra(scaling):
    """Every weight's singular values, by torch in float64."""
    return {weight.name: torch.linalg.svdvals(matrices(weight)) for weight in scaling.weights}


def train(model, scaling, steps):
    """Steps of the optimizer, and the singular values that each scaling step finds."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = {}
    optimizer.register_step_post_hook(lambda *_: found.update(spectra(scaling)))
    scaling.attach(optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 4, 6, 6, generator=generator, dtype=torch.float32, device="cpu")
        optimizer.zero_grad()
        (model(x) - x.sum((1, 2, 3))[:, None]).square().mean().backward()
        optimizer.step()
        yield found


@pytest.mark.parametrize("digits", [8, 11])
def test_the_emulation_rounds_what_hardware_does(digits):
    a, b = (torch.randn(2, 50, 50, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    exact = a.double() @ b.double()
    for multiply in (torch.matmul, lambda a, b: torch.baddbmm(torch.zeros(50), a, b), lambda a, b: a @ b[..., :1]):
        with RoundedProducts(digits):
            error = (multiply(a, b) - exact[..., : multiply(a, b).shape[-1]]).abs().max() / exact.abs().max()
        assert 0.1 * 2**-digits < error < 2**-digits


@some_settings
@pytest.mark.parametrize("norm", ["spectral", "clipped"])
def test_a_step_moves_the_singular_values_that_it_should_and_no_other(norm, switched):
    model = net()
    scaling = apply_norm_scaling(model, norm, init="orthogonal", generator=torch.Generator().manual_seed(2))
    tolerance = 1e-5 if norm == "clipped" else 1e-3
    for found in train(model, scaling, 3):
        for weight in scaling.weights:
            values = found[weight.name]
            target = weight.scaling.target.double()[:, None]
            others = torch.minimum(values[:, 1:], target) if norm == "clipped" else values[:, 1:]
            expected = torch.cat([target, others], dim=1).sort(descending=True).values
            new = torch.linalg.svdvals(matrices(weight))
            assert ((new - expected).abs() <= tolerance * expected[:, :1]).all(), weight.name
            # An accelerator's estimate of the second value, which may be the norm, is coarse.
            coarse = 0.05 if norm == "spectral" and "accelerator" in switched else 10 * tolerance
            assert scaling.metrics()[f"norm/{weight.name}"] == pytest.approx(new.max().item(), rel=coarse)


@few_settings
def test_the_polar_iteration_puts_every_singular_value_on_the_target(switched):
    model = net()
    scaling = apply_norm_scaling(model, "orthogonal")
    for _ in train(model, scaling, 2):
        for weight in scaling.weights:
            values = torch.linalg.svdvals(matrices(weight)) / weight.scaling.target.double()[:, None]
            assert ((values - 1).abs() <= 1e-5).all(), weight.name


@some_settings
@pytest.mark.parametrize("num_iterations", [3, 30])
def test_power_iteration_finds_what_has_a_gap(num_iterations, switched):
    """Few iterations multiply by the matrix, many by its Gram matrix."""
    left, _, right = torch.linalg.svd(net()[2].weight.detach(), full_matrices=False)
    # Three iterations from noise: the others must be small.
    values = torch.linspace(1.0, 0.5, 80, dtype=torch.float32, device="cpu") * (1e-3 if num_iterations == 3 else 0.3)
    values[0] = 2.0
    layer = nn.Linear(96, 80, bias=False, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        layer.weight.copy_(left.double() * values @ right.double())
    scaling = apply_norm_scaling(layer, "spectral", target=0.7, solver=Power(num_iterations))
    scaling.step()
    assert max(map(off_target, scaling.weights)) <= 1e-6


@every_setting
def test_frobenius_norms_are_on_target(switched):
    model = net()
    scaling = apply_norm_scaling(model, "frobenius", init="orthogonal")
    for _ in train(model, scaling, 3):
        assert max(map(off_target, scaling.weights)) <= 1e-6


@few_settings
def test_every_call_that_computes_is_as_right(switched):
    model = orthogonal_init_(net(), gain=2.0)
    for weight in (model[0].weight.reshape(2, 3, 18), model[2].weight[None], model[4].weight[None]):
        values = torch.linalg.svdvals(weight.detach().double())
        torch.testing.assert_close(values, torch.full_like(values, 2.0), rtol=1e-6, atol=0)

    model = net()
    scaling = apply_norm_scaling(model, "spectral")
    exact = spectra(scaling)
    top = {name: values[:, 0] for name, values in exact.items()}
    plain = copy.deepcopy(scaling.plain_state_dict())
    norms, values = spectral_norms(model), singular_values(model)
    frobenius = {one.name: one.frobenius for one in measure(model).weights}
    for weight in scaling.weights:
        name = weight.name
        torch.testing.assert_close(weight.scaling.target.double(), top[name], rtol=1e-5, atol=0)
        assert norms[name] == pytest.approx(top[name].max().item(), rel=1e-5)
        assert frobenius[name] == pytest.approx(exact[name].square().sum(-1).sqrt().max().item(), rel=1e-5)
        assert (values[name] - exact[name]).abs().max() <= 1e-8 * top[name].max()
    for certificate in scaling.audit().certificates:
        assert certificate.norm == pytest.approx(top[certificate.name].max().item(), rel=1e-9)
        assert abs(certificate.error) <= 1e-5

    # An average of weights, put back on the targets.
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, other in zip(average.parameters(), net(seed=1).parameters(), strict=True):
            parameter.lerp_(other, 0.3)
    scaling.project(average)
    assert max(map(off_target, type(scaling).of(average).weights)) <= 1e-3

    # Other weights, whose norms become the targets; and a plain checkpoint, which brings no state of the solver.
    model.load_state_dict(net(seed=2).state_dict())
    scaling.retarget()
    for weight in scaling.weights:
        largest = torch.linalg.svdvals(matrices(weight))[:, 0]
        torch.testing.assert_close(weight.scaling.target.double(), largest, rtol=1e-5, atol=0)
    model.load_state_dict(plain)
    for weight in scaling.weights:
        torch.testing.assert_close(weight.scaling.norm.double(), top[weight.name], rtol=1e-5, atol=0)


@every_setting
def test_targets_from_the_sizes_of_activations_are_the_same(switched):
    x = torch.zeros(1, 4, 6, 6, dtype=torch.float32, device="cpu")
    scaling = apply_norm_scaling(net(), "frobenius", target="features", example_input=x)
    expected = [(96 / 144 * 3) ** 0.5, 80**0.5 * (80 / 96) ** 0.5, 80**0.5 * (90 / 80) ** 0.5, (1 / 90) ** 0.5]
    found = [weight.scaling.target.max().item() for weight in scaling.weights]
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_cold_solve_does_not_drift_where_products_are_rounded():
    """Images that are carried along for hundreds of iterations drift away from what the matrix makes of the block."""
    layer = nn.Linear(256, 256, bias=False)
    nn.init.orthogonal_(layer.weight, generator=torch.Generator().manual_seed(0))
    # No switch is on, so that no product is protected.
    with RoundedProducts():
        scaling = apply_norm_scaling(layer, "spectral")
    assert scaling.weights[0].scaling.target.item() == pytest.approx(1, rel=1e-2)


def on_rounding_hardware(graph, example_inputs):
    """A backend of torch.compile; the tracing refuses a dispatch mode, the graph's own run does not."""

    def run(*inputs):
        with RoundedProducts():
            return graph(*inputs)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("backend", [on_rounding_hardware, "aot_eager"])
def test_a_compiled_step_is_as_right(backend):
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(90, 80), nn.Linear(80, 10))
    scaling = apply_norm_scaling(model, "spectral", target=0.5)
    step = torch.compile(scaling.step, fullgraph=True, backend=backend)
    with restored():
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            step()
        assert torch.get_float32_matmul_precision() == "medium"
    assert max(map(off_target, scaling.weights)) <= 1e-4


def test_autocast_keeps_its_copies_of_the_weights():
    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func.overloadpacket.__name__ == "_to_copy"
            return func(*args, **(kwargs or {}))

    model = net()
    scaling = apply_norm_scaling(model, "spectral")
    x = torch.zeros(2, 4, 6, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        with Casts() as casts:
            model(x)
        assert casts.count == 4
        for call in (measure, spectral_norms, singular_values):
            call(model)
        scaling.audit()
        with Casts() as casts:
            output = model(x + 1)
        assert casts.count == 0
    output.sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_the_switch_of_the_factors_own_device_counts(monkeypatch):
    def rounded(device):
        factor = SimpleNamespace(dtype=torch.float32, is_cpu=device == "cpu", is_cuda=device == "cuda")
        return linalg.may_be_rounded(factor)

    devices = ["cpu", "cuda", "xpu"]
    everywhere = ("high", "medium", "all tf32")
    expected = {
        "cpu": {*everywhere, "all bf16", "mkldnn.matmul bf16", "mkldnn bf16"},
        "cuda": {*everywhere, "allow_tf32", "cuda.matmul tf32"},
        "xpu": {*LEGACY, *NEWER},
    }
    for name, setting in SETTINGS.items():
        with restored():
            setting()
            for device in devices:
                assert rounded(device) == (name in expected[device]), (name, device)
            assert not linalg.may_be_rounded(torch.ones(1, dtype=torch.float64, device="cpu"))
    own = SimpleNamespace(matmul=SimpleNamespace(fp32_precision="none"), allow_tf32=True)
    monkeypatch.setattr(torch.backends, "mkldnn", own)
    assert [device for device in devices if rounded(device)] == ["xpu"]


@pytest.mark.parametrize("digits", [8, 11, 24])
@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(0, 40)] * 3), count=st.integers(1, 3), spread=st.integers(0, 12), seed=st.integers(0)
)
def test_a_product_of_parts_is_as_accurate_as_float32(digits, sizes, count, spread, seed):
    m, n, b = sizes
    generator = torch.Generator().manual_seed(seed % 2**32)
    left, right = (
        torch.randn(shape, generator=generator) * 10 ** (spread * (2 * torch.rand(shape, generator=generator) - 1))
        for shape in [(count, m, n), (count, n, b)]
    )
    exact = left.double() @ right.double()
    # The rounding of `n` products and sums in float32, and that of the parts' own sums.
    limit = (n + 8) * 2**-24 * (left.double().abs() @ right.double().abs())
    # Rows and columns contiguous.
    for a in (left, left.mT.contiguous().mT):
        with RoundedProducts(digits):
            found = product_of_parts(a, right)
        assert found.dtype == torch.float32
        assert ((found.double() - exact).abs() <= limit).all()


@settings(max_examples=200, deadline=None)
@given(st.floats(2.0**-90, 2.0**127, width=32) | st.floats(-(2.0**127), -(2.0**-90), width=32))
def test_three_parts_of_eight_digits_are_the_number(number):
    x = torch.tensor([number])
    parts = []
    for _ in range(3):
        parts.append(linalg._leading_part(x - sum(parts)))
        assert torch.equal(parts[-1].bfloat16().float(), parts[-1])
    assert torch.equal(sum(part.double() for part in parts), x.double())


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("multiply", [product, product_of_parts])
def test_a_product_is_finite_where_float32s_is(multiply, bad):
    a, b = (torch.randn(2, 30, 30, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    a[0, 3, 4] = bad
    b[1, 5, 6] = bad
    with restored():
        torch.set_float32_matmul_precision("medium")
        found = multiply(a, b)
    assert torch.equal(found.isfinite(), (a.double() @ b.double()).isfinite())


@pytest.mark.parametrize("name", ["high", "medium"])
def test_the_hardware_multiplies_as_accurately(name):
    """Not emulated: what this machine makes of the switch."""
    a, b = (torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    exact = a.double() @ b.double()
    with restored():
        SETTINGS[name]()
        found = [product(a, b), product_of_parts(a, b), add_product(torch.zeros_like(a), a, b, alpha=-1).neg()]
    for one in found:
        assert (one - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_without_a_switch_a_product_is_torchs_own():
    a, b = (torch.randn(2, 70, 70, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(product(a, b), a @ b)
    assert torch.equal(add_product(a, a, b, alpha=-1), torch.baddbmm(a, a, b, alpha=-1))


@pytest.mark.parametrize("device", ["cpu", "xpu"])
def test_autocast_of_any_device_is_left_and_comes_back(device):
    @linalg.no_grad_full_precision
    def look():
        return torch.is_autocast_enabled(device), torch.is_grad_enabled()

    with torch.autocast(device, torch.bfloat16):
        assert torch.is_autocast_enabled(device)
        assert look() == (False, False)
        assert torch.is_autocast_enabled(device)
        assert torch.is_grad_enabled()
