"""State on the model: checkpoints in both directions, copies and dtypes."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.utils import parametrize

from specscale import Block, LayerRule, MatrixView, NormScaler, apply_norm_scaling, plain_state_dict


def model():
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Sequential(nn.Linear(100, 60), nn.Linear(60, 2)))


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_a_scaled_checkpoint_brings_targets_and_vectors_back(norm, tmp_path):
    scaling = apply_norm_scaling(source := model(), norm, target=0.3)
    scaling.step()
    torch.save(source.state_dict(), tmp_path / "checkpoint.pt")
    apply_norm_scaling(other := model(), norm, init="orthogonal")
    other.load_state_dict(torch.load(tmp_path / "checkpoint.pt"))
    assert NormScaler.of(other).metrics() == scaling.metrics()
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_a_plain_checkpoint_loads_and_a_plain_state_dict_comes_out(norm):
    plain = model()
    scaling = apply_norm_scaling(scaled := model(), norm, target=0.3)
    scaled.load_state_dict(plain.state_dict())
    metrics = scaling.metrics()
    kind = 2 if norm == "spectral" else "fro"
    exact = torch.linalg.matrix_norm(plain[2][0].weight.detach(), kind).item()
    assert metrics["norm/2.0"] == pytest.approx(exact, rel=1e-4)
    assert metrics["target/2.0"] == pytest.approx(0.3)
    out = scaling.plain_state_dict()
    assert list(out) == list(plain.state_dict())
    model().load_state_dict(out)


class Shared(nn.Module):
    """One layer under two names, behind another of a longer name."""

    def __init__(self):
        super().__init__()
        self.layer10 = nn.Linear(4, 4)
        self.layer1 = nn.Linear(4, 4)
        self.again = self.layer1


class Versioned(nn.Module):
    """Loads nothing that does not tell its version, as torchvision's MNASNet does."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        assert local_metadata["version"] == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def checkpointed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, nn.Linear))
    return model


@pytest.mark.parametrize("make", [Shared, Versioned, checkpointed, lambda: nn.Linear(4, 4), lambda: nn.LSTM(4, 4)])
def test_a_plain_state_dict_is_that_of_the_plain_model(make):
    model = make()
    plain = copy.deepcopy(model)
    expected = plain.state_dict()
    scaling = apply_norm_scaling(model)
    for _ in range(2):
        state = scaling.plain_state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], value) for name, value in expected.items())
        assert state._metadata == expected._metadata
        plain.load_state_dict(state)
    assert any("parametrizations" in name for name in model.state_dict())


class Experts(nn.Module):
    """Two stacked weights, each with its bias behind it, and a layer inside: as in GPT-OSS."""

    is_transposed = is_concatenated = True

    def __init__(self):
        super().__init__()
        for name in ("gate_up_proj", "down_proj"):
            setattr(self, name, nn.Parameter(torch.randn(2, 4, 4)))
            setattr(self, f"{name}_bias", nn.Parameter(torch.randn(2, 4)))
        self.register_buffer("count", torch.zeros(()))
        self.router = nn.Linear(4, 2)


EXPERTS = LayerRule(Experts, {name: MatrixView("k i o", 2) for name in ("gate_up_proj", "down_proj")})


@pytest.mark.parametrize("prefix", ["", "module.", "ema.module."])
@pytest.mark.parametrize(
    ("make", "rules"),
    [
        (model, ()),
        (Shared, ()),
        (Versioned, ()),
        (lambda: nn.Linear(4, 4), ()),
        (lambda: nn.Sequential(Experts(), Experts()), EXPERTS),
        (lambda: nn.LSTM(4, 4, 2, bidirectional=True, proj_size=2), ()),
        (lambda: nn.GRU(4, 4, 3, bias=False), ()),
        (lambda: nn.LSTMCell(4, 4), ()),
        (lambda: nn.MultiheadAttention(4, 2), ()),
        (lambda: nn.MultiheadAttention(4, 2, bias=False), ()),
        (lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=2, add_bias_kv=True), ()),
        (lambda: nn.TransformerEncoderLayer(4, 2, 8), ()),
        (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=2), ()),
        (lambda: timm.create_model("resnet10t", num_classes=3), ()),
    ],
)
def test_a_saved_state_dict_becomes_that_of_the_plain_model(make, rules, prefix):
    net = make()
    for name in prefix.split(".")[-2::-1]:
        net = nn.ModuleDict({name: net})
    expected = copy.deepcopy(net.state_dict())
    apply_norm_scaling(net, "frobenius", rules=rules)
    saved = net.state_dict()
    before, metadata = dict(saved), copy.deepcopy(saved._metadata)
    out = plain_state_dict(saved)
    assert list(out) == list(expected)
    assert all(torch.equal(out[name], value) for name, value in expected.items())
    assert out._metadata == expected._metadata
    # Nothing is copied, and what was saved is as it was.
    assert {value.data_ptr() for value in out.values()} <= {value.data_ptr() for value in before.values()}
    assert list(saved.items()) == list(before.items())
    assert saved._metadata == metadata
    assert list(plain_state_dict(dict(saved)).items()) == list(out.items())


def test_a_saved_average_becomes_plain():
    apply_norm_scaling(net := model())
    average = torch.optim.swa_utils.AveragedModel(net, use_buffers=True)
    average.update_parameters(net)
    plain = torch.optim.swa_utils.AveragedModel(model())
    plain.load_state_dict(plain_state_dict(average.state_dict()))
    assert list(plain_state_dict(average.state_dict())) == list(plain.state_dict())
    assert torch.equal(plain.module[0].weight, net[0].weight)


@pytest.mark.parametrize("norm", ["frobenius", "spectral", "clipped"])
def test_a_saved_state_dict_of_version_0_1_0_becomes_plain(norm):
    old = of_version_0_1_0(norm)["model"]
    out = plain_state_dict(old)
    assert list(out) == ["qkv.weight", "qkv.bias", "wide.weight", "wide.bias"]
    assert all(out[f"{layer}.weight"] is old[f"{layer}.parametrizations.weight.original"] for layer in ("qkv", "wide"))


class Sum(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Linear(1, 1)

    def forward(self, tensor):
        return tensor + self.shift.bias


def test_other_parametrizations_stay_in_a_plain_state_dict():
    net = model()
    parametrize.register_parametrization(net[0], "bias", Sum())
    nn.utils.parametrizations.spectral_norm(net[2][1])
    nn.utils.parametrizations.weight_norm(net[2][0])
    expected = copy.deepcopy(net.state_dict())
    scaling = apply_norm_scaling(net, include="0", exclude="2")
    for out in scaling.plain_state_dict(), plain_state_dict(net.state_dict()):
        assert sorted(out) == sorted(expected)
        assert all(torch.equal(out[name], value) for name, value in expected.items())
        assert out._metadata == expected._metadata


@pytest.mark.parametrize("kind", [Sum, nn.Identity])
def test_a_saved_state_dict_with_another_parametrization_on_top_is_refused(kind):
    apply_norm_scaling(net := model())
    parametrize.register_parametrization(net[2][0], "weight", kind())
    text = r"^plain_state_dict: 'weight' of '2.0' has a parametrization on top of its scaling, {}; remove that first$"
    with pytest.raises(ValueError, match=text.format(kind.__name__)):
        plain_state_dict(net)
    with pytest.raises(ValueError, match=text.format(r"'2\.0\.parametrizations\.weight\.1'")):
        plain_state_dict(net.state_dict())


def test_a_state_dict_without_scaled_weights_is_given_as_it_is():
    state = model().state_dict()
    assert list(plain_state_dict(state).items()) == list(state.items())
    assert plain_state_dict({}) == {}
    with pytest.raises(TypeError, match=r"^plain_state_dict: expected a torch.nn.Module or a state dict, found list$"):
        plain_state_dict([model()])


def test_a_checkpoint_loads_where_torch_swaps_tensors():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    plain = copy.deepcopy(model.state_dict())
    scaling = apply_norm_scaling(model, target=0.5)
    try:
        torch.__future__.set_swap_module_params_on_conversion(True)
        scaling.step()
        model.load_state_dict(plain)
        scaling.step()
        model.load_state_dict(copy.deepcopy(model.state_dict()))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert scaling.audit().worst_excess < 1


@pytest.mark.parametrize("solver", ["svd", "power", Block(width=8)], ids=str)
def test_a_checkpoint_of_another_solver_keeps_its_targets_and_is_solved_anew(solver):
    scaling = apply_norm_scaling(source := wide(), target=0.3)
    scaling.step()
    other = apply_norm_scaling(scaled := wide(), init="orthogonal", solver=solver)
    for here, there in ((scaled, source), (source, scaled)):
        here.load_state_dict(there.state_dict())
        assert torch.equal(here[0].weight, there[0].weight)
    for handle in (scaling, other):
        handle.step()
        matrix = handle.weights[0].parameter.detach().double()
        assert handle.metrics()["target/0"] == pytest.approx(0.3)
        assert (torch.linalg.svdvals(matrix) / 0.3 - 1).abs().min() < 1e-3


def wide():
    return nn.Sequential(nn.Linear(90, 80))


@pytest.mark.parametrize(("norm", "other"), [("frobenius", "spectral"), ("spectral", "frobenius")])
def test_a_checkpoint_of_another_norm_is_refused(norm, other):
    apply_norm_scaling(source := model(), norm)
    apply_norm_scaling(scaled := model(), other)
    before = copy.deepcopy(scaled.state_dict())
    with pytest.raises(
        ValueError, match=rf"load_state_dict: the checkpoint's target of '0' is not of the {other} norm"
    ):
        scaled.load_state_dict(source.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in scaled.state_dict().items())


def with_target(state, layer, target):
    """The state dict with a bad target of one of `model`'s layers."""
    return dict(state) | {f"{layer}.parametrizations.weight.0.target_spectral": torch.tensor([target])}


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("wrong", [["2.1"], ["2.0", "2.1"]])
def test_a_checkpoint_that_is_refused_for_a_late_layer_has_loaded_nothing(copied, assign, wrong):
    apply_norm_scaling(source := model())
    apply_norm_scaling(scaled := model(), target=0.5)
    if copied:
        original, scaled = scaled, copy.deepcopy(scaled)
        NormScaler.of(original).remove()
    state = source.state_dict()
    for layer in wrong:
        state = with_target(state, layer, -1.0)
    before = copy.deepcopy(scaled.state_dict())
    with pytest.raises(ValueError, match=f"load_state_dict: the checkpoint's target of '{wrong[0]}' must be finite"):
        scaled.load_state_dict(state, assign=assign)
    assert all(torch.equal(value, before[name]) for name, value in scaled.state_dict().items())
    scaled.load_state_dict(source.state_dict(), assign=assign)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in scaled.state_dict().items())


def test_an_old_checkpoint_that_is_refused_for_a_late_layer_has_loaded_nothing():
    apply_norm_scaling(net := half_zero(), "spectral", target=1.0)
    old = of_version_0_1_0("spectral")["model"] | {"wide.parametrizations.weight.0.order": torch.tensor(2)}
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"target of 'net\.wide' is not of the spectral norm"):
        nn.ModuleDict({"net": net}).load_state_dict({f"net.{name}": value for name, value in old.items()})
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def hooks_of(model):
    return [hook for module in model.modules() for hook in module._load_state_dict_pre_hooks.values()]


def test_what_checks_a_load_goes_with_the_scaling():
    net = model()
    first, second = (apply_norm_scaling(net, include=layer) for layer in ("0", "2"))
    twin = copy.deepcopy(net)
    state = with_target(net.state_dict(), "0", -1.0)
    first.remove()
    plain = {name: value for name, value in state.items() if not name.startswith("0.")}
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"target of '2\.1' must be finite"):
        net.load_state_dict(with_target(plain, "2.1", -1.0), strict=False)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    second.remove()
    assert hooks_of(net) == []
    assert hooks_of(twin)
    NormScaler.of(twin[2]).remove()
    NormScaler.of(twin[0]).remove()
    assert hooks_of(twin) == []
    # On two parts of it, and off the whole.
    for part in twin[0], twin[2]:
        apply_norm_scaling(part)
    assert hooks_of(NormScaler.of(twin).remove()) == []
    # A layer that is gone leaves no check behind.
    scaling = apply_norm_scaling(twin, include="2.1")
    twin[2][1] = nn.Linear(60, 2)
    scaling.remove()
    assert hooks_of(twin) == []


def test_a_copy_of_one_layer_does_not_bring_the_model_with_it():
    apply_norm_scaling(net := model())
    memo = {}
    layer = copy.deepcopy(net[2][0], memo)
    assert id(net) not in memo
    assert id(net[0]) not in memo
    apply_norm_scaling(other := model()[2][0], target=0.7)
    layer.load_state_dict(other.state_dict())
    NormScaler.of(layer).remove()
    assert hooks_of(layer) == []


def test_a_copy_is_scaled_on_its_own():
    scaling = apply_norm_scaling(source := model(), target=2.0)
    twin = copy.deepcopy(source)
    NormScaler.of(twin).step()
    assert NormScaler.of(twin).metrics()["norm/2.1"] == pytest.approx(2.0)
    assert scaling.metrics()["norm/2.1"] != pytest.approx(2.0)


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_a_copy_stays_whole_when_the_other_is_plain_again(norm):
    scaling = apply_norm_scaling(source := model(), norm)
    first, second = copy.deepcopy(source), copy.deepcopy(source)
    x = torch.randn(1, 100)
    NormScaler.of(first).remove()
    assert torch.equal(first[2](x), source[2](x))
    scaling.remove()
    assert torch.equal(second[2](x), source[2](x))
    NormScaler.of(second).step()
    assert type(first[2][0]) is type(source[2][0]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_state_is_float32_or_wider_whatever_the_model_is(dtype):
    scaling = apply_norm_scaling(net := model(), target=0.3)
    expected = scaling.metrics()
    net.to(dtype)
    assert all(b.dtype.itemsize >= 4 for n, b in net.named_buffers() if "parametrizations" in n)
    assert scaling.metrics() == expected
    scaling.step()
    matrix = net[2][0].weight.detach().double()
    assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(scaling.metrics()["norm/2.0"], rel=1e-2)


def of_version_0_1_0(norm):
    """What that version wrote for `half_zero`: its state dict, and what one step made of the weights plus 0.1."""
    return torch.load(Path(__file__).parent / "checkpoints" / f"0.1.0-{norm}.pt")


def half_zero():
    """A fused qkv whose second matrix starts at zero, and a layer that the block solves."""
    net = nn.ModuleDict({"qkv": nn.Linear(4, 12), "wide": nn.Linear(90, 80)})
    net.qkv.weight.data[4:8] = 0
    return net


@pytest.mark.filterwarnings("ignore:.*holds a zero matrix")
@pytest.mark.parametrize("norm", ["frobenius", "spectral", "clipped"])
@pytest.mark.parametrize("assign", [False, True])
def test_an_old_checkpoint_loads_and_goes_on(norm, assign):
    old = of_version_0_1_0(norm)
    assert old["model"]["qkv.parametrizations.weight.0.target"].eq(0).tolist() == [False, True, False]
    scaling = apply_norm_scaling(net := half_zero(), norm, init="orthogonal")
    net.load_state_dict(old["model"], assign=assign)
    assert all(torch.equal(old["model"].get(name, value), value) for name, value in net.state_dict().items())
    with torch.no_grad():
        for weight in scaling.weights:
            weight.parameter.add_(0.1)
    scaling.step()
    # Exact norms are the same to rounding; the block solver of that version was another one.
    for name, value in scaling.plain_state_dict().items():
        torch.testing.assert_close(value, old["after"][name], rtol=1e-5, atol=5e-6 if norm == "spectral" else 1e-7)
    assert scaling.metrics() == pytest.approx(old["metrics"], rel=1e-3, abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*holds a zero matrix")
@pytest.mark.parametrize("norm", ["frobenius", "spectral", "clipped"])
def test_an_older_checkpoint_with_targets_alone_loads(norm):
    old = {n: v for n, v in of_version_0_1_0(norm)["model"].items() if ".0." not in n or n.endswith(".target")}
    scaling = apply_norm_scaling(net := half_zero(), norm, target=0.7)
    net.load_state_dict(old)
    target = old["qkv.parametrizations.weight.0.target"]
    assert torch.equal(scaling.weights[0].scaling.target, target)
    assert torch.equal(scaling.weights[0].scaling.skip_mask, (target == 0).float())


@pytest.mark.parametrize(("norm", "order"), [("frobenius", 0), ("spectral", 2), ("clipped", 2)])
def test_an_old_checkpoint_of_another_norm_is_refused_by_the_layers_name_here(norm, order):
    apply_norm_scaling(net := half_zero(), norm, target=1.0)
    model = nn.ModuleDict({"net": net})
    old = {f"net.{name}": value for name, value in of_version_0_1_0("spectral")["model"].items()}
    old = {name: torch.tensor(order) if name.endswith(".order") else value for name, value in old.items()}
    kind = "frobenius" if norm == "frobenius" else "spectral"
    with pytest.raises(ValueError, match=rf"load_state_dict: .* target of 'net.qkv' is not of the {kind} norm"):
        model.load_state_dict(old)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("target_spectral", float("nan"), "must be finite and positive, found \\[nan\\]"),
        ("target_spectral", -1.0, "must be finite and positive, found \\[-1.0\\]"),
        ("target_spectral", 0.0, "must be finite and positive, found \\[0.0\\]"),
        (
            "target_ceiling",
            1.0,
            "is of 'ceiling', which is none of the constraints 'frobenius', 'rows', 'columns', 'spect",
        ),
    ],
)
def test_targets_that_cannot_be_held_are_refused_when_loaded(key, value, text):
    scaling = apply_norm_scaling(net := wide(), target=0.5)
    home = "0.parametrizations.weight.0."
    state = {n: v for n, v in net.state_dict().items() if n != f"{home}target_spectral"}
    with pytest.raises(ValueError, match=f"load_state_dict: the checkpoint's target of '0' {text}"):
        net.load_state_dict(state | {home + key: torch.tensor([value])})
    assert scaling.metrics()["target/0"] == 0.5


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_a_checkpoint_without_its_targets_is_not_complete(norm):
    apply_norm_scaling(source := model(), norm)
    state = {name: value for name, value in source.state_dict().items() if f"target_{norm}" not in name}
    apply_norm_scaling(other := model(), norm)
    with pytest.raises(RuntimeError, match=rf"Missing key.*target_{norm}"):
        other.load_state_dict(state)


@pytest.mark.parametrize("norm", ["frobenius", "spectral", "clipped"])
def test_a_scaled_state_dict_is_contiguous_and_goes_into_safetensors(norm, tmp_path):
    scaling = apply_norm_scaling(net := wide(), norm)
    scaling.step()
    save_file(net.state_dict(), tmp_path / "scaled.safetensors")
    other = apply_norm_scaling(loaded := wide(), norm)
    loaded.load_state_dict(load_file(tmp_path / "scaled.safetensors"))
    assert other.metrics() == scaling.metrics()


@pytest.mark.parametrize("norm", ["frobenius", "spectral", "clipped"])
def test_a_checkpoint_names_its_constraint_in_buffers_that_can_be_averaged(norm):
    apply_norm_scaling(source := model(), norm)
    buffers = {name: value for name, value in source.state_dict().items() if "parametrizations" in name}
    names = {name.rpartition(".")[2] for name in buffers}
    assert {f"target_{norm}", "skip_mask", "norm", "residual", "error"} <= names
    assert all(value.is_floating_point() for value in buffers.values())
    # Targets of one norm mean the same under either constraint on it.
    for other in {"frobenius": ["frobenius"], "spectral": ["clipped"], "clipped": ["spectral"]}[norm]:
        scaling = apply_norm_scaling(loaded := model(), other, target=0.7)
        loaded.load_state_dict(source.state_dict())
        for weight in scaling.weights:
            saved = buffers[f"{weight.name}.parametrizations.weight.0.target_{norm}"]
            assert torch.equal(weight.scaling.target, saved)
