"""What changes for other code: each symptom of the docs' page is there, and its line mends it."""

import copy
import io
import math
import warnings
from contextlib import nullcontext

import pytest
import timm.optim
import torch
import torch.distributed as dist
from held import off_target
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import fuse_conv_bn_eval, parameters_to_vector, prune
from torch.optim.swa_utils import AveragedModel

from specscale import apply_norm_scaling, is_norm_scaled, plain_state_dict, remove_norm_scaling


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.norm(self.conv(self.embed(x).mT)).mean(2))


X = torch.arange(5).repeat(6, 1)


def net():
    torch.manual_seed(0)
    return Net().eval()


def scaled():
    scaling = apply_norm_scaling(model := net(), "frobenius")
    return model, scaling


def take_step(model, optimizer):
    # Lookahead's own zero_grad would give it step hooks.
    model.zero_grad()
    (model(X) - 1).square().mean().backward()
    optimizer.step()


def off_targets(scaling):
    return max(off_target(weight) for weight in scaling.weights)


def decayed_by_name(model):
    return [tuple(p.shape) for name, p in model.named_parameters() if name.endswith(".weight")]


def decayed_by_owner(model):
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv1d)]
    return [tuple(p.shape) for layer in layers for n, p in layer.named_parameters(recurse=False) if n == "weight"]


def head_alone_trains(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ("fc.weight", "fc.bias"))
    return [tuple(p.shape) for p in model.parameters() if p.requires_grad]


def layers_are_initialised(model):
    def init(layer):
        if type(layer) is nn.Linear:
            nn.init.constant_(layer.weight, 3.0)

    return model.apply(init).fc.weight.tolist()


def operations_are_counted(model):
    counts = {nn.Linear: lambda m: m.weight.numel(), nn.Conv1d: lambda m: m.weight.numel() * 5}
    return sum(counts[type(layer)](layer) for layer in model.modules() if type(layer) in counts)


def leaves_are_hooked(model):
    return [name for name, layer in model.named_modules() if not list(layer.children())]


def all_in_one_vector(model):
    return parameters_to_vector(model.parameters()).tolist()


SILENT = [
    decayed_by_name,
    decayed_by_owner,
    head_alone_trains,
    layers_are_initialised,
    operations_are_counted,
    leaves_are_hooked,
    all_in_one_vector,
]


@pytest.mark.parametrize("seen_by", SILENT, ids=[function.__name__ for function in SILENT])
def test_what_other_code_sees_without_an_error(seen_by):
    expected = seen_by(net())
    assert seen_by(scaled()[0]) != expected
    model, scaling = scaled()
    weights = [weight.name for weight in scaling.weights]
    with scaling.plain() as plain:
        assert plain is model
        assert seen_by(plain) == expected
    assert [weight.name for weight in scaling.weights] == weights
    scaling.project()
    assert off_targets(scaling) < 1e-5


def assign(model):
    model.fc.weight = nn.Parameter(torch.ones(7, 8))


def tie(model):
    model.fc.weight = model.embed.weight


def delete(model):
    weight = model.fc.weight
    del model.fc.weight
    model.fc.register_parameter("weight", weight)


def fuse(model):
    assert fuse_conv_bn_eval(model.conv, model.norm).weight.shape == (8, 8, 3)


def look_up_by_name(model):
    assert dict(model.named_parameters())["fc.weight"] is model.fc.weight


def look_up_in_the_state(model):
    assert model.state_dict()["fc.weight"].shape == (5, 8)


def look_up_in_the_layer(model):
    assert model.fc._parameters["weight"] is model.fc.weight


def pickle_whole(model):
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    assert type(torch.load(file, weights_only=False).fc) is nn.Linear


def pickle_a_layer(model):
    torch.save(model.fc, io.BytesIO())


def call_with_other_weights(model):
    zeros = {name: torch.zeros_like(p) for name, p in net().named_parameters()}
    assert (torch.func.functional_call(model, zeros, X) == 0).all()


def load_into_a_plain_model(model):
    Net().load_state_dict(model.state_dict())


def quantize(model):
    with warnings.catch_warnings():
        # It says that it is deprecated.
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def script(model):
    with warnings.catch_warnings():
        # It says that it is deprecated.
        warnings.simplefilter("ignore")
        torch.jit.script(model)


ASSIGNED = "attribute 'weight' already exists: it is under norm scaling. Assign it inside `with scaling.plain"
RAISE = [
    (assign, KeyError, ASSIGNED),
    (tie, KeyError, ASSIGNED),
    (fuse, KeyError, ASSIGNED),
    (call_with_other_weights, TypeError, "cannot assign a Tensor to 'weight', which is under norm scaling"),
    (delete, AttributeError, "is under norm scaling and cannot be deleted"),
    (look_up_by_name, KeyError, "fc.weight"),
    (look_up_in_the_state, KeyError, "fc.weight"),
    (look_up_in_the_layer, KeyError, "weight"),
    (pickle_whole, RuntimeError, r"pickle: the model is under norm scaling.*or pickle the model inside `with scaling"),
    (pickle_a_layer, RuntimeError, "pickle: the model is under norm scaling"),
    (load_into_a_plain_model, RuntimeError, r"Missing key\(s\) in state_dict: .*\"fc.weight\""),
    (quantize, AssertionError, "only works for one of"),
    (script, (torch.jit.frontend.FrontendError, RuntimeError), "specscale"),
]


@pytest.mark.parametrize(("call", "error", "text"), RAISE, ids=[case[0].__name__ for case in RAISE])
def test_what_raises_in_other_code(call, error, text):
    model, scaling = scaled()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text):
        call(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with scaling.plain():
        call(model)
    assert [weight.name for weight in scaling.weights] == ["conv", "fc"]
    scaling.project()
    assert off_targets(scaling) < 1e-5


def groups(model):
    decay = [p for name, p in model.named_parameters() if name.endswith("weight") and p.ndim > 1]
    others = [p for name, p in model.named_parameters() if not (name.endswith("weight") and p.ndim > 1)]
    return [{"params": decay, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


@pytest.mark.parametrize("when", ["behind scaling", "before scaling", "inside plain"])
def test_groups_are_built_before_scaling_or_inside_plain(when):
    model = net()
    before = groups(model)
    scaling = apply_norm_scaling(model, "frobenius")
    if when == "before scaling":
        built = before
    elif when == "inside plain":
        with scaling.plain():
            built = groups(model)
    else:
        built = groups(model)
    optimizer = torch.optim.AdamW(built, lr=1e-2)
    scaling.attach(optimizer)
    take_step(model, optimizer)
    ids = {id(p) for p in optimizer.param_groups[0]["params"]}
    # The embedding is not scaled, and keeps its name.
    assert (id(model.embed.weight) in ids, id(model.fc.weight) in ids) == (True, when != "behind scaling")
    assert off_targets(scaling) < 1e-5


def test_what_is_pruned_inside_is_let_go_and_said():
    model, scaling = scaled()
    with pytest.raises(KeyError, match="weight"):
        prune.l1_unstructured(model.fc, "weight", 0.5)
    with pytest.warns(match=r"plain: no longer under scaling: 'fc' \(it is computed now\)"), scaling.plain():
        prune.l1_unstructured(model.fc, "weight", 0.5)
    assert [weight.name for weight in scaling.weights] == ["conv"]


@pytest.mark.parametrize("mended", [False, True])
def test_a_replaced_parameter_is_given_to_an_optimizer(mended):
    model, scaling = scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaling.attach(optimizer)
    with pytest.warns(match=r"'fc' is a new one, and no optimizer that this handle is"), scaling.plain():
        model.fc = nn.Linear(8, 3)
    if mended:
        optimizer.add_param_group({"params": model.fc.parameters()})
    before = model.fc.weight.detach().clone()
    with nullcontext() if mended else pytest.warns(match="1 of 2 weights are in no attached optimizer.*: 'fc'"):
        take_step(model, optimizer)
    assert torch.equal(model.fc.weight, before) == (not mended)
    assert off_targets(scaling) < 1e-5


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_replaced_parameter_is_reduced_once_the_model_is_wrapped_anew():
    def reduced(parallel):
        shapes = []

        def hook(_, bucket):
            shapes.extend(tuple(p.shape) for p in bucket.parameters())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        parallel.register_comm_hook(None, hook)
        parallel(X).square().mean().backward()
        return shapes

    model, scaling = scaled()
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    with scaling.plain():
        model.fc.weight = nn.Parameter(torch.ones(3, 8))
        model.fc.bias = nn.Parameter(torch.ones(3))
    assert (3, 8) not in reduced(parallel)
    assert (3, 8) in reduced(DistributedDataParallel(model))


@pytest.mark.usefixtures("one_process")
def test_a_model_is_scaled_before_it_is_wrapped():
    with pytest.raises(ValueError, match="apply_norm_scaling: the model is under DistributedDataParallel already"):
        apply_norm_scaling(DistributedDataParallel(net()), "frobenius")
    model, scaling = scaled()
    DistributedDataParallel(model)
    assert [weight.name for weight in scaling.weights] == ["conv", "fc"]


def test_a_model_is_scaled_before_it_is_compiled():
    late = apply_norm_scaling(torch.compile(net()), "frobenius")
    assert [weight.name for weight in late.weights] == ["_orig_mod.conv", "_orig_mod.fc"]
    model, scaling = scaled()
    torch.compile(model)
    assert [weight.name for weight in scaling.weights] == ["conv", "fc"]


@pytest.mark.parametrize("mended", [False, True])
def test_a_layer_that_is_new_inside_is_scaled_by_a_call(mended):
    model, scaling = scaled()
    with scaling.plain():
        model.fc = nn.Sequential(nn.Linear(8, 8), model.fc)
    if mended:
        apply_norm_scaling(model, "frobenius", include="fc.0")
    assert is_norm_scaled(model.fc[0]) == mended
    assert is_norm_scaled(model.fc[1])


def test_a_state_dict_is_made_plain():
    model, scaling = scaled()
    for state in (scaling.plain_state_dict(), plain_state_dict(model.state_dict())):
        loaded = Net().eval()
        loaded.load_state_dict(state)
        assert torch.equal(loaded(X), model(X))


@pytest.mark.parametrize("mended", [False, True])
@pytest.mark.parametrize("kind", ["local SGD", "Lookahead"])
def test_an_average_behind_the_step_is_followed_by_a_step(kind, mended):
    model, scaling = scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    if kind == "Lookahead":
        stepped = timm.optim.Lookahead(optimizer, k=1)
        with pytest.raises(ValueError, match="attach: Lookahead never calls step hooks; call"):
            scaling.attach(stepped)
    else:
        stepped = optimizer
    scaling.attach(optimizer)
    others = [p.detach().clone().neg_().add_(1) for p in model.parameters()]
    for _ in range(3):
        take_step(model, stepped)
        if kind == "local SGD":
            for parameter, other in zip(model.parameters(), others, strict=True):
                parameter.data.lerp_(other, 0.5)
        if mended:
            scaling.step()
    assert (off_targets(scaling) < 1e-5) == mended


@pytest.mark.parametrize("mended", [False, True])
def test_an_average_is_projected(mended):
    model, scaling = scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaling.attach(optimizer)
    average = AveragedModel(model)
    for _ in range(3):
        take_step(model, optimizer)
        average.update_parameters(model)
    if mended:
        scaling.project(average)
    norm = average.module.fc.weight.norm().item()
    assert (norm == pytest.approx(scaling.metrics()["target/fc"], rel=1e-5)) == mended


def test_names_that_were_kept_go_on():
    model, scaling = scaled()
    with scaling.plain():
        names = {parameter: name for name, parameter in model.named_parameters()}
    take_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert [names[p] for p in (model.conv.weight, model.fc.weight)] == ["conv.weight", "fc.weight"]
    assert all(names[p] == name for name, p in model.named_parameters() if "parametrizations" not in name)


@pytest.mark.parametrize("mended", [False, True])
def test_a_learning_rate_of_zero_moves_nothing(mended):
    model, scaling = scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaling.attach(optimizer)
    with torch.no_grad():
        model.fc.weight.mul_(2)
    take_step(model, optimizer)
    if mended:
        scaling.project()
    assert (off_targets(scaling) < 1e-5) == mended


@pytest.mark.parametrize("call", ["project", "retarget", "plain"])
def test_weights_that_were_written_are_put_back_or_held(call):
    model, scaling = scaled()
    target = scaling.metrics()["target/fc"]
    write = nn.init.ones_
    if call == "plain":
        with scaling.plain():
            write(model.fc.weight)
        assert scaling.metrics()["target/fc"] == target
        scaling.step()
    else:
        write(model.fc.weight)
        with pytest.warns(match="the weight of 'fc' has changed since it was last scaled"):
            scaling.metrics()
        getattr(scaling, call)()
    assert scaling.metrics()["target/fc"] == pytest.approx(math.sqrt(40) if call == "retarget" else target)
    assert off_targets(scaling) < 1e-5


def test_what_is_refused_inside():
    model, scaling = scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaling.attach(optimizer)
    before = copy.deepcopy(model.state_dict())
    refused = {
        "step": [optimizer.step, scaling.step],
        "apply_norm_scaling": [lambda: apply_norm_scaling(model, "frobenius")],
        "remove_norm_scaling": [lambda: remove_norm_scaling(model)],
        "attach": [lambda: scaling.attach(torch.optim.SGD(model.parameters()))],
        "owned_by": [lambda: scaling.owned_by(optimizer)],
        "weights": [lambda: scaling.weights],
        "num_iterations": [lambda: scaling.num_iterations],
        "print": [lambda: str(scaling)],
        **{
            name: [getattr(scaling, name)]
            for name in ("metrics", "audit", "project", "retarget", "capture", "plain_state_dict", "remove")
        },
    }
    with scaling.plain(), scaling.plain():
        model(X).sum().backward()
        for name, calls in refused.items():
            for call in calls:
                with pytest.raises(ValueError, match=f"^{name}: the model is plain inside `with scaling.plain"):
                    call()
        assert not is_norm_scaled(model)
        assert plain_state_dict(model).keys() == net().state_dict().keys()
    assert is_norm_scaled(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    optimizer.step()
    assert off_targets(scaling) < 1e-5
