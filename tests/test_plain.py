"""The context in which a scaled model is the plain one, and what is scaled after it."""

import copy
import io

import pytest
import torch
from held import off_target
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrize, prune

from specscale import LayerRule, MatrixView, NormScaler, apply_norm_scaling, is_norm_scaled, remove_norm_scaling

both = pytest.mark.parametrize("norm", ["frobenius", "spectral"])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.rnn = nn.LSTM(8, 12, batch_first=True)
        self.body = nn.Linear(12, 40)
        self.head = nn.Linear(40, 36, bias=False)

    def forward(self, x):
        x = self.norm(self.stem(x)).flatten(2).mT
        return self.head(self.body(self.rnn(x)[0][:, -1]).relu())


def net():
    torch.manual_seed(0)
    return Net()


def train(model, optimizer, num_steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 6, 6, generator=generator)).square().mean().backward()
        optimizer.step()


def shape_of(model):
    """What other code sees of a model: names, order, owners, types."""
    return {
        "parameters": [(name, tuple(p.shape)) for name, p in model.named_parameters()],
        "owners": {
            name: [own for own, _ in module.named_parameters(recurse=False)] for name, module in model.named_modules()
        },
        "types": {name: type(module).__name__ for name, module in model.named_modules()},
        "state": list(model.state_dict()),
        "hooks": {
            name: (len(module._load_state_dict_pre_hooks), len(module._load_state_dict_post_hooks))
            for name, module in model.named_modules()
        },
    }


@both
def test_inside_it_is_the_plain_model_and_afterwards_the_same_scaled_one(norm):
    plain = shape_of(net())
    scaling = apply_norm_scaling(model := net(), norm)
    scaled, objects = shape_of(model), [*model.modules(), *model.parameters(), *model.buffers()]
    parameters = {id(p) for p in model.parameters()}
    state = copy.deepcopy(model.state_dict())
    weights = [(weight, weight.parameter) for weight in scaling.weights]
    with scaling.plain() as inside:
        assert inside is model
        assert all(weight.parameter is parameter for weight, parameter in weights)
        assert shape_of(model) == plain
        assert {id(p) for p in model.parameters()} == parameters
        assert not is_norm_scaled(model)
        saved = io.BytesIO()
        torch.save(model, saved)
    assert shape_of(model) == scaled
    assert all(map(lambda one, two: one is two, objects, [*model.modules(), *model.parameters(), *model.buffers()]))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    assert shape_of(loaded) == plain
    apply_norm_scaling(loaded, norm).step()


@both
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_training_goes_on_bit_for_bit(norm, error):
    ends = []
    for visits in (False, True):
        scaling = apply_norm_scaling(
            model := net(), norm, init="orthogonal", generator=torch.Generator().manual_seed(0)
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        scaling.attach(optimizer)
        train(model, optimizer, 3)
        if visits:
            try:
                with scaling.plain(), scaling.plain():
                    if error is not None:
                        raise error
            except (RuntimeError, KeyboardInterrupt):
                pass
            scaling.metrics()
        train(model, optimizer, 3, seed=1)
        assert max(map(off_target, scaling.weights)) < 1e-3
        ends.append({**model.state_dict(), **{str(i): s["exp_avg"] for i, s in enumerate(optimizer.state.values())}})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_compiled_model_is_not_compiled_anew():
    counter = CompileCounter()
    scaling = apply_norm_scaling(model := nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40)))
    compiled = torch.compile(model, backend=counter)
    compiled(torch.ones(2, 40))
    count = counter.frame_count
    with scaling.plain():
        pass
    scaling.step()
    compiled(torch.ones(2, 40))
    assert counter.frame_count == count == 1


CALLS = {
    "attach": lambda scaling, model: scaling.attach(torch.optim.SGD(model.parameters(), lr=0.1)),
    "step": lambda scaling, model: scaling.step(),
    "project": lambda scaling, model: scaling.project(),
    "retarget": lambda scaling, model: scaling.retarget(),
    "metrics": lambda scaling, model: scaling.metrics(),
    "audit": lambda scaling, model: scaling.audit(),
    "print": lambda scaling, model: str(scaling),
    "weights": lambda scaling, model: scaling.weights,
    "num_iterations": lambda scaling, model: scaling.num_iterations,
    "unscaled": lambda scaling, model: scaling.unscaled,
    "owned_by": lambda scaling, model: scaling.owned_by(torch.optim.SGD(model.parameters(), lr=0.1)),
    "plain_state_dict": lambda scaling, model: scaling.plain_state_dict(),
    "capture": lambda scaling, model: scaling.capture(),
    "remove": lambda scaling, model: scaling.remove(),
    "apply_norm_scaling": lambda scaling, model: apply_norm_scaling(model),
    "remove_norm_scaling": lambda scaling, model: remove_norm_scaling(model),
    "NormScaler.of": lambda scaling, model: NormScaler.of(model),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_are_refused_inside(call):
    scaling = apply_norm_scaling(model := net())
    expected = shape_of(model)
    with scaling.plain():
        with pytest.raises(ValueError, match=f"^{call}: the model is plain inside `with scaling.plain\\(\\):`; leave"):
            CALLS[call](scaling, model)
        assert repr(scaling) == "NormScaler(of Net, which is plain for a while)"
    assert shape_of(model) == expected
    scaling.step()


@both
def test_an_optimizer_does_not_step_inside(norm):
    scaling = apply_norm_scaling(model := net(), norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaling.attach(optimizer)
    train(model, optimizer, 1)
    before = [parameter.clone() for parameter in model.parameters()]
    with scaling.plain(), pytest.raises(ValueError, match="step: the model is plain inside"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    train(model, optimizer, 1)


def test_two_handles_and_what_is_nested():
    model = net()
    first = apply_norm_scaling(model, "frobenius", include=["stem", "rnn"])
    second = apply_norm_scaling(model, "spectral", exclude=["stem", "rnn"])
    scaled, plain = shape_of(model), shape_of(net())
    with first.plain(), second.plain(), first.plain():
        assert shape_of(model) == plain
    with second.plain():
        with first.plain():
            assert shape_of(model) == plain
        assert shape_of(model) == plain
        with pytest.raises(ValueError, match="step: the model is plain"):
            first.step()
    assert shape_of(model) == scaled
    first.step()
    second.step()
    assert [len(first.weights), len(second.weights)] == [3, 2]
    part = NormScaler.of(model.rnn)
    with part.plain():
        assert type(model.rnn) is nn.LSTM
        assert type(model.head) is not nn.Linear
    part.remove()
    with pytest.raises(ValueError, match="plain: no weight of LSTM is under scaling"):
        part.plain().__enter__()


def test_a_copy_made_inside_is_plain_for_good():
    scaling = apply_norm_scaling(model := net())
    with scaling.plain():
        copied = copy.deepcopy(model)
        apply_norm_scaling(copied).step()
    assert shape_of(copied) == shape_of(model)
    scaling.step()


@both
def test_a_parametrization_of_another_tensor_stays(norm):
    class Halved(nn.Module):
        def forward(self, bias):
            return bias / 2

    scaling = apply_norm_scaling(model := nn.Sequential(nn.Linear(40, 40)), norm)
    parametrize.register_parametrization(model[0], "bias", Halved())
    scaled = shape_of(model)
    bias = model[0].bias.clone()
    with scaling.plain():
        assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.parametrizations.bias.original"]
        assert torch.equal(model[0].bias, bias)
    assert shape_of(model) == scaled
    scaling.step()
    assert torch.equal(model[0].bias, bias)
    parametrize.register_parametrization(model[0], "weight", Halved())
    with pytest.raises(ValueError, match="plain: 'weight' of '0' has a parametrization on top of its scaling, Halved"):
        scaling.plain().__enter__()


# What other code does to the layers inside, and which weights are scaled afterwards.


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 36))


def target(scaling, name):
    return scaling.metrics()[f"target/{name}"]


def step_and_check(model, scaling):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scaling.detach()
    scaling.attach(optimizer)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        optimizer.zero_grad()
        x = torch.randn(4, 40, generator=generator).to(next(model.parameters()).dtype)
        model(x).square().mean().backward()
        optimizer.step()
        assert max(map(off_target, scaling.weights)) < 2e-3
    scaling.detach()
    assert scaling.audit().worst_error < 1e-3


def init_by_data(model):
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight.data.normal_()


def init_by_name(model):
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            nn.init.kaiming_normal_(parameter)


def permute_by_data(model):
    model[2].weight.data.copy_(model[2].weight.data.flip(0).clone())


def replace_parameters(model):
    for layer in (model[0], model[2], model[4]):
        layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def replace_layers(model):
    for index in (0, 2, 4):
        model[index] = nn.Linear(model[index].in_features, model[index].out_features)


def set_data(model):
    model[2].weight.data = torch.randn(48, 48)


@both
@pytest.mark.parametrize(
    "change", [init_by_data, init_by_name, permute_by_data, replace_parameters, replace_layers, set_data]
)
def test_other_values_of_the_same_shape_keep_their_targets(change, norm):
    scaling = apply_norm_scaling(model := mlp(), norm, target="channels")
    targets = {name: value for name, value in scaling.metrics().items() if name.startswith("target")}
    with scaling.plain():
        change(model)
    found = scaling.metrics()
    assert {name: found[name] for name in targets} == targets
    assert [weight.name for weight in scaling.weights] == ["0", "2", "4"]
    # What is reported is of the new values.
    for weight in scaling.weights:
        exact = torch.linalg.matrix_norm(weight.parameter.double(), "fro" if norm == "frobenius" else 2).item()
        assert found[f"norm/{weight.name}"] == pytest.approx(exact, rel=1e-5)
    step_and_check(model, scaling)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype_keeps_the_targets(norm, dtype):
    scaling = apply_norm_scaling(model := mlp(), norm, target="channels")
    targets = [target(scaling, name) for name in "024"]
    with scaling.plain():
        model.to(dtype)
    assert [target(scaling, name) for name in "024"] == targets
    assert scaling.weights[0].scaling.norm.dtype == torch.promote_types(dtype, torch.float32)
    if dtype == torch.float64:
        step_and_check(model, scaling)
    scaling.step()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("channels", (60 / 48) ** 0.5),
        ("matrix", (60 / 48) ** 0.5),
        (0.7, 0.7),
        (lambda name, module: 0.1 * module.out_features, 6.0),
        (None, None),
        ("initial", None),
    ],
)
def test_a_weight_of_another_shape_has_the_target_of_the_call(setting, expected):
    scaling = apply_norm_scaling(model := mlp(), target=setting)
    kept = target(scaling, "0")
    with scaling.plain():
        model[4] = nn.Linear(48, 60)
        norm = torch.linalg.matrix_norm(model[4].weight.double(), 2).item()
    assert target(scaling, "4") == pytest.approx(norm if expected is None else expected, rel=1e-5)
    assert target(scaling, "0") == kept
    step_and_check(model, scaling)


def test_without_a_call_it_has_the_norm_that_it_then_has():
    apply_norm_scaling(model := mlp(), target=0.7)
    scaling = NormScaler.of(model)
    with scaling.plain():
        model[4].weight = nn.Parameter(torch.randn(60, 48))
        model[4].bias = nn.Parameter(torch.zeros(60))
    assert target(scaling, "4") == pytest.approx(torch.linalg.matrix_norm(model[4].weight.double(), 2).item(), rel=1e-5)
    assert target(scaling, "2") == pytest.approx(0.7)


def test_a_target_that_cannot_be_had_lets_the_weight_go():
    scaling = apply_norm_scaling(model := mlp(), target=lambda name, module: {48: 1.0, 36: 1.0}[module.out_features])
    with (
        pytest.warns(UserWarning, match="no longer under scaling: '4' .*it cannot be scaled: KeyError: 60"),
        scaling.plain(),
    ):
        model[4] = nn.Linear(48, 60)
    assert [weight.name for weight in scaling.weights] == ["0", "2"]
    scaling.step()


@both
def test_swapped_layers_around_the_same_parameters(norm):
    class Fast(nn.Linear):
        pass

    scaling = apply_norm_scaling(model := mlp(), norm)
    held = {id(weight.scaling) for weight in scaling.weights}
    with scaling.plain():
        for index in (0, 2):
            old, model[index] = model[index], Fast(1, 1)
            model[index].weight, model[index].bias = old.weight, old.bias
        model.append(nn.Identity())
        model[5] = nn.Sequential(model[4])
        del model[4]
    assert [weight.name for weight in scaling.weights] == ["0", "2", "4.0"]
    assert {id(weight.scaling) for weight in scaling.weights} == held
    step_and_check(model, scaling)
    assert type(model[0]).__mro__[1] is Fast


def test_weights_that_became_one_keep_one_state():
    scaling = apply_norm_scaling(model := mlp(), target=lambda name, module: 1 + int(name))
    model.append(nn.Linear(36, 36))
    with scaling.plain():
        model[2] = nn.Linear(48, 48)
        model[2].weight = model[0].weight = nn.Parameter(torch.randn(48, 48))
    assert [weight.name for weight in scaling.weights] == ["0", "4"]
    assert target(scaling, "0") == pytest.approx(1.0)
    assert model[2].weight is model[0].weight
    scaling.step()
    assert off_target(scaling.weights[0]) < 1e-3


def remove_layer(model):
    model[4] = nn.Identity()


def prune_layer(model):
    prune.l1_unstructured(model[4], "weight", 0.5)


def weight_norm(model):
    nn.utils.parametrizations.weight_norm(model[4])


def spectral_norm(model):
    nn.utils.parametrizations.spectral_norm(model[4])


def hooked_spectral_norm(model):
    nn.utils.spectral_norm(model[4])


def buffer(model):
    del model[4].weight
    model[4].register_buffer("weight", torch.ones(36, 48, dtype=torch.int8))


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*deprecated")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (remove_layer, "not in the model any more"),
        (prune_layer, "computed now"),
        (weight_norm, "computed now"),
        (spectral_norm, "computed now"),
        (hooked_spectral_norm, "computed now"),
        (buffer, "computed now"),
        (lambda model: model[4].register_parameter("weight", nn.Parameter(torch.randn(3, 4, 5))), "does not fit"),
    ],
)
def test_what_cannot_be_scaled_is_let_go_and_named(change, why):
    scaling = apply_norm_scaling(model := mlp())
    text = f"plain: no longer under scaling: '4' \\(.*{why}.*\\); call apply"
    with pytest.warns(UserWarning, match=text) as caught, scaling.plain():
        change(model)
    assert caught[0].filename == __file__
    assert [weight.name for weight in scaling.weights] == ["0", "2"]
    scaling.step()
    scaling.metrics()
    apply_norm_scaling(nn.Sequential(nn.Linear(4, 4)))


def test_a_new_parameter_that_no_optimizer_holds_is_named():
    scaling = apply_norm_scaling(model := mlp())
    with scaling.plain():
        model[4] = nn.Linear(48, 36)
    scaling.attach(optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
    text = "the parameter of '4' is a new one, and no optimizer that this handle is"
    with pytest.warns(UserWarning, match=text), scaling.plain():
        model[4] = nn.Linear(48, 36)
    with scaling.plain():
        model[2] = nn.Linear(48, 48)
        optimizer.add_param_group({"params": [*model[2].parameters(), *model[4].parameters()]})
    model(torch.randn(4, 40)).sum().backward()
    optimizer.step()
    assert max(map(off_target, scaling.weights)) < 2e-3


def test_a_fused_weight_is_read_by_the_rules_again():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(40, 120)
            self.mix = nn.Linear(40, 40)

    rule = LayerRule(lambda name, module: name == "mix", {"weight": MatrixView("(k o) i", 2)})
    scaling = apply_norm_scaling(model := Model(), rules=rule)
    assert [weight.view.count for weight in scaling.weights] == [3, 2]
    with scaling.plain():
        model.qkv = nn.Linear(50, 150)
        model.mix = nn.Linear(50, 50)
    assert [weight.view.count for weight in scaling.weights] == [3, 2]
    scaling.step()
    assert max(map(off_target, scaling.weights)) < 2e-3


def test_a_weight_of_one_axis_keeps_its_state_and_is_solved_anew_where_it_changes():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(12))

    rule = LayerRule(Flat, {"w": MatrixView("(o i)", lengths={"o": 3})})
    (weight,) = (scaling := apply_norm_scaling(model := Flat(), rules=rule)).weights
    for factor in (1, 2):
        before = weight.scaling.norm.clone()
        with scaling.plain():
            model.w.data.mul_(factor)
        assert torch.allclose(weight.scaling.norm, factor * before)


def test_an_optimizer_of_the_plain_order_resumes_a_plain_state():
    plain = mlp()
    before = torch.optim.Adam(plain.parameters())
    plain(torch.randn(4, 40)).sum().backward()
    before.step()
    scaling = apply_norm_scaling(model := mlp())
    with scaling.plain():
        optimizer = torch.optim.Adam(model.parameters())
    optimizer.load_state_dict(before.state_dict())
    scaling.attach(optimizer)
    for mine, theirs in zip(optimizer.state.values(), before.state.values(), strict=True):
        assert torch.equal(mine["exp_avg"], theirs["exp_avg"])
    # The other order is refused before it is loaded, and where it has been loaded.
    other = torch.optim.Adam(model.parameters())
    other.load_state_dict(before.state_dict())
    with pytest.raises(ValueError, match="attach: the optimizer's state is in another order than its parameters: that"):
        scaling.attach(other)
    scaling.detach()
    scaling.attach(another := torch.optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match=r"load_state_dict: the optimizer's state .* that of '0' .*plain\(\)"):
        another.load_state_dict(before.state_dict())
    assert not another.state
    behind = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 40)).sum().backward()
    behind.step()
    another.load_state_dict(behind.state_dict())
    scaling.detach()
    scaling.attach(optimizer)
    with pytest.raises(ValueError, match="load_state_dict: the optimizer's state is in another order"):
        optimizer.load_state_dict(behind.state_dict())


def test_names_tell_the_order_of_a_state():
    scaling = apply_norm_scaling(model := mlp())
    with scaling.plain():
        plain = torch.optim.Adam(model.named_parameters())
    behind = torch.optim.Adam(model.named_parameters())
    model(torch.randn(4, 40)).sum().backward()
    plain.step()
    scaling.attach(behind)
    behind.load_state_dict(behind.state_dict())
    with pytest.raises(ValueError, match=r"load_state_dict: .*another order.*: '0.weight' is the first of its names"):
        behind.load_state_dict(plain.state_dict())
    with scaling.plain():
        plain.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("bias", [True, False])
def test_the_order_is_told_where_a_layer_has_layers_and_weights(bias):
    plain = nn.MultiheadAttention(8, 2, bias=bias)
    before = torch.optim.Adam(plain.parameters())
    plain(*[torch.randn(3, 2, 8)] * 3)[0].sum().backward()
    before.step()
    scaling = apply_norm_scaling(model := nn.MultiheadAttention(8, 2, bias=bias))
    scaling.attach(optimizer := torch.optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match="load_state_dict: the optimizer's state is in another order"):
        optimizer.load_state_dict(before.state_dict())


def test_a_state_of_square_matrices_is_no_other_order():
    """As Shampoo's: a bias of 8 has a matrix of 8 x 8, the shape of its layer's weight."""
    scaling = apply_norm_scaling(model := nn.Sequential(nn.Linear(8, 8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        optimizer.state[parameter] = {"precond": torch.eye(8)}
    scaling.attach(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())


def sparse(model):
    model[4].weight = nn.Parameter(torch.eye(36, 48).to_sparse())


def lazy(model):
    model[4] = nn.LazyLinear(36)


def float8(model):
    model[4].weight = nn.Parameter(model[4].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("change", [sparse, lazy, float8])
def test_what_fails_at_the_end_is_let_go_and_the_rest_is_scaled(change):
    scaling = apply_norm_scaling(model := mlp())
    with pytest.warns(UserWarning, match=r"no longer under scaling: '4' \(it cannot be scaled: "), scaling.plain():
        change(model)
    assert [weight.name for weight in scaling.weights] == ["0", "2"]
    scaling.step()
    assert "parametrizations" not in model[4]._modules
    apply_norm_scaling(nn.Sequential(nn.Linear(4, 4)))


def test_a_rule_is_for_the_weights_of_its_call():
    model = mlp()
    first = apply_norm_scaling(model, include=["0", "2"], target=1.0)
    second = apply_norm_scaling(model, include="4", target=3.0)
    with first.plain():
        model[4] = nn.Linear(48, 60)
    norm = torch.linalg.matrix_norm(model[4].weight.double(), 2).item()
    assert target(second, "4") == pytest.approx(norm, rel=1e-5)
    with second.plain():
        model[4] = nn.Linear(48, 50)
    assert target(second, "4") == pytest.approx(3.0)


def test_a_part_that_is_plain_refuses_calls_on_the_whole():
    apply_norm_scaling(model := mlp())
    part = NormScaler.of(model[0])
    with part.plain():
        for call in (NormScaler.of, remove_norm_scaling, apply_norm_scaling):
            with pytest.raises(ValueError, match="the model is plain inside"):
                call(model)
    assert len(NormScaler.of(model).weights) == 3


def test_one_parameter_is_not_scaled_twice_by_two_handles():
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    first, second = apply_norm_scaling(model[0]), apply_norm_scaling(model[1])
    with second.plain():
        model[1].weight = model[0].weight
    first.attach(optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="attached already; a second hook would scale twice"):
        second.attach(optimizer)


def test_a_layer_that_has_another_name_is_found_before_the_one_that_has_its_name():
    scaling = apply_norm_scaling(model := mlp(), target="channels")
    with scaling.plain():
        layer, model[2] = model[2], nn.Linear(48, 48)
        layer.weight = nn.Parameter(torch.randn(48, 48))
        model.append(nn.Sequential(layer))
    assert [weight.name for weight in scaling.weights] == ["0", "4", "5.0"]
    assert type(model[2]) is nn.Linear
    scaling.step()


@pytest.mark.filterwarnings("ignore:.*holds a zero matrix")
def test_a_matrix_that_is_skipped_stays_skipped():
    model = nn.ModuleDict({"qkv": nn.Linear(16, 48)})
    nn.init.zeros_(model["qkv"].weight[:16].detach())
    scaling = apply_norm_scaling(model)
    with scaling.plain():
        model.double()
    assert scaling.weights[0].scaling.skip_mask.tolist() == [1, 0, 0]
    assert target(scaling, "qkv") > 0


def test_hooks_that_check_checkpoints_end_with_the_last_weight():
    scaling = apply_norm_scaling(model := mlp(), include="4")
    assert len(model._load_state_dict_pre_hooks) == 1
    with pytest.warns(UserWarning, match="no longer under scaling: '4'"), scaling.plain():
        model[4] = nn.Identity()
    assert not model._load_state_dict_pre_hooks
