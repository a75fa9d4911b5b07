"""Rows and columns: each output's or each input's weights keep their own norm."""

import copy
import math

import pytest
import torch
import transformers
from held import saved
from torch import nn
from torch.linalg import vector_norm
from torch.utils._python_dispatch import TorchDispatchMode

from specscale import (
    LayerRule,
    MatrixView,
    NonFiniteWeightError,
    NormScaler,
    apply_norm_scaling,
    is_norm_scaled,
    measure,
    spectral_norms,
)

NORMS = ["rows", "columns"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(20, 48)
        self.conv = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(16, 8, 3, groups=4)
        self.up = nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.gpt = transformers.pytorch_utils.Conv1D(40, 150)
        self.qkv = nn.MultiheadAttention(40, 4)
        self.head = nn.Linear(40, 5)

    def forward(self, index):
        x = self.conv(self.tokens(index).unflatten(-1, (3, 4, 4)).repeat(1, 1, 2, 2)).relu()
        x = self.up(self.grouped(self.depthwise(x).relu())).relu().flatten(1)
        x = self.gpt(x)
        return self.head(x + self.qkv(x, x, x)[0])


OF_ROWS = {
    "tokens": lambda w: vector_norm(w, dim=1),
    "conv": lambda w: vector_norm(w, dim=(1, 2, 3)),
    "depthwise": lambda w: vector_norm(w, dim=(1, 2, 3)),
    "grouped": lambda w: vector_norm(w, dim=(1, 2, 3)),
    "up": lambda w: vector_norm(w.unflatten(0, (2, 4)), dim=(1, 3, 4)).flatten(),
    "gpt": lambda w: vector_norm(w, dim=0),
    "qkv": lambda w: vector_norm(w, dim=1),
    "qkv.out_proj": lambda w: vector_norm(w, dim=1),
    "head": lambda w: vector_norm(w, dim=1),
}
OF_COLUMNS = {
    "tokens": lambda w: vector_norm(w, dim=0),
    "conv": lambda w: vector_norm(w, dim=(0, 2, 3)),
    "depthwise": lambda w: vector_norm(w.unflatten(0, (8, 2)), dim=(1, 3, 4)).flatten(),
    "grouped": lambda w: vector_norm(w.unflatten(0, (4, 2)), dim=(1, 3, 4)).flatten(),
    "up": lambda w: vector_norm(w, dim=(1, 2, 3)),
    "gpt": lambda w: vector_norm(w, dim=1),
    "qkv": lambda w: vector_norm(w.unflatten(0, (3, 40)), dim=1).flatten(),
    "qkv.out_proj": lambda w: vector_norm(w, dim=0),
    "head": lambda w: vector_norm(w, dim=0),
}
EXACT = {"rows": OF_ROWS, "columns": OF_COLUMNS}


def net(memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    model = Net()
    for layer in (model.conv, model.depthwise, model.grouped, model.up):
        layer.to(memory_format=memory_format)
    return model


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        index = torch.randint(20, (12,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(index), index % 5).backward()
        optimizer.step()
        yield


def scaled(norm, model=None, **options):
    model = net() if model is None else model
    options = {"include": ["*", nn.Embedding], **options}
    return model, apply_norm_scaling(model, norm, **options)


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setattr("specscale.linalg.can_sync", lambda tensor: False)


@pytest.mark.parametrize("on", ["cpu", "accelerator"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("target", ["initial", 0.5])
@pytest.mark.parametrize("norm", NORMS)
def test_every_row_or_column_is_on_its_target_after_every_step(norm, target, memory_format, on, request):
    if on == "accelerator":
        request.getfixturevalue("accelerator")
    model, scaling = scaled(norm, net(memory_format), target=target)
    before = {weight.name: EXACT[norm][weight.name](weight.parameter.detach().double()) for weight in scaling.weights}
    assert list(before) == list(EXACT[norm])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaling.attach(optimizer)
    for _ in train(model, optimizer, 4):
        metrics = scaling.metrics()
        for weight in scaling.weights:
            held = EXACT[norm][weight.name](weight.parameter.detach().double())
            expected = before[weight.name] if target == "initial" else torch.full_like(held, target)
            torch.testing.assert_close(held, expected, rtol=2e-6, atol=0)
            assert metrics[f"norm/{weight.name}"] == pytest.approx(expected.max().item(), rel=2e-6)
    assert scaling.audit().worst_excess < 2e-6
    assert scaling.audit().worst_error < 2e-6
    shapes = {one.name: (one.count, one.shape) for one in scaling.audit().certificates}
    assert shapes["conv"] == ((8, (1, 27)) if norm == "rows" else (3, (8, 9)))
    assert shapes["qkv"] == ((120, (1, 40)) if norm == "rows" else (120, (40, 1)))


@pytest.mark.parametrize("norm", NORMS)
def test_rows_of_an_orthogonal_matrix_have_the_norm_of_the_named_targets(norm):
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 50), nn.Conv2d(4, 60, 2, groups=2), nn.Conv2d(20, 6, 3))
    scaling = apply_norm_scaling(model, norm, init="orthogonal", gain=2.0, target="channels")
    held, targets = {}, {}
    for weight in scaling.weights:
        exact = vector_norm(weight.view.matrices(weight.parameter.detach().double()), dim=(1, 2))
        held[weight.name] = exact / 2
        (targets[weight.name],) = set(weight.scaling.target.tolist())
        # By channels, the gain of the target is another one than that of the init.
        gain = {"0": math.sqrt(20 / 30), "1": math.sqrt(50 / 20), "2": math.sqrt(30 / 2), "3": math.sqrt(6 / 20)}
        root_mean_square = exact.square().mean().sqrt().item() / 2
        assert targets[weight.name] == pytest.approx(gain[weight.name] * root_mean_square, rel=1e-5)
    # The rows of a wide matrix, and the columns of a tall one, all have it.
    for name in ("0", "3") if norm == "rows" else ("1",):
        torch.testing.assert_close(held[name], torch.ones_like(held[name]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        (None, False),
        ("*", False),
        (lambda name, module: True, False),
        ([nn.Linear, "gpt"], False),
        (nn.Embedding, True),
        ("tokens", True),
        ("tok*", True),
        (["head", "tokens"], True),
        (lambda name, module: isinstance(module, nn.Embedding), True),
    ],
)
def test_an_embedding_is_held_where_a_pattern_names_it_and_nothing_else(include, expected):
    _, scaling = scaled("rows", include=include)
    assert ("tokens" in [weight.name for weight in scaling.weights]) == expected


@pytest.mark.parametrize("norm", ["frobenius", "spectral", "clipped"])
def test_other_norms_leave_embeddings_alone(norm):
    with pytest.raises(
        ValueError, match="include pattern 'tokens' matches no weight that this norm scales, but the emb"
    ):
        apply_norm_scaling(net(), norm, include="tokens")
    with pytest.raises(ValueError, match="no weight of Net is selected"):
        apply_norm_scaling(net(), norm, include=nn.Embedding)
    assert len(apply_norm_scaling(net(), norm, include=[nn.Linear, nn.Embedding]).weights) == 2


@pytest.mark.parametrize("pattern", [nn.Embedding, "tokens", lambda name, module: name == "tokens"])
def test_a_pattern_of_norm_names_an_embedding_too(pattern):
    scaling = apply_norm_scaling(net(), {pattern: "rows", "*": "cap"})
    under = {weight.name: weight.scaling.constraint.name for weight in scaling.weights}
    assert under == dict.fromkeys(OF_ROWS, "cap") | {"tokens": "rows"}
    others = apply_norm_scaling(net(), {"head": "cap", "*": "rows"})
    assert "tokens" not in [weight.name for weight in others.weights]


def test_an_embedding_is_refused_under_a_norm_that_does_not_scale_it():
    model, norm, include = net(), {"head": "rows", "*": "cap"}, ["tokens", "head"]
    with pytest.raises(ValueError, match="'tokens' is an embedding, which 'cap' does not scale; choose 'rows' or 'col"):
        apply_norm_scaling(model, norm, include=include)
    assert not is_norm_scaled(model)
    rule = LayerRule(nn.Embedding, {"weight": MatrixView("o i")})
    assert len(apply_norm_scaling(model, norm, include=include, rules=rule).weights) == 2


@pytest.mark.parametrize("norm", NORMS)
def test_measure_shows_whole_matrices_beside_the_target_of_their_parts(norm):
    model, scaling = scaled(norm)
    found = {one.name: one for one in measure(model).weights}
    assert found["head"].constraint == norm
    assert found["head"].shape == (5, 40)
    assert found["head"].target == scaling.metrics()["target/head"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 6, padding_idx=0)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, index):
        return self.head(self.tokens(index))


@pytest.mark.parametrize(("include", "name"), [(None, "head"), ("head", "head"), (nn.Embedding, "tokens")])
def test_a_tied_embedding_is_scaled_once_and_a_row_of_zeros_stays_zero(include, name):
    model = Tied()
    with pytest.warns(UserWarning, match=f"'{name}' holds a zero row, which has no direction"):
        scaling = apply_norm_scaling(model, "rows", include=include)
    assert [weight.name for weight in scaling.weights] == [name]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaling.attach(optimizer)
    target = vector_norm(model.tokens.weight.detach().double(), dim=1)
    for _ in range(3):
        optimizer.zero_grad()
        model.tokens(torch.arange(11)).exp().sum().backward()
        optimizer.step()
        torch.testing.assert_close(vector_norm(model.tokens.weight.detach().double(), dim=1), target)
    assert not bool(model.tokens.weight[0].any())
    assert model.head.weight is model.tokens.weight


@pytest.mark.parametrize("norm", NORMS)
def test_a_checkpoint_goes_on_bit_for_bit(norm):
    model, scaling = scaled(norm, target=0.7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaling.attach(optimizer)
    for _ in train(model, optimizer, 2):
        pass
    other, resumed = scaled(norm)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert saved(resumed.metrics()) == saved(scaling.metrics()) == saved(NormScaler.of(other).metrics())
    for one, handle in ((model, scaling), (other, resumed)):
        with torch.no_grad():
            one.conv.weight.add_(0.1)
        handle.step()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert net().load_state_dict(scaling.plain_state_dict()).missing_keys == []
    apply_norm_scaling(mismatched := net(), "frobenius")
    with pytest.raises(ValueError, match="target of 'conv' is not of the frobenius norm"):
        mismatched.load_state_dict(model.state_dict())
    mismatched, _ = scaled("rows" if norm == "columns" else "columns")
    with pytest.raises(ValueError, match=r"target of 'tokens' is not of the (row|column)-wise Frobenius norm"):
        mismatched.load_state_dict(model.state_dict())


def test_in_plain_a_grown_embedding_and_layer_get_as_many_rows():
    model, scaling = scaled("rows", target=0.5)
    kept = model.gpt.parametrizations.weight[0].norm.clone()
    with scaling.plain():
        model.tokens = nn.Embedding(30, 48)
        model.head = nn.Linear(40, 9)
    counts = {weight.name: weight.view.count for weight in scaling.weights}
    assert (counts["tokens"], counts["head"], counts["gpt"]) == (30, 9, 40)
    assert torch.equal(model.gpt.parametrizations.weight[0].norm, kept)
    scaling.project()
    torch.testing.assert_close(vector_norm(model.tokens.weight.detach(), dim=1), torch.full((30,), 0.5))
    torch.testing.assert_close(vector_norm(model.head.weight.detach(), dim=1), torch.full((9,), 0.5))


def test_norms_of_a_model_are_those_of_its_layers_matrices():
    model, _ = scaled("rows")
    assert spectral_norms(model) == spectral_norms(net())
    assert "rows, 40 matrices, target=" in repr(model)


class Count(TorchDispatchMode):
    def __init__(self):
        self.num_operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_operations += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_takes_as_many_operations_for_few_rows_as_for_many(norm, accelerator):
    counts = []
    for size in (3, 300):
        model = nn.Sequential(nn.Linear(size, size), nn.Conv2d(size, size, 1))
        scaling = apply_norm_scaling(model, norm)
        scaling.step()
        scaling.step()
        with Count() as count:
            scaling.step()
        counts.append(count.num_operations)
    # What was found of many is reduced by torch when it is read.
    assert counts[1] - counts[0] <= 10
    assert counts[0] < 80


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [3, 300])
@pytest.mark.parametrize("on", ["cpu", "accelerator"])
def test_a_bad_row_is_named_and_left_alone(bad, size, on, request):
    if on == "accelerator":
        request.getfixturevalue("accelerator")
    model = nn.Sequential(nn.Linear(4, size), nn.Linear(size, 4))
    scaling = apply_norm_scaling(model, "rows", target=0.5)
    with torch.no_grad():
        model[0].weight[1, 2] = bad
    if on == "accelerator":
        scaling.step()
    with pytest.raises(NonFiniteWeightError, match="the weight of '0' holds NaN or infinity"):
        scaling.step()
    if on == "accelerator":
        held = vector_norm(model[0].weight.detach(), dim=1)
        assert not held[1].isfinite()
        torch.testing.assert_close(held[2:], torch.full((size - 2,), 0.5))


def test_kernels_leave_thin_matrices_to_torch():
    pytest.importorskip("triton")
    from specscale import grouped

    for norm, fits in (("frobenius", True), ("rows", False), ("columns", False)):
        scaling = apply_norm_scaling(nn.Linear(40, 30), norm)
        assert [grouped.fits(weight) for weight in scaling.weights] == [fits]


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_a_compiled_step_holds_them(norm):
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(7, 1), nn.Linear(1, 7), nn.ConvTranspose2d(8, 6, 2, groups=2))
    scaling = apply_norm_scaling(model, norm, target=0.5)
    torch.compile(scaling.step, fullgraph=True, backend="aot_eager")()
    for weight in scaling.weights:
        held = vector_norm(weight.view.matrices(weight.parameter.detach().double()), dim=(1, 2))
        torch.testing.assert_close(held, torch.full_like(held, 0.5), rtol=1e-6, atol=0)
