"""Targets relative to what is there, from functions, one for each matrix, and by pattern."""

import warnings
from fnmatch import fnmatchcase

import pytest
import torch
from held import off_target
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from specscale import NormScaler, Relative, apply_norm_scaling, orthogonal_init_


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = self.attn["qkv"](x).chunk(3, -1)
        x = x + self.attn["proj"](nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(x)


class GPT(nn.Module):
    def __init__(self, width=12, depth=2):
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 16)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def gpt():
    torch.manual_seed(0)
    return GPT()


def train(model, optimizer, num_steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        tokens = torch.randint(16, (4, 9), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        yield


ORDS = {"frobenius": "fro", "spectral": 2, "clipped": 2}


def norms(weight):
    matrices = weight.scaling.view.matrices(weight.parameter.detach()).double()
    return torch.linalg.matrix_norm(matrices, ORDS[weight.scaling.constraint.name])


def targets(scaling):
    return {weight.name: weight.scaling.target.tolist() for weight in scaling.weights}


@pytest.mark.parametrize(
    "norm", ["frobenius", "spectral", "clipped", {"*.attn": "spectral", "*.mlp": "frobenius"}], ids=str
)
def test_a_gpt_keeps_its_attention_holds_its_mlps_at_half_and_leaves_its_head_alone(norm):
    model = gpt()
    before = {name: layer.weight.detach().clone() for name, layer in model.named_modules() if hasattr(layer, "weight")}
    scaling = apply_norm_scaling(model, norm, target={"*.attn": "initial", "*.mlp": Relative(0.5)}, exclude="head")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaling.attach(optimizer)
    for _ in train(model, optimizer, 3):
        for weight in scaling.weights:
            assert off_target(weight) < 1e-3
    assert len(scaling.weights) == 8
    for weight in scaling.weights:
        initial = weight.scaling.view.matrices(before[weight.name]).double()
        factor = 1 if ".attn" in weight.name else 0.5
        exact = factor * torch.linalg.matrix_norm(initial, ORDS[weight.scaling.constraint.name])
        torch.testing.assert_close(weight.scaling.target.double(), exact, rtol=2e-5, atol=0)
    moved = (model.head.weight - before["head"]).abs().max()
    assert moved > 0.01, "the head is trained like any other"


@pytest.mark.parametrize("init", [None, "orthogonal"])
@given(factor=st.floats(0.01, 100), norm=st.sampled_from(list(ORDS)), is_own=st.booleans())
@settings(max_examples=12, deadline=None)
def test_a_relative_target_is_a_multiple_of_each_matrix_own_norm(init, factor, norm, is_own):
    model = nn.ModuleDict({"qkv": nn.Linear(7, 21), "conv": nn.Conv2d(4, 6, 3, groups=2), "out": nn.Linear(21, 2)})
    with torch.no_grad():
        model["qkv"].weight[7:14] *= 3
    target = (lambda name, module, norms: factor * norms) if is_own else Relative(factor)
    scaling = apply_norm_scaling(model, norm, init=init, target=target)
    for weight in scaling.weights:
        torch.testing.assert_close(weight.scaling.target.double(), factor * norms(weight), rtol=1e-5, atol=0)


def test_initial_is_relative_to_one():
    relative, initial = gpt(), gpt()
    apply_norm_scaling(relative, target=Relative(1))
    apply_norm_scaling(initial)
    torch.testing.assert_close(relative.state_dict(), initial.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "answer", [lambda t: t, lambda t: t.tolist(), lambda t: tuple(t.tolist()), lambda t: t.numpy(), lambda t: t.float()]
)
def test_a_function_may_return_one_number_for_each_matrix(answer):
    model = nn.ModuleDict({"qkv": nn.Linear(4, 12), "head": nn.Linear(4, 2)})
    ask = {"qkv": torch.tensor([1.0, 2.0, 3.0]), "head": torch.tensor([0.5])}
    scaling = apply_norm_scaling(model, target=lambda name, module: answer(ask[name]))
    assert targets(scaling) == {"qkv": [1, 2, 3], "head": [0.5]}


def test_what_a_function_is_asked_with():
    asked = {}

    def target(name, module, scale=2.0, *, norms):
        asked[name] = module, norms
        return norms.mean() * scale

    model = nn.ModuleDict({"qkv": nn.Linear(4, 12), "head": nn.Linear(4, 2)})
    layers = dict(model)
    with pytest.warns(UserWarning, match="for 'qkv' is the norm of each"):
        scaling = apply_norm_scaling(model, target=target)
    for weight in scaling.weights:
        module, own = asked[weight.name]
        assert module is layers[weight.name]
        assert own.dtype == torch.float32
        torch.testing.assert_close(own.double(), norms(weight), rtol=1e-5, atol=0)
        assert weight.scaling.target.tolist() == pytest.approx([2 * own.mean().item()] * len(own))


@pytest.mark.parametrize(
    ("number", "warns"), [(1.0, False), (1.45, False), (1 / 1.45, False), (3**0.5, True), (0.5, True)]
)
def test_a_single_number_that_no_matrix_has_is_warned_of(number, warns):
    model = nn.ModuleDict({"qkv": nn.Linear(4, 12), "rest": nn.Linear(12, 12), "kv": nn.Linear(4, 8)})
    orthogonal_init_(model, 1.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        scaling = apply_norm_scaling(model, target=lambda name, module: number)
    assert targets(scaling) == {
        "qkv": [pytest.approx(number)] * 3,
        "rest": [pytest.approx(number)],
        "kv": [pytest.approx(number)] * 2,
    }
    expected = (
        "apply_norm_scaling: the target function's number for 'qkv', 'kv' is the norm of each of the weight's "
        "matrices, and more than 1.5 times off what each of them has; return one number for each matrix, such as "
        "0.5 * norms from a function (name, module, norms)"
    )
    assert [str(one.message) for one in said] == [expected] * warns


def test_a_single_number_that_one_matrix_has_and_one_for_each_are_not_warned_of():
    model = nn.ModuleDict({"qkv": nn.Linear(4, 12)})
    orthogonal_init_(model, 1.0)
    with torch.no_grad():
        model["qkv"].weight[:4] *= 5
    apply_norm_scaling(model, target=lambda name, module: 5.0).remove()
    apply_norm_scaling(model, target=lambda name, module: [50, 50, 50]).remove()
    apply_norm_scaling(model, target=50).remove()
    nn.init.zeros_(model["qkv"].weight)
    apply_norm_scaling(model, target=lambda name, module: 5.0)


def test_a_zero_matrix_has_no_relative_target():
    model = nn.ModuleDict({"qkv": nn.Linear(4, 12), "head": nn.Linear(4, 2)})
    with torch.no_grad():
        model["qkv"].weight[4:8] = 0
        model["head"].weight.zero_()
    with pytest.warns(UserWarning, match="holds a zero matrix") as said:
        scaling = apply_norm_scaling(model, target=Relative(0.5))
    assert len(said) == 2
    (weight,) = scaling.weights
    assert weight.scaling.skip_mask.tolist() == [0, 1, 0]
    torch.testing.assert_close(weight.scaling.target.double(), 0.5 * norms(weight), rtol=1e-5, atol=0)


PATTERNS = ("*", "blocks", "blocks.0", "blocks.?.mlp", "*.mlp.0", "*qkv", "head", "blocks.1.attn.proj")


@given(st.lists(st.sampled_from(PATTERNS), unique=True, min_size=1))
@settings(max_examples=30, deadline=None)
def test_the_first_pattern_that_matches_a_weight_wins(patterns):
    model = GPT(4)
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]

    def matches(name, pattern):
        parts = name.split(".")
        return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))

    expected = {name: next((i + 1 for i, one in enumerate(patterns) if matches(name, one)), None) for name in names}
    setting = {pattern: number + 1 for number, pattern in enumerate(patterns)}
    if unused := [pattern for pattern, number in setting.items() if number not in expected.values()]:
        with pytest.raises(ValueError, match="and the first match wins; put it in front of them") as error:
            apply_norm_scaling(model, "frobenius", target=setting)
        assert f"target pattern {unused[0]!r} is left no weight" in str(error.value)
    elif None in expected.values():
        with pytest.raises(ValueError, match="no pattern of target matches") as error:
            apply_norm_scaling(model, "frobenius", target=setting)
        assert repr(next(name for name in names if expected[name] is None)) in str(error.value)
    else:
        scaling = apply_norm_scaling(model, "frobenius", target=setting)
        assert {name: set(own) for name, own in targets(scaling).items()} == {n: {t} for n, t in expected.items()}


def test_keys_are_what_include_takes():
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "first": nn.Linear(4, 4), "last": nn.Linear(4, 2)})
    setting = {nn.Conv2d: 1.0, lambda name, module: module.__class__ is nn.Linear and name == "last": 2.0, "*": 3.0}
    scaling = apply_norm_scaling(model, target=setting)
    assert targets(scaling) == {"conv": [1], "first": [3], "last": [2]}


def test_a_tied_weight_matches_by_any_of_its_layers():
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "last": nn.Linear(4, 4)})
    model["last"].weight = model["first"].weight
    assert targets(apply_norm_scaling(model, target={"last": 2.0})) == {"first": [2]}


def test_norms_targets_and_gains_by_pattern_are_independent():
    model = gpt()
    scaling = apply_norm_scaling(
        model,
        {"*.mlp": "frobenius", "*": "spectral"},
        init="orthogonal",
        gain={"head": 0.25, "*": "matrix"},
        target={"*.attn": "channels", "blocks.0": Relative(2), "*": "initial"},
    )
    names = {weight.name: weight.scaling.constraint.name for weight in scaling.weights}
    assert {name for name, norm in names.items() if norm == "frobenius"} == {n for n in names if ".mlp" in n}
    for weight in scaling.weights:
        m, n = weight.scaling.matrix_shape(weight.parameter)
        gain = 0.25 if weight.name == "head" else (m / n) ** 0.5
        size = min(m, n) ** 0.5 if weight.scaling.constraint.name == "frobenius" else 1
        assert norms(weight).tolist() == pytest.approx([gain * size] * weight.scaling.view.count)
        factor = 2 if weight.name.startswith("blocks.0.mlp") else 1
        assert weight.scaling.target.tolist() == pytest.approx([factor * gain * size] * weight.scaling.view.count)


def test_the_init_alone_takes_gains_by_pattern():
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "last": nn.Linear(4, 4)})
    orthogonal_init_(model, {"first": 2.0, "*": lambda name, module: 3.0})
    for name, gain in (("first", 2), ("last", 3)):
        values = torch.linalg.svdvals(model[name].weight.detach())
        torch.testing.assert_close(values, torch.full_like(values, gain))


def by_layers():
    return nn.ModuleDict({"encoder": nn.Linear(4, 4), "head": nn.Linear(4, 2)})


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"norm": {"*": "nuclear"}}, ValueError, "unknown norm 'nuclear' for pattern '*'; choose 'frobenius'"),
        ({"norm": {"head": "spectral"}}, ValueError, "no pattern of norm matches 'encoder'; add '*' for the rest"),
        ({"gain": {"head": 1.0}, "init": "orthogonal"}, ValueError, "no pattern of gain matches 'encoder'; add '*'"),
        ({"target": {}}, ValueError, "no pattern of target matches 'encoder', 'head'; add '*' for the"),
        ({"target": {"heads": 1.0, "*": 2.0}}, ValueError,
         "target pattern 'heads' matches no selected weight; the nearest names are 'head'"),
        ({"target": {nn.Conv2d: 1.0, "*": 2.0}}, ValueError, "target pattern Conv2d matches no selected weight"),
        ({"target": {"head": 1.0, "*": 2.0}, "exclude": "head"}, ValueError,
         "target pattern 'head' matches no selected weight"),
        ({"target": {"*": 1.0, "head": 2.0}}, ValueError,
         "target pattern 'head' is left no weight: patterns before it match all of its own"),
        ({"target": {3: 1.0}}, TypeError,
         "target takes shell patterns on module names, types of layers, or predicates"),
        ({"target": {"*": "final"}}, ValueError,
         "unknown target 'final' for pattern '*'; choose 'initial', 'channels'"),
        ({"target": {"head": -1.0, "*": 1.0}}, ValueError,
         "target must be finite and positive for pattern 'head', found -1.0"),
        ({"target": {"head": [1.0], "*": 1.0}}, TypeError, "target must be a number for pattern 'head', found list"),
        ({"target": lambda name, module: [1.0, 2.0]}, ValueError,
         "target must be one number for 'encoder', or one for each of its 1 matrices, found 2"),
        ({"target": lambda name, module: ["a"]}, TypeError, "target must be a number for 'encoder', found str"),
        ({"target": lambda name, module: "a"}, TypeError, "target must be a number for 'encoder', found str"),
        ({"target": lambda name, module, norms: 0 * norms}, ValueError,
         "target must be finite and positive for 'encoder', found 0.0"),
        ({"target": lambda name, module: torch.ones(1, 2)}, TypeError,
         "target must be a number for 'encoder', found list"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(options, error, text):
    model = by_layers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error) as raised:
        apply_norm_scaling(model, **options)
    assert str(raised.value).startswith(f"apply_norm_scaling: {text}")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_many_weights_without_a_pattern_are_counted_not_listed():
    with pytest.raises(ValueError, match=r"matches 'blocks.0.mlp.0', 'blocks.0.mlp.2', 'blocks.1.mlp.0', ...; add"):
        apply_norm_scaling(gpt(), target={"*.attn": 1.0})


@pytest.mark.parametrize(("factor", "error"), [("a", TypeError), (0, ValueError), (float("inf"), ValueError)])
def test_a_relative_target_has_a_positive_factor(factor, error):
    with pytest.raises(error, match="Relative: factor must be"):
        Relative(factor)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Relative(0.5), lambda weight: 0.5 * norms(weight)),
        ({"qkv": lambda name, module, norms: [1.0, 2.0, *norms[2:]], "*": 1.0},
         lambda weight: [1, 2, norms(weight)[2]]),
        ({"qkv": "initial", "*": Relative(3)}, norms),
        ({"qkv": "features", "*": 3.0}, norms),
        ({"qkv": 0.7, "*": 3.0}, lambda weight: [0.7] * 3),
    ],
)  # fmt: skip
def test_a_weight_of_another_shape_gets_what_the_call_has_said(target, expected):
    model = nn.Sequential()
    model.qkv, model.head = nn.Linear(4, 12), nn.Linear(12, 2)
    scaling = apply_norm_scaling(model, target=target, example_input=torch.zeros(1, 4))
    kept = scaling.weights[1].scaling.target.clone()
    with scaling.plain():
        model.qkv = nn.Linear(6, 18)
    weight, head = scaling.weights
    got = weight.scaling.target.double()
    torch.testing.assert_close(got, torch.as_tensor(expected(weight)).double(), rtol=1e-5, atol=0)
    assert torch.equal(head.scaling.target, kept)


def test_a_weight_that_no_pattern_matches_any_more_is_let_go():
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    scaling = apply_norm_scaling(model, target={"first": 1.0, "head": 2.0})
    plain = scaling.plain()
    plain.__enter__()
    model["last"] = model.pop("head")
    model["last"].weight.data = torch.ones(3, 4)
    with pytest.warns(UserWarning, match="'head'.*cannot be scaled: Refusal: no pattern of target matches 'last'"):
        plain.__exit__(None, None, None)
    assert [weight.name for weight in scaling.weights] == ["first"]


def test_the_handle_of_a_loaded_model_has_the_targets():
    source, other = gpt(), gpt()
    apply_norm_scaling(source, {"*.attn": "spectral", "*": "frobenius"}, target={"*.mlp": Relative(0.5), "*": "matrix"})
    apply_norm_scaling(other, {"*.attn": "spectral", "*": "frobenius"})
    other.load_state_dict(source.state_dict())
    assert targets(NormScaler.of(other)) == targets(NormScaler.of(source))
