"""Every constraint on every kind of layer, in float64 after every step; a new constraint is one entry in `CASES`."""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from torch import nn
from waits import Refuse

from specscale import Cap, Normalize, Orthogonal, apply_norm_scaling
from specscale.constraints import CONSTRAINTS, Constraint
from specscale.norms import SpectralNormByDecomposition
from specscale.polar import polar_factor


class Zoo(nn.Module):
    """Layers of every kind side by side; those with more than 32 rows and columns are iterated on."""

    def __init__(self):
        super().__init__()
        self.tall = nn.Linear(40, 70)
        self.wide = nn.Linear(70, 40)
        self.small = nn.Linear(9, 20)
        self.row = nn.Linear(50, 1)
        self.conv = nn.Conv2d(8, 48, 3)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)
        self.up = nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.attention = nn.MultiheadAttention(36, 2, batch_first=True)
        self.rnn = nn.LSTM(10, 36, batch_first=True)

    def forward(self, noise):
        for layer in (self.tall, self.wide, self.small, self.row):
            yield layer(noise(8, layer.in_features))
        for layer in (self.conv, self.grouped, self.up):
            yield layer(noise(4, 8, 5, 5))
        tokens = noise(4, 3, 36)
        yield self.attention(tokens, tokens, tokens)[0]
        yield self.rnn(noise(4, 3, 10))[0]


def train(model, optimizer, steps):
    """Step on noise, with a target that each layer can follow for a while."""
    generator = torch.Generator().manual_seed(1)
    dtype = model.tall.weight.dtype
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = model(lambda *size: torch.randn(size, generator=generator).to(dtype))
        sum((output - 1).square().mean() for output in outputs).backward()
        optimizer.step()
        yield


def matrices(weight):
    return weight.scaling.view.matrices(weight.parameter.detach()).double()


def distance(a, b):
    return torch.linalg.matrix_norm(a - b, 2)


def with_values(before, change):
    """The matrices with their singular values `S (k, r)` replaced by `change(S)`."""
    left, values, right = torch.linalg.svd(before, full_matrices=False)
    return left @ torch.diag_embed(change(values)) @ right


def frobenius(before, after, target):
    torch.testing.assert_close(torch.linalg.matrix_norm(after), target, rtol=1e-5, atol=0)
    assert_parallel(before, after, torch.linalg.matrix_norm, 1e-5)


def spectral(before, after, target):
    rest = torch.linalg.svdvals(before)[:, 1:]
    expected = torch.cat([target[:, None], rest], dim=1).sort(descending=True).values
    assert ((torch.linalg.svdvals(after) - expected).abs() <= 1e-3 * expected[:, :1]).all()


def clipped(before, after, target):
    expected = with_values(before, lambda s: torch.cat([target[:, None], s[:, 1:].minimum(target[:, None])], dim=1))
    assert (distance(after, expected) <= 1e-5 * target).all()


def cap(before, after, target):
    values, found = (torch.linalg.svdvals(one) for one in (before, after))
    assert (found[:, 0] <= target * (1 + 1e-3)).all()
    assert (found <= values * (1 + 1e-3) + 1e-6 * values[:, :1]).all()
    assert_untouched_below(before, after, target)


def exact_cap(before, after, target):
    expected = with_values(before, lambda s: s.minimum(target[:, None]))
    assert (distance(after, expected) <= 1e-5 * target).all()
    assert (torch.linalg.matrix_norm(after, 2) <= target * (1 + 1e-5)).all()
    assert_untouched_below(before, after, target)


def normalize(before, after, target):
    torch.testing.assert_close(torch.linalg.matrix_norm(after, 2), target, rtol=1e-3, atol=0)
    assert_parallel(before, after, lambda x: torch.linalg.matrix_norm(x, 2), 1e-5)


def normalize_one_sided(before, after, target):
    norm = torch.linalg.matrix_norm(before, 2).minimum(target)
    torch.testing.assert_close(torch.linalg.matrix_norm(after, 2), norm, rtol=1e-3, atol=0)
    assert_parallel(before, after, lambda x: torch.linalg.matrix_norm(x, 2), 1e-5)
    assert_untouched_below(before, after, target)


def orthogonal(before, after, target):
    values = torch.linalg.svdvals(after)
    assert ((values / target[:, None] - 1).abs() <= 1e-5).all()
    # How well the factor is determined depends on the smallest singular value.
    values = torch.linalg.svdvals(before)
    expected = with_values(before, lambda s: target[:, None].expand_as(s))
    assert (distance(after, expected) <= target * (1e-5 + 1e-6 * values[:, 0] / values[:, -1])).all()


def assert_parallel(before, after, norm, tolerance):
    unit = before / norm(before)[:, None, None]
    assert (norm(after / norm(after)[:, None, None] - unit) <= tolerance).all()


def assert_untouched_below(before, after, target):
    """Bit for bit; the solver may be wrong about a norm that is as near to the target as its error."""
    below = torch.linalg.matrix_norm(before, 2) <= target * (1 - 1e-3)
    assert torch.equal(after[below], before[below])


class Case(NamedTuple):
    norm: str | Constraint
    check: Callable
    """Asserts the set and the map: of `(before, after, target)`, float64, `(k, m, n)` twice and `(k,)`."""
    one_sided: bool = False
    reported: float = 1e-3
    """How well, relative, the reported norm is known: under "spectral" the next value is an estimate, and under
    "cap" the target is an upper bound where the whole matrix was scaled down."""


CASES = {
    "frobenius": Case("frobenius", frobenius),
    "rows": Case("rows", frobenius),
    "columns": Case("columns", frobenius),
    "spectral": Case("spectral", spectral, reported=0.05),
    "clipped": Case("clipped", clipped),
    "normalize": Case("normalize", normalize),
    "normalize one-sided": Case(Normalize(one_sided=True), normalize_one_sided, one_sided=True),
    "orthogonal": Case("orthogonal", orthogonal),
    "cap": Case("cap", cap, one_sided=True, reported=0.5),
    "exact cap": Case(Cap(exact=True), exact_cap, one_sided=True),
}
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam slow": lambda p: torch.optim.Adam(p, lr=1e-3),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
}
INITS = (None, "orthogonal")
FORMATS = (torch.contiguous_format, torch.channels_last)
LEAN = [("accelerator", "adam", None, FORMATS[1]), ("cpu", "sgd", "orthogonal", FORMATS[0])]
MANY = [one for one in itertools.product(("cpu", "accelerator"), OPTIMIZERS, INITS, FORMATS) if one not in LEAN]

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
one_sided = pytest.mark.parametrize("case", [one for one in CASES.values() if one.one_sided], ids=str)


@pytest.fixture(params=["cpu", "accelerator"])
def way(request, monkeypatch):
    """A step on a CPU, and that of an accelerator, which a CPU can run too."""
    if request.param == "accelerator":
        monkeypatch.setattr("specscale.linalg.can_sync", lambda tensor: False)
    return request.param


def test_every_constraint_has_a_case():
    assert {one if isinstance(one, str) else one.name for one, *_ in CASES.values()} >= {*CONSTRAINTS}


def assert_held(case, way, optimizer, init, memory_format, steps):
    torch.manual_seed(0)
    model = Zoo().to(memory_format=memory_format)
    scaling = apply_norm_scaling(model, case.norm, init=init)
    constraint = scaling.weights[0].scaling.constraint
    may_wait = way == "cpu" or isinstance(constraint.norm, SpectralNormByDecomposition)
    moved = set()
    for number in train(model, OPTIMIZERS[optimizer](model.parameters()), steps):
        before = {weight.name: matrices(weight) for weight in scaling.weights}
        with nullcontext() if may_wait else Refuse():
            scaling.step()
        metrics = scaling.metrics()
        for weight in scaling.weights:
            name, after, target = weight.name, matrices(weight), weight.scaling.target.double()
            try:
                case.check(before[name], after, target)
            except AssertionError as error:
                error.add_note(f"{name}, step {number}")
                raise
            norm = torch.linalg.matrix_norm(after, "fro" if case.check is frobenius else 2)
            assert metrics[f"norm/{name}"] == pytest.approx(norm.max().item(), rel=case.reported), name
            if not torch.equal(before[name], after):
                moved.add(name)
    # The steps were large enough to need the constraint.
    assert moved if case.one_sided else moved == {*before}


@each_case
@pytest.mark.parametrize(("way", "optimizer", "init", "memory_format"), LEAN, ids=str, indirect=["way"])
def test_each_weight_is_in_the_set_after_every_step(case, way, optimizer, init, memory_format):
    assert_held(case, way, optimizer, init, memory_format, steps=2)


@pytest.mark.slow
@each_case
@pytest.mark.parametrize(("way", "optimizer", "init", "memory_format"), MANY, ids=str, indirect=["way"])
def test_each_weight_is_in_the_set_after_each_of_many_steps(case, way, optimizer, init, memory_format):
    assert_held(case, way, optimizer, init, memory_format, steps=15)


@one_sided
def test_a_matrix_below_its_target_keeps_every_bit(case, way):
    torch.manual_seed(0)
    model = Zoo()
    scaling = apply_norm_scaling(model, case.norm, target=10.0)
    before = [weight.parameter.clone() for weight in scaling.weights]
    # One matrix of four is above.
    with torch.no_grad():
        model.rnn.parametrizations.weight_hh_l0.original[:36] *= 30
    first = model.rnn.weight_hh_l0.detach().clone()
    scaling.step()
    metrics = scaling.metrics()
    for weight, own in zip(scaling.weights, before, strict=True):
        if weight.name == "rnn.weight_hh_l0":
            assert torch.equal(weight.parameter[36:], first[36:])
            assert torch.linalg.matrix_norm(weight.parameter[:36], 2).item() == pytest.approx(10, rel=1e-3)
            assert metrics["norm/rnn.weight_hh_l0"] == pytest.approx(10, rel=1e-3)
        else:
            assert torch.equal(weight.parameter.view(torch.int32), own.view(torch.int32)), weight.name
            norm = torch.linalg.matrix_norm(matrices(weight), 2).max().item()
            assert metrics[f"norm/{weight.name}"] == pytest.approx(norm, rel=1e-3)
            assert metrics[f"excess/{weight.name}"] == pytest.approx(norm / 10 - 1, rel=1e-3)
    assert scaling.audit().worst_excess <= 1e-3


@each_case
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-3), (torch.bfloat16, 0.02)], ids=str)
def test_weights_of_other_dtypes_are_held_as_near_as_they_allow(case, dtype, tolerance):
    torch.manual_seed(0)
    model = Zoo().to(dtype)
    scaling = apply_norm_scaling(model, case.norm, init="orthogonal")
    for _ in train(model, torch.optim.Adam(model.parameters(), lr=1e-2), 1):
        scaling.step()
        for weight in scaling.weights:
            assert weight.parameter.dtype == dtype
            target = weight.scaling.target.double()
            values = torch.linalg.svdvals(matrices(weight)) / target[:, None]
            if case.check is frobenius:
                values = values.square().sum(-1, keepdim=True).sqrt()
            if case.norm != "spectral":
                assert (values[:, 0] <= 1 + tolerance).all(), weight.name
            if not case.one_sided:
                assert ((values - 1).abs().amin(-1) <= tolerance).all(), weight.name
            if case.norm == "orthogonal":
                assert ((values - 1).abs() <= tolerance).all(), weight.name


@each_case
def test_a_matrix_of_zeros_and_one_that_is_skipped_stay(case, way):
    torch.manual_seed(0)
    model = nn.LSTM(40, 36)
    with torch.no_grad():
        model.weight_hh_l0[:36] = 0
    with pytest.warns(UserWarning, match="'weight_hh_l0' holds a zero (matrix|row|column)"):
        scaling = apply_norm_scaling(model, case.norm)
    parameter = model.parametrizations.weight_hh_l0.original
    with torch.no_grad():
        parameter[36:] *= 2
    before = parameter.clone()
    scaling.step()
    assert torch.equal(parameter[:36], before[:36])
    assert all((parameter != before)[rows : rows + 36].any() for rows in (36, 72, 108))
    with torch.no_grad():
        parameter[:36] = torch.eye(36)
    scaling.step()
    assert torch.equal(parameter[:36], torch.eye(36)), "skipped since apply"


@pytest.mark.parametrize("shape", [(48, 48), (90, 40), (40, 90)], ids=str)
@pytest.mark.parametrize("least", [0.9, 0.1, 1e-2, 1e-3, 1e-4])
def test_the_polar_iteration_converges_from_singular_values_of(least, shape, way):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(2, *shape, dtype=torch.float64), full_matrices=False)
    values = torch.stack([torch.logspace(0, torch.tensor(least).log10(), 40 + 8 * (shape == (48, 48))) for _ in "ab"])
    values[1, 1:] = 1
    values[1, -1] = least
    matrices = (left @ torch.diag_embed(values.double()) @ right).float()
    factor, residual = polar_factor(matrices, torch.full((2,), 1.01), 16)
    rest = torch.linalg.svdvals(factor.double()) - 1
    assert (rest.abs() <= 1e-5).all()
    assert ((rest + 1).square() - 1).abs().max() <= 3 * residual.max()
    assert (distance(factor.double(), left @ right) <= 1e-5 + 1e-6 / least).all()


@pytest.mark.parametrize("second", [0.0, 1e-6])
def test_a_value_that_is_nearly_zero_is_reported_and_keeps_no_other_from_its_target(second, way):
    torch.manual_seed(0)
    model = nn.Linear(60, 50)
    with torch.no_grad():
        model.weight[0] = model.weight[1] * (1 + second)
        model.weight[0, 0] += second
    scaling = apply_norm_scaling(model, "orthogonal", target=2.0)
    scaling.step()
    values = torch.linalg.svdvals(model.weight.detach().double()) / 2
    assert (values[:-1] - 1).abs().max() <= 1e-5
    assert values[-1] < 0.5
    (residual,) = (value for name, value in scaling.metrics().items() if name.startswith("residual/"))
    assert residual > 0.5
    if second:
        scaling.step()
        scaling.step()
        values = torch.linalg.svdvals(model.weight.detach().double()) / 2
        assert (values - 1).abs().max() <= 1e-5, "later steps have raised it"


def test_orthogonal_takes_at_least_one_iteration():
    with pytest.raises(ValueError, match="max_iterations must be at least 1"):
        Orthogonal(max_iterations=0)
