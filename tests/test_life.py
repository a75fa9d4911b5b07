"""A scaled model's life: every way in which people train, copy, average, convert and export a model."""

import copy
from functools import partial

import onnxruntime
import pytest
import schedulefree
import timm
import torch
from held import off_target
from safetensors.torch import load_file, save_file
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from specscale import (
    NonFiniteWeightError,
    NormScaler,
    apply_norm_scaling,
    is_norm_scaled,
    remove_norm_scaling,
    singular_values,
    spectral_norms,
)
from specscale.step import ScalingStep

both = pytest.mark.parametrize("norm", ["frobenius", "spectral"])


class Net(nn.Module):
    """One layer that the block solves, one that is solved exactly, and one without its bias."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Linear(8 * 16, 80)
        self.head = nn.Linear(80, 4, bias=False)

    def forward(self, x):
        return self.head(self.body(self.stem(x).relu().flatten(1)).relu())


def net():
    torch.manual_seed(0)
    return Net()


def assert_held(scaling, tolerance=1e-3):
    """Each Frobenius norm is its target; under spectral scaling a singular value is."""
    assert scaling.weights
    for weight in scaling.weights:
        assert off_target(weight) <= tolerance, weight.name


def batch_of(seed=0):
    return torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def loss_on(model, x):
    return (model(x) - x.mean((1, 2, 3))[:, None]).square().mean()


def loss_of(model, seed=0):
    return loss_on(model, batch_of(seed))


def train(model, optimizer, scaling, steps=3):
    for seed in range(steps):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()
        assert_held(scaling)


class TwoSteps(torch.optim.Optimizer):
    """A sharpness-aware optimizer: a step uphill, a gradient there, and the base optimizer's step from where it was."""

    def __init__(self, params, base):
        super().__init__(params, {})
        self.base = base
        self.param_groups = base.param_groups

    def step(self, closure):
        parameters = [p for group in self.param_groups for p in group["params"]]
        start = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.add_(p.grad, alpha=0.05)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p, value in zip(parameters, start, strict=True):
                p.copy_(value)
        self.base.step()


OPTIMIZERS = {
    "foreach": partial(torch.optim.AdamW, lr=1e-2, foreach=True),
    "fused": partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3),
    "nadam": partial(torch.optim.NAdam, lr=1e-2),
    "schedule-free": partial(schedulefree.AdamWScheduleFree, lr=1e-2),
}


@both
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_end_each_step_on_the_targets(make, norm):
    scaling = apply_norm_scaling(model := net(), norm, init="orthogonal")
    optimizer = make(model.parameters())
    scaling.attach(optimizer)
    if hasattr(optimizer, "train"):
        optimizer.train()
    train(model, optimizer, scaling)


@both
def test_muon_beside_adam(norm):
    scaling = apply_norm_scaling(model := net(), norm)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    optimizers = [
        torch.optim.Muon(matrices, lr=1e-2),
        torch.optim.Adam([p for p in model.parameters() if p.ndim != 2], lr=1e-2),
    ]
    for optimizer in optimizers:
        scaling.attach(optimizer)
    for seed in range(3):
        model.zero_grad()
        loss_of(model, seed).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert_held(scaling)


@both
def test_lbfgs_with_a_closure(norm):
    scaling = apply_norm_scaling(model := net(), norm)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    scaling.attach(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
        assert_held(scaling)


@both
def test_a_sharpness_aware_optimizer_is_attached_by_its_base(norm):
    scaling = apply_norm_scaling(model := net(), norm)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    scaling.attach(base)
    optimizer = TwoSteps(model.parameters(), base)

    def closure():
        optimizer.zero_grad()
        loss_of(model).backward()

    for _ in range(3):
        closure()
        optimizer.step(closure)
        assert_held(scaling)


# Dynamo looks at the gradients of all that it resumes with.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("norm", "what", "backend"),
    [
        *((norm, "model", "aot_eager") for norm in ("frobenius", "spectral")),
        # The tracing alone, without the lowering.
        ("frobenius", "training step", "eager"),
        *(
            pytest.param(norm, what, "aot_eager", marks=pytest.mark.slow)
            for norm in ("frobenius", "spectral")
            for what in ("step", "training step")
        ),
    ],
)
def test_compiled(what, norm, backend):
    torch.compiler.reset()
    scaling = apply_norm_scaling(model := net(), norm)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaling.attach(optimizer)
    # Drawn here: the compiler of torch 2.9 warns of a generator that is made in what it traces.
    x = batch_of()

    def training_step(model, step):
        optimizer.zero_grad()
        loss_on(model, x).backward()
        step()

    compiled = partial(torch.compile, backend=backend)
    call = {
        "model": lambda: training_step(compiled_model, optimizer.step),
        "step": lambda: training_step(model, compiled_step),
        "training step": lambda: compiled_training_step(model, optimizer.step),
    }[what]
    compiled_model, compiled_step = compiled(model), compiled(optimizer.step)
    compiled_training_step = compiled(training_step)
    before = model.body.weight.detach().clone()
    for _ in range(3):
        call()
        assert_held(scaling)
    assert not torch.equal(before, model.body.weight)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision(norm, dtype):
    scaling = apply_norm_scaling(model := net(), norm)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaling.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    before = model.body.weight.detach().clone()
    for seed in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = loss_of(model, seed)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert_held(scaling)
    assert not torch.equal(before, model.body.weight)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_model_of_another_dtype(norm, dtype):
    scaling = apply_norm_scaling(model := net().to(dtype), norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaling.attach(optimizer)
    for _ in range(3):
        model.zero_grad()
        (model(torch.randn(8, 3, 4, 4).to(dtype)) - 1).square().mean().backward()
        optimizer.step()
        # What is stored in so few bits is on target to their rounding.
        assert_held(scaling, max(1e-3, 2 * torch.finfo(dtype).eps))


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nothing_is_computed_in_a_surrounding_autocast(norm, dtype):
    told = []
    for enabled in (False, True):
        model = net()
        generator = torch.Generator().manual_seed(0)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            scaling = apply_norm_scaling(model, norm, init="orthogonal", generator=generator)
            with torch.no_grad():
                model.body.weight.add_(torch.ones(80, 128) / 50)
            scaling.step()
            told.append([scaling.metrics(), scaling.audit().worst_error, spectral_norms(model)])
            scaling.retarget()
            scaling.project()
            told[-1].append([values.tolist() for values in singular_values(model).values()])
            assert_held(scaling)
    assert told[0] == told[1]


@both
@pytest.mark.parametrize("first", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("then", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_weight_that_changes_its_dtype_is_scaled_on(norm, first, then):
    scaling = apply_norm_scaling(model := net().to(first), norm)
    for convert in (
        lambda: model.to(then),
        lambda: model.load_state_dict(net().to(then).state_dict(), assign=True),
        lambda: setattr(model.body.parametrizations.weight.original, "data", torch.randn(80, 128).to(then)),
    ):
        convert()
        with torch.no_grad():
            model.body.parametrizations.weight.original.mul_(1.5)
        scaling.step()
        assert model.body.weight.dtype == then
        assert_held(scaling, max(1e-3, 2 * torch.finfo(then).eps))


class Forgetful(torch.optim.SGD):
    """Clears the gradients within its step."""

    def step(self, closure=None):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.sub_(0.1 * p.grad)
        self.zero_grad()


class Blind(torch.optim.SGD):
    """Searches without gradients."""

    def step(self, closure=None):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.grad = None
                p.add_(torch.randn_like(p), alpha=0.1)


@both
@pytest.mark.parametrize("kind", [Forgetful, Blind])
def test_what_an_optimizer_without_gradients_has_moved_is_scaled(norm, kind):
    scaling = apply_norm_scaling(model := net(), norm)
    optimizer = kind(model.parameters(), lr=0.1)
    scaling.attach(optimizer)
    train(model, optimizer, scaling)
    norms = {name: value for name, value in scaling.metrics().items() if name.startswith("norm/")}
    assert all(weight.parameter.grad is None for weight in scaling.weights)
    assert norms["norm/body"] > 0


@both
@pytest.mark.parametrize("fails", [False, True])
def test_an_optimizer_that_overrides_step_scales_once_when_all_is_done(norm, fails, monkeypatch):
    class Decayed(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            if fails and not raised:
                raised.append(True)
                raise RuntimeError("once")
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.mul_(0.9)

    calls, raised = [], []
    take = ScalingStep.take
    monkeypatch.setattr(ScalingStep, "take", lambda self, *args: (calls.append(len(args[0])), take(self, *args)))
    scaling = apply_norm_scaling(model := net(), norm)
    # torch puts its hooks around a class's own step when it first makes an instance.
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer = Decayed(model.parameters(), lr=0.1)
    scaling.attach(optimizer)
    loss_of(model).backward()
    if fails:
        with pytest.raises(RuntimeError, match="once"):
            optimizer.step()
    for _ in range(3):
        optimizer.step()
        assert_held(scaling)
    assert calls == [3, 3, 3]


@both
def test_gradient_accumulation_scales_once_a_step(norm):
    scaling = apply_norm_scaling(model := net(), norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaling.attach(optimizer)
    for seed in range(4):
        before = model.body.weight.detach().clone()
        loss_of(model, seed).backward()
        if seed % 2:
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(before, model.body.weight) == (seed % 2 == 0)
        assert_held(scaling)


@both
def test_gradient_checkpointing_gives_the_same_gradients(norm):
    scaling = apply_norm_scaling(model := net(), norm)
    scaling.step()
    loss_of(model).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss_of(lambda x: checkpoint(model, x, use_reentrant=False)).backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), expected, strict=True))


@both
@pytest.mark.parametrize("kind", ["AveragedModel", "AveragedModel of buffers too", "ModelEmaV3"])
def test_an_average_of_weights_is_projected(norm, kind):
    scaling = apply_norm_scaling(model := net(), norm, init="orthogonal")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    scaling.attach(optimizer)
    if kind == "ModelEmaV3":
        average = ModelEmaV3(model, decay=0.5)
        update = average.update
    else:
        rule = get_ema_multi_avg_fn(0.5)
        average = AveragedModel(model, multi_avg_fn=rule, use_buffers="buffers" in kind)
        update = average.update_parameters
    for _ in range(4):
        train(model, optimizer, scaling, steps=1)
        update(model)
    with pytest.raises(AssertionError):
        assert_held(NormScaler.of(average), 1e-5)
    own = copy.deepcopy(model.state_dict())
    scaling.project(average)
    assert_held(NormScaler.of(average), 1e-5)
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    twin = copy.deepcopy(average)
    plain = NormScaler.of(twin).remove()
    assert loss_of(plain.module).item() == pytest.approx(loss_of(average.module).item())


def test_what_cannot_be_projected_is_refused():
    scaling = apply_norm_scaling(model := net())
    with pytest.raises(ValueError, match=r"project: Net has no scaled weight; load the average into a copy of the sca"):
        scaling.project(net())
    model.head.weight.data[0, 0] = torch.nan
    for call in (scaling.project, scaling.retarget):
        with pytest.raises(NonFiniteWeightError, match=f"{call.__name__}: the weight of 'head' holds NaN"):
            call()


@both
def test_functional_call_and_its_gradients(norm):
    apply_norm_scaling(model := net(), norm)
    loss_of(model).backward()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    grads = torch.func.grad(lambda p: loss_of(lambda x: torch.func.functional_call(model, p, x)))(parameters)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)


# What is exported is the plain model, whatever the norm was.
@pytest.mark.parametrize("norm", ["frobenius", pytest.param("spectral", marks=pytest.mark.slow)])
def test_export_after_removal(norm, tmp_path):
    scaling = apply_norm_scaling(model := net(), norm)
    scaling.step()
    model = scaling.remove().eval()
    x = torch.randn(2, 3, 4, 4)
    expected = model(x).detach()
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.onnx.export(model, (x,), tmp_path / "net.onnx", dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@both
def test_tied_weights_stay_tied(norm):
    model = nn.ModuleDict({"embed": nn.Embedding(30, 80), "body": nn.Linear(80, 80), "head": nn.Linear(80, 30)})
    model.head.weight = model.embed.weight
    scaling = apply_norm_scaling(model, norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaling.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model.head(model.body(model.embed(torch.arange(30)))).logsumexp(-1).mean().backward()
        optimizer.step()
        assert_held(scaling)
        assert model.head.weight is model.embed.weight
    plain = scaling.plain_state_dict()
    assert torch.equal(plain["head.weight"], plain["embed.weight"])
    scaling.remove()
    assert model.head.weight is model.embed.weight


class LowRank(nn.Module):
    """LoRA as a parametrization."""

    def __init__(self, m, n):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(m, 2))
        self.down = nn.Parameter(torch.randn(2, n) / n**0.5)

    def forward(self, weight):
        return weight + self.up @ self.down


@both
def test_a_parametrization_on_top_works_on_the_scaled_weight_and_outlives_the_scaling(norm):
    model = net()
    scaling = apply_norm_scaling(model, norm)
    adapter = LowRank(80, 128)
    parametrize.register_parametrization(model.body, "weight", adapter)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaling.attach(optimizer)
    train(model, optimizer, scaling)
    weight = model.body.parametrizations.weight.original
    assert adapter.up.abs().max() > 0
    before = model.body.weight.detach().clone()
    copied = copy.deepcopy(model)
    for one, handle in ((copied, NormScaler.of(copied)), (model, scaling)):
        handle.remove()
        assert not is_norm_scaled(one)
        assert torch.equal(one.body.weight, before)
        assert isinstance(one.head.weight, nn.Parameter)
    assert model.body.parametrizations.weight.original is weight
    assert list(model.body.parametrizations.weight) == [adapter]
    parametrize.remove_parametrizations(model.body, "weight")
    loss_of(model).backward()


@both
def test_a_layer_that_is_frozen_in_the_middle_stays_where_it_is(norm):
    scaling = apply_norm_scaling(model := net(), norm, init="orthogonal")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaling.attach(optimizer)
    train(model, optimizer, scaling)
    model.body.requires_grad_(False)
    body, head = model.body.weight.detach().clone(), model.head.weight.detach().clone()
    train(model, optimizer, scaling)
    scaling.step()
    assert torch.equal(model.body.weight, body)
    assert not torch.equal(model.head.weight, head)
    model.body.requires_grad_(True)
    train(model, optimizer, scaling)
    assert not torch.equal(model.body.weight, body)


@both
def test_a_classifier_that_is_reset_is_let_go_and_can_be_scaled_again(norm):
    model = timm.create_model("resnet18", num_classes=3)
    scaling = apply_norm_scaling(model, norm, include=["layer4.1", "fc"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaling.attach(optimizer)
    model.reset_classifier(5)
    assert [weight.name for weight in scaling.weights] == ["layer4.1.conv1", "layer4.1.conv2"]
    with pytest.warns(UserWarning, match="metrics: the weight of 'fc' is not in the model any more"):
        assert not any("fc" in key for key in scaling.metrics())
    apply_norm_scaling(model, norm, include="fc")
    assert [weight.name for weight in NormScaler.of(model).weights] == ["layer4.1.conv1", "layer4.1.conv2", "fc"]
    remove_norm_scaling(model)
    assert not is_norm_scaled(model)


@both
def test_an_old_checkpoint_without_the_buffers_loads(norm):
    scaling = apply_norm_scaling(source := net(), norm)
    optimizer = torch.optim.SGD(source.parameters(), lr=0.1)
    scaling.attach(optimizer)
    train(source, optimizer, scaling)
    old = {n: v for n, v in source.state_dict().items() if ".0." not in n or n.endswith(f"target_{norm}")}
    other = apply_norm_scaling(model := net(), norm, target=0.7)
    model.load_state_dict(old, strict=True)
    assert other.metrics()["target/body"] == scaling.metrics()["target/body"]
    assert torch.equal(model.body.weight, source.body.weight)
    assert other.metrics()["norm/body"] == pytest.approx(scaling.metrics()["norm/body"], rel=1e-3)


@both
def test_targets_are_measured_anew_from_loaded_weights(norm):
    torch.manual_seed(5)
    other = Net()
    scaling = apply_norm_scaling(model := net(), norm)
    before = scaling.metrics()
    model.load_state_dict(other.state_dict())
    assert all(scaling.metrics()[key] == value for key, value in before.items() if key.startswith("target"))
    scaling.retarget()
    kind = "fro" if norm == "frobenius" else 2
    exact = torch.linalg.matrix_norm(other.body.weight.detach().double(), kind).item()
    assert scaling.metrics()["target/body"] == pytest.approx(exact, rel=1e-5)
    assert scaling.metrics()["excess/body"] == pytest.approx(0, abs=1e-5)
    for weight in scaling.weights:
        assert weight.scaling.target != pytest.approx(before[f"target/{weight.name}"], rel=1e-5)


@both
def test_safetensors_and_timm_read_what_was_trained(norm, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    scaling = apply_norm_scaling(model, norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaling.attach(optimizer)
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    save_file(scaling.plain_state_dict(), tmp_path / "model.safetensors")
    torch.save(scaling.plain_state_dict(), tmp_path / "model.pth")
    for name in ("model.safetensors", "model.pth"):
        other = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3, checkpoint_path=str(tmp_path / name)
        )
        assert all(torch.equal(v, scaling.plain_state_dict()[k]) for k, v in other.state_dict().items())
    loaded = apply_norm_scaling(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3), norm)
    loaded._model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(loaded._model.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


@both
def test_from_the_meta_device_by_way_of_memory_and_values(norm):
    with torch.device("meta"):
        model = Net()
    with pytest.raises(
        ValueError, match=r"on the meta device and holds no numbers; give the model memory \(to_empty\)"
    ):
        apply_norm_scaling(model, norm)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    scaling = apply_norm_scaling(model, norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaling.attach(optimizer)
    train(model, optimizer, scaling)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_timms_parameter_groups_are_those_of_the_plain_model(name):
    model = timm.create_model(name)
    rules = [
        partial(param_groups_weight_decay, no_weight_decay_list=_no_decay(model)),
        partial(param_groups_layer_decay, no_weight_decay_list=_no_decay(model)),
    ]

    def groups():
        return [
            {id(p): (group["weight_decay"], group.get("lr_scale")) for group in rule(model) for p in group["params"]}
            for rule in rules
        ]

    plain = groups()
    apply_norm_scaling(model, "frobenius")
    assert groups() == plain


def _no_decay(model):
    return model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()


SCRIPT = """
import timm, torch

torch.manual_seed(0)
model = timm.create_model("{name}", num_classes=10, checkpoint_path="{start}"{options})
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
{scale}
for step in range(5):
    images, labels = torch.randn(4, 3, 64, 64), torch.randint(10, (4,))
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
{plain}
torch.save(model.state_dict(), "{end}")
"""


@pytest.mark.parametrize(
    ("name", "options", "norm"),
    [
        ("test_resnet", {}, "frobenius"),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 1}, "spectral"),
        pytest.param("resnet18", {}, "frobenius", marks=pytest.mark.slow),
        pytest.param("resnet18", {}, "spectral", marks=pytest.mark.slow),
        pytest.param("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}, "frobenius", marks=pytest.mark.slow),
    ],
)
def test_two_lines_in_a_fine_tuning_script_and_plain_timm_reads_its_weights(name, options, norm, tmp_path):
    start, end = tmp_path / "start.pth", tmp_path / "end.pth"
    before = timm.create_model(name, num_classes=10, **options)
    torch.save(before.state_dict(), start)
    names = {
        "name": name,
        "options": "".join(f", {key}={value}" for key, value in options.items()),
        "start": start,
        "end": end,
        "scale": f"scaling = apply_norm_scaling(model, {norm!r}).attach(optimizer)",
        "plain": "scaling.remove()",
    }
    exec(SCRIPT.format(**names), {"apply_norm_scaling": apply_norm_scaling})
    after = timm.create_model(name, num_classes=10, checkpoint_path=str(end), **options)
    kind = "fro" if norm == "frobenius" else 2
    targets = {weight.name: weight.scaling.target for weight in apply_norm_scaling(before, norm).weights}
    for name, module in after.named_modules():
        if name in targets:
            assert not torch.equal(module.weight, before.get_submodule(name).weight)
            matrices = module.weight.detach().flatten(1).unflatten(0, (len(targets[name]), -1))
            norms = torch.linalg.matrix_norm(matrices, kind)
            # Under spectral scaling the second singular value may lie above the target.
            assert (norms >= (1 - 1e-3) * targets[name]).all()
            assert norm == "spectral" or (norms <= (1 + 1e-3) * targets[name]).all()
