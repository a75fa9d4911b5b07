"""apply_norm_scaling: what it selects, what it starts from, what it refuses."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from specscale import (
    Cap,
    LayerRule,
    MatrixView,
    NonFiniteWeightError,
    NormScaler,
    apply_norm_scaling,
    is_norm_scaled,
    orthogonal_init_,
    remove_norm_scaling,
    singular_values,
    spectral_norms,
)
from specscale.state import NormScaling

COLUMN_NAMES = ("target", "norm", "excess", "drift", "residual", "error")


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 12)
        self.norm = nn.LayerNorm(12)
        self.qkv = nn.Linear(12, 36)
        self.attention = nn.MultiheadAttention(12, 2)
        self.cross = nn.MultiheadAttention(12, 2, kdim=6, vdim=6)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv2 = nn.Conv2d(4, 6, 3, groups=2)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.conv3 = nn.Conv3d(4, 6, 3)
        self.up1 = nn.ConvTranspose1d(4, 6, 3)
        self.up2 = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.up3 = nn.ConvTranspose3d(4, 6, 3)
        self.tied = nn.Linear(12, 36)
        self.tied.weight = self.qkv.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def test_every_kind_of_weight_is_found_once():
    scaling = apply_norm_scaling(Everything())
    counts = {w.name: w.scaling.view.count for w in scaling.weights}
    assert counts == {
        "qkv": 3,
        "attention": 3,
        "attention.out_proj": 1,
        "cross.q_proj_weight": 1,
        "cross.k_proj_weight": 1,
        "cross.v_proj_weight": 1,
        "cross.out_proj": 1,
        "conv1": 1,
        "conv2": 2,
        "depthwise": 4,
        "conv3": 1,
        "up1": 1,
        "up2": 2,
        "up3": 1,
    }


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_initial_targets_are_the_norms_of_the_untouched_weights(norm):
    model = Everything()
    plain = copy.deepcopy(model.state_dict())
    scaling = apply_norm_scaling(model, norm)
    for weight in scaling.weights:
        matrices = weight.scaling.view.matrices(weight.parameter.detach()).double()
        exact = torch.linalg.matrix_norm(matrices, "fro" if norm == "frobenius" else 2)
        torch.testing.assert_close(weight.scaling.target.double(), exact, rtol=1e-5, atol=0)
    assert all(torch.equal(value, plain[name]) for name, value in scaling.plain_state_dict().items())


@pytest.mark.parametrize(
    ("gain", "expected"),
    [("channels", (6 / 4) ** 0.5), ("matrix", (3 / 18) ** 0.5), ("features", (6 * 36 / (4 * 64)) ** 0.5), (0.7, 0.7)],
)
def test_orthogonal_init_has_the_gain_as_every_singular_value(gain, expected):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    orthogonal_init_(model, gain, example_input=torch.zeros(2, 4, 8, 8))
    values = torch.linalg.svdvals(model[0].weight.detach().unflatten(0, (2, 3)).flatten(2))
    torch.testing.assert_close(values, torch.full_like(values, expected))


@pytest.mark.parametrize(("norm", "expected"), [("spectral", 2.0), ("frobenius", 2.0 * 6**0.5)])
def test_a_target_rule_means_the_norm_of_an_orthogonal_matrix_with_that_gain(norm, expected):
    model = nn.Sequential(nn.Linear(6, 24))
    scaling = apply_norm_scaling(model, norm, target="channels")
    assert scaling.metrics()["target/0"] == pytest.approx(expected)
    remove_norm_scaling(model)
    assert apply_norm_scaling(model, norm, target=0.25).metrics()["target/0"] == 0.25


def test_features_restores_modes_and_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    model[2].eval()
    apply_norm_scaling(model, target="features", example_input=torch.randn(2, 3, 8, 8))
    assert [m.training for m in model] == [True, True, False]
    assert model[1].num_batches_tracked == 0


def test_features_restores_modes_where_a_layer_refuses_to_evaluate():
    class Stubborn(nn.ReLU):
        def train(self, mode=True):
            raise RuntimeError("always training")

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Stubborn())
    with pytest.raises(RuntimeError, match="always training"):
        apply_norm_scaling(model, target="features", example_input=torch.randn(2, 3, 8, 8))
    assert all(module.training for module in model.modules())


def test_what_was_left_unscaled_is_listed():
    scaling = apply_norm_scaling(model := small(), include="2")
    plain = dict(small().named_parameters())
    assert list(scaling.unscaled) == [name for name in plain if name != "2.weight"]
    assert all(one is model.get_parameter(name) for name, one in scaling.unscaled.items())
    other = apply_norm_scaling(model, exclude="2")
    assert list(scaling.unscaled) == list(other.unscaled) == [name for name in plain if name.endswith("bias")]


def test_patterns_and_predicates():
    assert [w.name for w in apply_norm_scaling(small(), include="2").weights] == ["2"]
    assert [w.name for w in apply_norm_scaling(small(), exclude=["2"]).weights] == ["0"]
    narrow = apply_norm_scaling(small(), include=lambda name, module: module.out_features == 3)
    assert [w.name for w in narrow.weights] == ["2"]
    mixed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 3))
    assert [w.name for w in apply_norm_scaling(mixed, exclude=nn.Conv2d).weights] == ["1"]


def test_a_tied_weight_goes_by_any_of_its_names():
    def names(**options):
        model = nn.ModuleDict({"body": nn.Linear(4, 4), "first": nn.Linear(3, 3), "second": nn.Linear(3, 3)})
        model.second.weight = model.first.weight
        return [w.name for w in apply_norm_scaling(model, **options).weights]

    assert names() == ["body", "first"]
    assert names(include="second") == ["first"]
    assert names(exclude="second") == ["body"]


def test_the_handle_of_a_model_names_its_layers_as_the_model_does():
    model = nn.ModuleDict({"encoder": small(), "decoder": small()})
    apply_norm_scaling(model.encoder, "frobenius")
    apply_norm_scaling(model.decoder, "spectral")
    scaling = NormScaler.of(model)
    assert [w.name for w in scaling.weights] == ["encoder.0", "encoder.2", "decoder.0", "decoder.2"]
    assert len(scaling.metrics()) == 4 * 6


def test_a_pattern_takes_everything_below_the_modules_that_it_matches():
    def names(**options):
        model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)))
        return [w.name for w in apply_norm_scaling(model, **options).weights]

    assert names(include="1") == ["1.0", "1.2"]
    assert names(exclude="1") == ["0"]
    assert names(include="1", exclude="1.0") == ["1.2"]
    assert names(exclude="1.1") == ["0", "1.0", "1.2"], "a module without weights may be excluded"


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"norm": Cap}, TypeError, r"norm is the class Cap; give a constraint, Cap\(\)"),
        ({"norm": ["spectral"]}, ValueError, r"unknown norm \['spectral'\]; choose"),
        (
            {"norm": "nuclear"},
            ValueError,
            "unknown norm 'nuclear'; choose 'frobenius', 'rows', 'columns', 'spectral', 'clipped', 'cap', "
            "'normalize' or 'orthogonal'",
        ),
        ({"solver": "qr"}, ValueError, "unknown solver 'qr'; choose 'block', 'power' or 'svd'"),
        ({"solver": 3}, TypeError, "solver must be a name or a Block, Power or SVD, found int"),
        ({"init": "zeros"}, ValueError, "unknown init 'zeros'; choose None or 'orthogonal'"),
        ({"target": "final"}, ValueError, "unknown target 'final'; choose 'initial', 'channels'"),
        ({"gain": "initial", "init": "orthogonal"}, ValueError, "unknown gain 'initial'"),
        ({"target": -1.0}, ValueError, "target must be finite and positive, found -1.0"),
        ({"target": float("nan")}, ValueError, "target must be finite and positive, found nan"),
        ({"target": None, "gain": [1], "init": "orthogonal"}, TypeError, "gain must be a number, found list"),
        ({"target": lambda n, m: 0.0}, ValueError, "target must be finite and positive for '0', found 0.0"),
        ({"gain": lambda n, m: "a", "init": "orthogonal"}, TypeError, "gain must be a number for '0', found str"),
        ({"target": "features"}, ValueError, '"features" needs example_input'),
        (
            {"include": "layer*"},
            ValueError,
            "include pattern 'layer.' matches no module; no name is similar to it; the outermost are '0'",
        ),
        ({"exclude": "*"}, ValueError, "no weight of Sequential is selected; it has 2"),
        ({"exclude": 3}, TypeError, "exclude takes shell patterns on module names, types of layers.*, found int"),
        ({"exclude": [nn.ReLU()]}, TypeError, "exclude takes shell patterns on module names, types.*, found ReLU"),
        ({"exclude": "2.weight"}, ValueError, "'2.weight' matches no module; the nearest name is '2'$"),
        (
            {"include": "1"},
            ValueError,
            "include pattern '1' matches no module; no name is similar to it; the outermost are '0', '2'",
        ),
    ],
)
def test_bad_input_is_refused_and_the_model_untouched(options, error, text):
    model = small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text):
        apply_norm_scaling(model, **options)
    assert not is_norm_scaled(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_gain_without_an_init_is_said_to_have_no_effect():
    with pytest.warns(UserWarning, match="gain has no effect without init='orthogonal'"):
        apply_norm_scaling(small(), gain=2.0)


@pytest.mark.parametrize(
    ("late", "text"),
    [
        (lambda: nn.LazyLinear(3), "the weight of '1' has no shape yet; call the lazy model once first"),
        (lambda: nn.Linear(6, 3, device="meta"), "the weight of '1' is on the meta device"),
    ],
)
def test_a_weight_without_numbers_is_refused(late, text):
    model = nn.Sequential(nn.Linear(8, 6), late())
    with pytest.raises(ValueError, match=text):
        apply_norm_scaling(model)
    assert not is_norm_scaled(model)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"apply_norm_scaling: expected a torch.nn.Module, found list"):
        apply_norm_scaling([small()])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_inputs_or_outputs_is_left_out():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 0), nn.Linear(0, 3), nn.Conv2d(3, 3, 1))
    assert [weight.name for weight in apply_norm_scaling(model, init="orthogonal").weights] == ["0", "3"]
    assert list(spectral_norms(model)) == ["0", "3"]


def test_applying_twice_is_refused():
    model = small()
    apply_norm_scaling(model)
    with pytest.raises(ValueError, match="'0' is scaled already; call remove_norm_scaling"):
        apply_norm_scaling(model, "frobenius")


@pytest.mark.parametrize(
    ("compute", "sources"),
    [
        (nn.utils.parametrizations.weight_norm, "'parametrizations.weight.original0', 'parametrizations.weight"),
        (lambda module: prune.l1_unstructured(module, "weight", 0.5), "'weight_orig'"),
    ],
)
def test_a_weight_that_is_computed_from_others_is_refused_and_can_be_measured(compute, sources):
    model = small()
    compute(model[2])
    for call in (apply_norm_scaling, orthogonal_init_):
        with pytest.raises(ValueError, match=rf"{call.__name__}: 'weight' of '2' is computed from {sources}.*exclude"):
            call(model)
    assert not is_norm_scaled(model)
    exact = torch.linalg.matrix_norm(model[2].weight.detach(), 2).item()
    assert spectral_norms(model)["2"] == pytest.approx(exact, rel=1e-5)
    assert [w.name for w in apply_norm_scaling(model, exclude="2").weights] == ["0"]


def test_looking_at_a_computed_weight_changes_nothing():
    model = small()
    nn.utils.parametrizations.spectral_norm(model[2])
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="'weight' of '2' is computed from"):
        apply_norm_scaling(model)
    spectral_norms(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes


def test_a_property_is_computed_too():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(3, 3))

    class Outer(nn.Module):
        weight = property(lambda self: self.inner.kernel)

        def __init__(self):
            super().__init__()
            self.inner = Inner()

    model = nn.Sequential(nn.Linear(3, 3), Outer())
    before = model[0].weight.detach().clone()
    rule = LayerRule(Outer, {"weight": MatrixView("o i")})
    with pytest.raises(ValueError, match=r"'weight' of '1' is computed from 'inner.kernel'"):
        apply_norm_scaling(model, rules=rule, init="orthogonal")
    assert not is_norm_scaled(model)
    assert torch.equal(model[0].weight, before)


def test_a_layer_that_cannot_be_registered_leaves_none_scaled(monkeypatch):
    model = small()
    count = []

    def register(module, *args, **kwargs):
        count.append(module)
        if len(count) == 2:
            raise RuntimeError("no more")
        return original(module, *args, **kwargs)

    original = parametrize.register_parametrization
    monkeypatch.setattr(parametrize, "register_parametrization", register)
    with pytest.raises(RuntimeError, match="no more"):
        apply_norm_scaling(model, init="orthogonal")
    assert not is_norm_scaled(model)
    assert list(dict(model.named_parameters())) == list(dict(small().named_parameters()))
    assert all(torch.equal(value, small().state_dict()[name]) for name, value in model.state_dict().items())


def test_two_parameters_in_the_same_memory_are_refused():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6))
    model[1].weight.data = model[0].weight.data.t()
    with pytest.raises(ValueError, match="'0' and '1' are two parameters in the same memory; exclude one"):
        apply_norm_scaling(model)
    scaling = apply_norm_scaling(model, exclude="1")
    with torch.no_grad():
        model[0].parametrizations.weight.original.mul_(1.5)
    scaling.step()
    assert torch.equal(model[1].weight, model[0].weight.t())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_weight_is_named(bad):
    model = small()
    model[2].weight.data[0, 0] = bad
    with pytest.raises(NonFiniteWeightError, match="the weight of '2' holds NaN or infinity"):
        apply_norm_scaling(model)
    assert not is_norm_scaled(model)


def test_a_zero_weight_is_skipped_by_name():
    model = small()
    nn.init.zeros_(model[2].weight)
    with pytest.warns(UserWarning, match="'2' holds a zero matrix"):
        scaling = apply_norm_scaling(model)
    assert [w.name for w in scaling.weights] == ["0"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remove_norm_scaling(model)
        apply_norm_scaling(model, target=1.0).step()
    assert not model[2].weight.any()


def test_removing_gives_the_plain_model_back():
    model = small()
    order, parameters = list(model.state_dict()), {id(p) for p in model.parameters()}
    apply_norm_scaling(model)
    assert is_norm_scaled(model)
    assert remove_norm_scaling(model) is model
    assert not is_norm_scaled(model)
    assert list(model.state_dict()) == order
    assert {id(p) for p in model.parameters()} == parameters
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="has no scaled weight"):
        remove_norm_scaling(model)
    with pytest.raises(ValueError, match=r"NormScaler.of: Sequential has no scaled weight"):
        NormScaler.of(model)


def test_frozen_weights_are_measured():
    model = small()
    names = list(spectral_norms(model))
    model.requires_grad_(False)
    assert list(spectral_norms(model)) == list(singular_values(model)) == names


def test_spectral_norms_of_a_plain_and_of_a_scaled_model():
    model = small()
    plain = spectral_norms(model)
    assert plain["0"] == pytest.approx(torch.linalg.matrix_norm(model[0].weight.detach(), 2).item(), rel=1e-5)
    apply_norm_scaling(model)
    assert spectral_norms(model) == plain


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_singular_values_of_a_plain_and_of_a_scaled_model(memory_format):
    model = nn.ModuleDict({"conv": nn.Conv2d(6, 8, 3, groups=2), "wide": nn.Linear(30, 20), "tall": nn.Linear(20, 30)})
    model.to(memory_format=memory_format)
    found = singular_values(model)
    assert list(found) == ["conv", "wide", "tall"]
    assert [tuple(values.shape) for values in found.values()] == [(2, 4), (1, 20), (1, 20)]
    for name, values in found.items():
        matrices = model[name].weight.detach().double().reshape(len(values), -1, model[name].weight[0].numel())
        torch.testing.assert_close(values, torch.linalg.svdvals(matrices), rtol=0, atol=1e-8 * values.max().item())
    apply_norm_scaling(model)
    assert all(torch.equal(values, found[name]) for name, values in singular_values(model).items())
    model.wide.weight.data[0, 0] = float("inf")
    with pytest.raises(NonFiniteWeightError, match="singular_values: the weight of 'wide' holds NaN or infinity"):
        singular_values(model)
    assert list(singular_values(model, exclude="wide")) == ["conv", "tall"]


@pytest.mark.parametrize("norm", ["frobenius", "spectral", "clipped"])
def test_a_weight_has_one_name_everywhere(norm):
    model = nn.ModuleDict({"rnn": nn.LSTM(70, 80), "head": nn.Linear(80, 3)})
    model.rnn.weight_hh_l0.requires_grad_(False)
    apply_norm_scaling(model, norm)
    twin = copy.deepcopy(model)
    names = ["rnn.weight_ih_l0", "head"]
    for one in (model, twin):
        scaling = NormScaler.of(one)
        scaling.step()
        assert [weight.name for weight in scaling.weights] == names
        assert sorted(scaling.num_iterations) == sorted(names)
        assert [certificate.name for certificate in scaling.audit().certificates] == names
        assert list(scaling.metrics()) == [f"{c}/{n}" for n in names for c in COLUMN_NAMES]
        assert all(name in str(scaling) for name in names)
        one.rnn.parametrizations.weight_ih_l0.original.data[0, 0] = float("nan")
        with pytest.raises(NonFiniteWeightError, match=r"step: the weight of 'rnn.weight_ih_l0' holds NaN"):
            scaling.step()
        assert set(names) <= set(spectral_norms(one)) == {*names, "rnn.weight_hh_l0"}
    # In a larger model, a layer has the name that it has there.
    wrapped = nn.ModuleDict({"net": copy.deepcopy(model)})
    assert [weight.name for weight in NormScaler.of(wrapped).weights] == [f"net.{name}" for name in names]


def half_zero():
    model = small()
    nn.init.zeros_(model[2].weight)
    return model


def expanded():
    model = small()
    model[2].weight = nn.Parameter(torch.randn(1, 6).expand(3, 6))
    return model


class Raises:
    """A target that fails at the second weight."""

    def __call__(self, name, module):
        if name == "2":
            raise ValueError("my own")
        return 1.0


@pytest.mark.parametrize(
    ("make", "options", "error", "text"),
    [
        (small, {"target": Raises()}, ValueError, "^my own"),
        (small, {"target": lambda name, module: 1.0 if name == "0" else -1.0}, ValueError, "positive for '2'"),
        (small, {"target": "channels", "gain": Raises()}, ValueError, "^my own"),
        (lambda: small().half(), {"gain": 1e6}, ValueError, "gain 1e.06 for '0' is out of the range of torch.float16"),
        (small, {"gain": lambda name, module: 1e-50 if name == "2" else 1.0}, ValueError, "1e-50 for '2' is out of"),
        (lambda: small().half(), {"target": 1e-50}, ValueError, "target 1e-50 for '0' is out of the range of torch"),
        # A warning that is an error is a failing call too, as it is in these tests.
        (half_zero, {"init": None}, UserWarning, "'2' holds a zero matrix"),
        (small, {"init": None, "gain": 2.0}, UserWarning, "gain has no effect without init='orthogonal'"),
        (small, {"target": 1e39}, ValueError, "target 1e.39 for '0' is out of the range of torch.float32"),
        (expanded, {}, ValueError, "the weight of '2' is expanded, so that its elements share memory"),
    ],
)
def test_a_failing_call_leaves_the_model_bit_for_bit(make, options, error, text):
    model = make()
    before, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    with pytest.raises(error, match=text):
        apply_norm_scaling(model, **{"init": "orthogonal"} | options)
    assert not is_norm_scaled(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]


def test_an_interrupted_commit_is_rolled_back(monkeypatch):
    def interrupt(scaling, weight):
        raise KeyboardInterrupt

    monkeypatch.setattr(NormScaling, "mark_current", interrupt)
    model = small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        apply_norm_scaling(model, init="orthogonal")
    assert not is_norm_scaled(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._load_state_dict_pre_hooks for module in model)


def test_a_weight_that_a_rule_named_keeps_its_name_without_the_rule():
    model = nn.ModuleDict({"layer": nn.Linear(4, 4)})
    model.layer.gain = nn.Parameter(torch.randn(2, 4))
    rule = LayerRule(nn.Linear, {"weight": MatrixView("o i"), "gain": MatrixView("o i")})
    names = [weight.name for weight in apply_norm_scaling(model, rules=rule).weights]
    assert names == ["layer.weight", "layer.gain"]
    assert list(spectral_norms(model)) == names


@pytest.mark.parametrize("norm", ["frobenius", "spectral", "clipped"])
def test_a_row_can_be_a_matrix_of_its_own(norm):
    model = small()
    rows = LayerRule(nn.Linear, lambda layer: {"weight": MatrixView("(k o) i", layer.out_features)})
    scaling = apply_norm_scaling(model, norm, rules=rows)
    before = [layer.weight.detach().norm(dim=1) for layer in (model[0], model[2])]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaling.attach(optimizer)
    for _ in range(5):
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        for layer, lengths in zip((model[0], model[2]), before, strict=True):
            torch.testing.assert_close(layer.weight.detach().norm(dim=1), lengths, rtol=1e-5, atol=0)


def test_a_weight_is_found_without_a_call_unless_something_is_on_top(monkeypatch):
    layer = nn.Linear(40, 50)
    apply_norm_scaling(layer, init=None)

    def refuse(*_):
        raise AssertionError("called at every look")

    scaling = layer.parametrizations.weight[0]
    with monkeypatch.context() as patched:
        patched.setattr(type(scaling), "forward", refuse)
        assert layer.weight is layer.parametrizations.weight.original
        assert copy.deepcopy(layer).weight.shape == (50, 40)
    parametrize.register_parametrization(layer, "weight", Double())
    torch.testing.assert_close(layer.weight, 2 * layer.parametrizations.weight.original)
    remove_norm_scaling(layer)
    torch.testing.assert_close(layer.weight, 2 * layer.parametrizations.weight.original)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight
