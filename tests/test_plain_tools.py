"""`with scaling.plain()` over other people's tools: each meets the plain model, and training goes on behind it."""

import contextlib
import copy
import importlib
import io
import pickle
import warnings

import pytest
import timm
import torch
import torch.distributed as dist
import transformers
from held import off_target
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import CheckpointSaver, ModelEmaV3, freeze, unfreeze
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from transformers.trainer_pt_utils import get_parameter_names

from specscale import LayerRule, MatrixView, apply_norm_scaling, is_norm_scaled, plain_state_dict

NORMS = ("frobenius", "spectral")


def without_torchs_own_warnings(test):
    """Without what torch's quantization says of its own end, and of its own options."""
    for text in (
        "torch.ao.quantization is deprecated and will be removed:DeprecationWarning",
        "torch.quantize_per_tensor, torch.quantize_per_channel and other quantized tensor creation functions",
        "Please use quant_min and quant_max to specify the range for observers:UserWarning",
    ):
        test = pytest.mark.filterwarnings(f"ignore:{text}")(test)
    return test


@pytest.fixture(autouse=True)
def _one_thread():
    # Models this small spend their time waiting for threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Mixed(nn.Module):
    """Layers of many kinds, some with several scaled tensors."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.rnn = nn.LSTM(8, 6, bidirectional=True, batch_first=True)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        # Wide enough for the solver to have a state of its own.
        self.wide = nn.Sequential(nn.Linear(12, 96), nn.ReLU(), nn.Linear(96, 80), nn.ReLU())
        self.fc = nn.Linear(80, 3)

    def forward(self, x):
        x = self.grouped(self.stem(x)).flatten(2).transpose(1, 2)
        x, _ = self.rnn(x)
        return self.fc(self.wide(self.attention(x, x, x, need_weights=False)[0].mean(1)))


def images(count=4):
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))


def convnet():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))


def vit():
    torch.manual_seed(0)
    return VisionTransformer(img_size=8, patch_size=4, in_chans=2, embed_dim=16, depth=2, num_heads=2, num_classes=5)


def resnet():
    torch.manual_seed(0)
    return ResNet(
        BasicBlock, (1, 1, 1, 1), channels=(8, 8, 8, 8), stem_width=8, in_chans=2, num_classes=5, zero_init_last=False
    )


def gpt2(**options):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 8}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **options))


def tokens():
    return torch.arange(16).reshape(2, 8)


def output(model, x):
    """What the model gives in evaluation mode."""
    training = model.training
    with torch.no_grad():
        out = model.eval()(x)
    model.train(training)
    return getattr(out, "logits", out)


def train(model, optimizer, x, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(x)
        getattr(out, "logits", out).square().mean().backward()
        optimizer.step()


def scaled(model, norm="spectral", optimizer=torch.optim.Adam, **options):
    """The handle of the model, attached, and the optimizer."""
    scaling = apply_norm_scaling(model, norm, solver="svd", **options)
    optimizer = optimizer(model.parameters(), lr=1e-2)
    return scaling.attach(optimizer), optimizer


def names(scaling):
    return [weight.name for weight in scaling.weights]


def assert_training_holds(scaling, model, optimizer, x):
    """Train on: each weight that has a gradient moves, and ends on its target."""
    before = {weight.name: weight.parameter.detach().clone() for weight in scaling.weights}
    train(model, optimizer, x)
    for weight in scaling.weights:
        assert torch.equal(weight.parameter, before[weight.name]) is (weight.parameter.grad is None), weight.name
    stepped = [weight for weight in scaling.weights if weight.parameter.grad is not None]
    assert max(map(off_target, stepped)) <= 1e-4
    return [weight.name for weight in stepped]


def assert_equal_tensors(one, other):
    assert list(one) == list(other)
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


# What changes nothing. Each gives what the tool has seen, which can be compared.


def see_the_names(model, _):
    return list(model.state_dict()), [(name, type(module)) for name, module in model.named_modules()], repr(model)


def build_groups(model, _):
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=("fc.weight",))
    optimizer = torch.optim.AdamW(groups)
    return [[name_of[one] for one in group["params"]] for group in optimizer.param_groups]


def find_decayed(model, _):
    return get_parameter_names(model, [nn.BatchNorm2d, nn.Linear], [r"bias"])


def save_state(model, folder):
    torch.save(model.state_dict(), folder / "state.pt")
    return {key: value.tolist() for key, value in torch.load(folder / "state.pt").items()}


def save_whole(model, folder):
    torch.save(model, folder / "model.pt")
    return what_is_left(torch.load(folder / "model.pt", weights_only=False))


def pickle_whole(model, _):
    return what_is_left(pickle.loads(pickle.dumps(model)))


def load_the_same(model, folder):
    """It writes to every weight, and changes none."""
    save_state(model, folder)
    return str(model.load_state_dict(torch.load(folder / "state.pt")))


def average(model, _):
    """It goes by the order of the state dict's entries."""
    average = ModelEmaV3(model, decay=0.5)
    average.update(model)
    return what_is_left(average.module)


def differentiate(model, _):
    def loss(parameters):
        return torch.func.functional_call(model.eval(), parameters, images()).square().sum()

    gradients = torch.func.grad(loss)({name: value.detach() for name, value in model.named_parameters()})
    model.train()
    return [(name, value.tolist()) for name, value in gradients.items()]


def copy_and_train(model, _):
    copied = copy.deepcopy(model)
    train(copied, torch.optim.SGD(copied.parameters(), lr=0.1), images())
    return what_is_left(copied)


def quantize_a_copy(model, _):
    return output(torch.ao.quantization.quantize_dynamic(model, {nn.Linear, nn.LSTM}), images()).tolist()


def what_is_left(model):
    assert not is_norm_scaled(model)
    return see_the_names(model, None), output(model, images()).tolist()


NAMING = [see_the_names, build_groups, find_decayed, save_state, differentiate]
HARMLESS = [*NAMING, load_the_same, save_whole, pickle_whole, copy_and_train, average, quantize_a_copy]


def trained(norm, between=()):
    """All that training leaves; in its middle, each of `between` is called inside a context."""
    torch.manual_seed(0)
    model = Mixed()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaling = apply_norm_scaling(model, norm, init="orthogonal").attach(optimizer)
    train(model, optimizer, images())
    for use in between:
        with scaling.plain() as plain:
            use(plain)
        # No warning of weights that have been changed behind the step.
        scaling.metrics()
    train(model, optimizer, images())
    state = optimizer.state_dict()["state"]
    return model.state_dict() | {f"{i} {key}": value for i, own in state.items() for key, value in own.items()}


@without_torchs_own_warnings
@pytest.mark.parametrize("norm", NORMS)
def test_what_changes_nothing_sees_the_plain_model_and_training_goes_on_bit_for_bit(norm, tmp_path):
    def see(model):
        twin = Mixed()
        twin.load_state_dict(model.state_dict())
        for tool in HARMLESS:
            assert tool(model, tmp_path) == tool(twin, tmp_path), tool.__name__
        seen.append(model)

    seen = []
    whole, interrupted = trained(norm), trained(norm, [see, see])
    assert len(seen) == 2
    assert norm == "frobenius" or any(name.endswith("wide.2.parametrizations.weight.0.basis") for name in whole)
    assert_equal_tensors(interrupted, whole)


def test_behind_a_scaling_the_tools_see_another_model(tmp_path):
    """Without the context, what the tests above compare is not the same: they can fail."""
    apply_norm_scaling(model := Mixed())
    twin = Mixed()
    twin.load_state_dict(plain_state_dict(model))
    for tool in NAMING:
        assert tool(model, tmp_path) != tool(twin, tmp_path), tool.__name__
    for tool in (pickle_whole, save_whole):
        with pytest.raises(RuntimeError, match=r"pickle: the model is under norm scaling.* `with scaling.plain"):
            tool(model, tmp_path)


def test_a_whole_model_that_was_saved_inside_is_plain_and_can_be_scaled():
    scaling, optimizer = scaled(model := Mixed(), init="orthogonal")
    file = io.BytesIO()
    with scaling.plain():
        torch.save(model, file)
        copied = copy.deepcopy(model)
        # The copy is a model of its own: it is not plain for a while only.
        apply_norm_scaling(copied)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert not is_norm_scaled(loaded)
    for other in (loaded, copied):
        assert torch.equal(output(other, images()), output(model, images()))
    for other, (handle, own) in ((loaded, scaled(loaded)), (model, (scaling, optimizer))):
        assert len(names(handle)) == 11
        assert_training_holds(handle, other, own, images())


# timm


def group_names(model, groups):
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    return [[*map(name_of.get, group["params"]), group["weight_decay"], group.get("lr_scale")] for group in groups]


def test_timms_groups_are_those_of_the_plain_model():
    """The names decide which parameters decay, and the order to which number an optimizer's state belongs."""

    def groups(model):
        no_decay = ("head.weight", *model.no_weight_decay())
        return [
            group_names(model, param_groups_weight_decay(model, 0.1, no_decay)),
            group_names(model, param_groups_layer_decay(model, 0.1, no_decay, layer_decay=0.5)),
        ]

    scaling = apply_norm_scaling(model := vit())
    assert groups(model) != groups(vit())
    with scaling.plain():
        assert groups(model) == groups(vit())
        optimizer = torch.optim.AdamW(param_groups_layer_decay(model, 0.1, layer_decay=0.5), lr=1e-2)
    scaling.attach(optimizer)
    assert len(scaling.owned_by(optimizer)) == len(names(scaling)) == 10


@pytest.mark.parametrize("num_classes", [5, 7])
def test_timms_classifier_is_reset(num_classes):
    scaling, optimizer = scaled(model := vit(), target=0.7)
    before = names(scaling)
    x = torch.randn(2, 2, 8, 8)
    match = "^plain: the parameter of 'head' is a new one, and no optimizer that this handle is attached to holds it"
    with pytest.warns(UserWarning, match=match), scaling.plain():
        model.reset_classifier(num_classes)
    assert names(scaling) == before
    optimizer.add_param_group({"params": list(model.head.parameters())})
    assert assert_training_holds(scaling, model, optimizer, x) == before
    assert output(model, x).shape == (2, num_classes)
    assert scaling.metrics()["target/head"] == pytest.approx(0.7)


def test_a_classifier_that_the_optimizer_gets_inside_needs_no_warning():
    scaling, optimizer = scaled(model := resnet(), "frobenius")
    with scaling.plain():
        model.reset_classifier(3)
        nn.init.normal_(model.fc.weight)
        optimizer.add_param_group({"params": list(model.fc.parameters())})
    # No rule gives a norm for another shape: it is held at the norm that it has.
    assert scaling.metrics()["target/fc"] == pytest.approx(model.fc.weight.norm().item())
    assert "fc" in assert_training_holds(scaling, model, optimizer, torch.randn(4, 2, 32, 32))


def test_timms_saver_writes_what_plain_timm_reads(tmp_path):
    scaling, optimizer = scaled(model := resnet())
    train(model, optimizer, x := torch.randn(4, 2, 32, 32))
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    with scaling.plain():
        saver.save_checkpoint(0, metric=1.0)
    timm.models.load_checkpoint(loaded := resnet(), str(tmp_path / "model_best.pth.tar"))
    assert torch.equal(output(loaded, x), output(model, x))
    assert_training_holds(scaling, model, optimizer, x)


def test_timm_freezes_and_unfreezes_by_names_and_types():
    scaling, optimizer = scaled(model := resnet())
    before, x = names(scaling), torch.randn(4, 2, 32, 32)
    with scaling.plain():
        freeze(model, ["layer1", "conv1"])
    assert type(model.layer1[0].bn1).__name__ == "FrozenBatchNorm2d"
    frozen = [name for name in before if name.startswith(("layer1", "conv1"))]
    assert len(frozen) == 4
    optimizer.zero_grad()
    assert assert_training_holds(scaling, model, optimizer, x) == [name for name in before if name not in frozen]
    with scaling.plain():
        unfreeze(model, ["layer1", "conv1"])
    assert assert_training_holds(scaling, model, optimizer, x) == before == names(scaling)


# transformers


def test_transformers_ties_its_weights():
    scaling, optimizer = scaled(model := gpt2())
    with pytest.raises(KeyError, match=r"'weight' already exists: it is under norm scaling. Assign it inside"):
        model.tie_weights()
    with scaling.plain():
        model.tie_weights()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head" in assert_training_holds(scaling, model, optimizer, tokens())


def test_weights_that_become_one_keep_one_state():
    rule = LayerRule(nn.Embedding, {"weight": MatrixView("o i")})
    scaling, optimizer = scaled(model := gpt2(tie_word_embeddings=False), rules=[rule])
    both = {"transformer.wte", "lm_head"}
    assert both <= set(names(scaling))
    with scaling.plain():
        model.config.tie_word_embeddings = True
        model.tie_weights()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert len(both & set(names(scaling))) == 1
    assert_training_holds(scaling, model, optimizer, tokens())


@pytest.mark.parametrize("size", [56, 40])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_resizes_its_embeddings(size, tied):
    scaling, optimizer = scaled(model := gpt2(tie_word_embeddings=tied), target="matrix")
    before = names(scaling)
    # The embedding's parameter gets other values, of another shape, and stays the optimizer's. A head gets a new one.
    warned = contextlib.nullcontext() if tied else pytest.warns(UserWarning, match="parameter of 'lm_head' is a new")
    with warned, scaling.plain():
        model.resize_token_embeddings(size, mean_resizing=False)
    if not tied:
        optimizer.add_param_group({"params": [model.lm_head.weight]})
    assert (model.lm_head.weight is model.transformer.wte.weight) is tied
    assert model.lm_head.weight.shape == (size, 16)
    assert assert_training_holds(scaling, model, optimizer, tokens()) == before
    assert scaling.metrics()["target/lm_head"] == pytest.approx((size / 16) ** 0.5)


def test_a_pretrained_folder_that_is_saved_inside_is_plain(tmp_path):
    scaling, optimizer = scaled(model := gpt2())
    train(model, optimizer, tokens())
    with scaling.plain():
        model.save_pretrained(tmp_path)
        inside, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for loaded in (inside, transformers.AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert list(loaded.state_dict()) == list(gpt2().state_dict())
        assert torch.equal(output(loaded, tokens()), output(model, tokens()))
    assert_training_holds(scaling, model, optimizer, tokens())


def test_the_trainers_optimizer_decays_what_it_would_without_scaling(tmp_path):
    def trainer_of(model):
        arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], weight_decay=0.1)
        return transformers.Trainer(model, arguments)

    def decayed(trainer):
        name_of = {parameter: name for name, parameter in trainer.model.named_parameters()}
        groups = trainer.create_optimizer().param_groups
        return [([*map(name_of.get, group["params"])], group["weight_decay"]) for group in groups]

    scaling = apply_norm_scaling(model := gpt2())
    trainer, twin = trainer_of(model), trainer_of(gpt2())
    with scaling.plain():
        assert trainer.get_decay_parameter_names(model) == twin.get_decay_parameter_names(twin.model)
        assert decayed(trainer) == decayed(twin)
    scaling.attach(trainer.optimizer)
    assert len(scaling.owned_by(trainer.optimizer)) == len(names(scaling))
    assert_training_holds(scaling, model, trainer.optimizer, tokens())


def test_transformers_initialises_anew():
    """The layers keep their targets; what the solver continues from belongs to the new values."""
    scaling, optimizer = scaled(model := gpt2(), target=0.5)
    before = names(scaling)
    with scaling.plain():
        for module in model.modules():
            module._is_hf_initialized = False
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = False
        model.config.initializer_range = model.transformer.config.initializer_range = 3.0
        model.init_weights()
    assert names(scaling) == before
    metrics = scaling.metrics()
    for weight in scaling.weights:
        norm = torch.linalg.matrix_norm(weight.scaling.matrices(weight.parameter), 2).max().item()
        assert metrics[f"norm/{weight.name}"] == pytest.approx(norm, rel=1e-4)
        assert metrics[f"target/{weight.name}"] == 0.5
        assert norm > 5
    assert assert_training_holds(scaling, model, optimizer, tokens()) == before


# PEFT


@pytest.fixture
def peft():
    """It takes seconds to import, which the other tests do not need."""
    return importlib.import_module("peft")


@pytest.mark.parametrize("norm", NORMS)
def test_peft_wraps_the_layers_and_merges_them_again(norm, peft):
    scaling, _ = scaled(model := mlp(), norm)
    x, before = torch.randn(4, 12), output(model, torch.ones(1, 12))
    scalings = [weight.scaling for weight in scaling.weights]
    with scaling.plain():
        config = peft.LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
    assert names(scaling) == ["0.base_layer", "2.base_layer", "4"]
    assert [weight.scaling for weight in scaling.weights] == scalings
    assert not any("lora" in name for name in scaling.metrics())
    # The adapters alone are trained, and are not scaled.
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    lora = model[0].lora_A["default"].weight
    start = lora.norm().item()
    train(adapted, optimizer, x, steps=5)
    assert lora.norm().item() != pytest.approx(start, rel=1e-3)
    with adapted.disable_adapter():
        assert torch.equal(output(adapted, torch.ones(1, 12)), before)
    # Merged, the base weights are others under the same names, with the targets that they had.
    targets = [weight.scaling.target.clone() for weight in scaling.weights]
    expected = output(adapted, x)
    with scaling.plain():
        assert adapted.merge_and_unload() is model
    torch.testing.assert_close(output(model, x), expected)
    assert names(scaling) == ["0", "2", "4"]
    assert scaling.metrics()["excess/0"] > 0.1, "the merged weight has a norm of its own, which is known"
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    scaling.detach()
    scaling.attach(optimizer := torch.optim.Adam(model.parameters(), lr=1e-2))
    assert_training_holds(scaling, model, optimizer, x)
    assert all(map(torch.equal, targets, (weight.scaling.target for weight in scaling.weights)))


def test_peft_changes_the_weights_that_it_wraps(peft):
    """PiSSA moves a part of each base weight into its adapter."""
    scaling, _ = scaled(model := mlp())
    before = scaling.metrics()
    with scaling.plain():
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["2"], r=4, init_lora_weights="pissa"))
    after, weight = scaling.metrics(), model[2].base_layer.weight
    assert after["norm/2.base_layer"] == pytest.approx(torch.linalg.matrix_norm(weight, 2).item(), rel=1e-4)
    assert after["norm/2.base_layer"] < 0.9 * before["norm/2"]
    assert after["target/2.base_layer"] == before["target/2"]
    assert {key: value for key, value in after.items() if "2" not in key} == {
        key: value for key, value in before.items() if "2" not in key
    }


@pytest.mark.filterwarnings("ignore:Already unmerged. Nothing to do.:UserWarning")
def test_a_layer_that_deletes_its_weights_by_itself_says_to_exclude_it(peft):
    """PEFT's LoRA of an attention layer takes the weights off and puts them on again in each call."""
    scaling = apply_norm_scaling(model := Mixed())
    config = peft.LoraConfig(target_modules=["attention"], r=2)
    with scaling.plain():
        peft.get_peft_model(model, config)
    with pytest.raises(AttributeError, match=r"^attribute 'in_proj_weight' is under norm scaling .* or exclude the"):
        model(images())
    scaling = apply_norm_scaling(model := Mixed(), exclude="attention")
    with scaling.plain():
        adapted = peft.get_peft_model(model, config)
    train(adapted, torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad]), images())
    with scaling.plain():
        adapted.merge_and_unload()
    assert len(names(scaling)) == 9


# torch's own tools, and thop


@without_torchs_own_warnings
def test_layers_that_are_quantized_in_place_are_let_go_and_named():
    scaling, optimizer = scaled(model := Mixed())
    with pytest.warns(UserWarning, match="plain: no longer under scaling: ") as caught, scaling.plain():
        torch.ao.quantization.quantize_dynamic(model, {"fc", "rnn"}, inplace=True)
    (text,) = [str(one.message) for one in caught if "plain:" in str(one.message)]
    gone = ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.weight_ih_l0_reverse", "rnn.weight_hh_l0_reverse", "fc"]
    assert all(repr(name) in text for name in gone)
    assert names(scaling) == ["stem.0", "grouped", "attention", "attention.out_proj", "wide.0", "wide.2"]
    assert not any(repr(name) in text for name in names(scaling))
    optimizer.zero_grad()
    with warnings.catch_warnings():
        # Said once: not again by the step.
        warnings.simplefilter("error")
        scaling.step()
        assert {name.partition("/")[2] for name in scaling.metrics()} == set(names(scaling))
        optimizer.step()


@without_torchs_own_warnings
def test_layers_that_are_swapped_around_their_weights_stay_scaled():
    """torch's quantization-aware training, from the preparation to the quantized model."""
    scaling, optimizer = scaled(model := convnet())
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig()
    parameters, scalings = list(model.parameters()), [weight.scaling for weight in scaling.weights]
    with scaling.plain():
        torch.ao.quantization.prepare_qat(model, inplace=True)
    assert isinstance(model[0], torch.ao.nn.qat.Conv2d)
    assert set(map(id, model.parameters())) == set(map(id, parameters))
    assert [weight.scaling for weight in scaling.weights] == scalings
    assert assert_training_holds(scaling, model, optimizer, images()) == ["0", "4"]
    match = r"^plain: no longer under scaling: '0' \(it is not in the model any more\), '4' \("
    with pytest.warns(UserWarning, match=match), scaling.plain():
        torch.ao.quantization.convert(model.eval(), inplace=True)
    assert names(scaling) == []


@pytest.fixture
def thop():
    with warnings.catch_warnings():
        for text in ("distutils Version classes are deprecated", "The distutils package is deprecated"):
            warnings.filterwarnings("ignore", text, DeprecationWarning)
        return importlib.import_module("thop")


def test_thop_counts_the_plain_models_operations(thop):
    """It goes by exact types, and leaves buffers on some modules."""

    def count(model):
        return thop.profile(model, (images(),), verbose=False)

    scaling, optimizer = scaled(model := convnet())
    whole, whole_optimizer = scaled(twin := convnet())
    assert count(copy.deepcopy(model)) != count(convnet()), "the linear layer's operations are not seen"
    for each, own in ((model, optimizer), (twin, whole_optimizer)):
        train(each, own, images())
    with scaling.plain():
        assert count(model) == count(convnet())
    for each, own in ((model, optimizer), (twin, whole_optimizer)):
        train(each, own, images())
    left = {"total_ops", "total_params"}
    own = {key: value for key, value in model.state_dict().items() if key.rpartition(".")[2] not in left}
    assert_equal_tensors(own, twin.state_dict())
    assert scaling.metrics() == whole.metrics()


def test_a_fused_convolution_is_scaled_in_its_place():
    scaling = apply_norm_scaling(model := convnet(), "frobenius")
    model[1].running_var.fill_(0.25)
    target, x = model[0].weight.norm().item(), images()
    expected = output(model, x)
    with scaling.plain():
        model.eval()
        model[0], model[1] = nn.utils.fuse_conv_bn_eval(model[0], model[1]), nn.Identity()
    assert names(scaling) == ["0", "4"]
    torch.testing.assert_close(output(model, x), expected)
    metrics = scaling.metrics()
    assert metrics["norm/0"] == pytest.approx(model[0].weight.norm().item()) == pytest.approx(2 * target, rel=1e-3)
    assert metrics["target/0"] == pytest.approx(target)
    scaling.attach(optimizer := torch.optim.Adam(model.parameters(), lr=1e-2))
    assert_training_holds(scaling, model, optimizer, x)


def assert_let_go(model, scaling, change):
    """The change is made inside, the first layer's weight is let go, and the others stay."""
    match = r"^plain: no longer under scaling: '0' \(it is computed now\); call apply_norm_scaling for layers that"
    with pytest.warns(UserWarning, match=match) as caught, scaling.plain():
        change(model[0])
    assert len(caught) == 1
    assert names(scaling) == ["2", "4"]
    assert {name.partition("/")[2] for name in scaling.metrics()} == {"2", "4"}


def test_a_pruned_weight_is_let_go_and_one_that_is_pruned_for_good_is_not():
    scaling, optimizer = scaled(model := mlp())
    assert_let_go(model, scaling, lambda layer: prune.l1_unstructured(layer, "weight", 0.5))
    assert_training_holds(scaling, model, optimizer, torch.randn(4, 12))
    assert (model[0].weight == 0).float().mean() == 0.5
    with scaling.plain():
        prune.l1_unstructured(model[2], "weight", 0.5)
        prune.remove(model[2], "weight")
        parameter = model[2].weight
    assert names(scaling) == ["2", "4"]
    assert model[2].weight is parameter
    assert scaling.metrics()["norm/2"] == pytest.approx(torch.linalg.matrix_norm(parameter, 2).item(), rel=1e-4)
    assert_training_holds(scaling, model, optimizer, torch.randn(4, 12))


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_weight_that_is_parametrized_inside_is_let_go(kind):
    scaling, optimizer = scaled(model := mlp())
    left = {}

    def change(layer):
        getattr(parametrizations, kind)(layer)
        # To look at its weight is a step of spectral_norm's power iteration.
        left.update({key: value.clone() for key, value in layer.state_dict().items()})

    assert_let_go(model, scaling, change)
    assert_equal_tensors(model[0].state_dict(), left)
    assert_training_holds(scaling, model, optimizer, torch.randn(4, 12))


def test_torchs_vectors_of_parameters_write_behind_their_backs():
    """They go by the order, and give each parameter memory that it had not, which moves no version counter."""
    scaling, optimizer = scaled(model := Mixed(), "frobenius")
    train(model, optimizer, images())
    before = scaling.metrics()
    with scaling.plain():
        twin = Mixed()
        vector = nn.utils.parameters_to_vector(model.parameters())
        nn.utils.vector_to_parameters(vector, twin.parameters())
        nn.utils.vector_to_parameters(vector / 2, model.parameters())
        assert torch.equal(twin.rnn.weight_hh_l0, model.rnn.weight_hh_l0 * 2)
    after = scaling.metrics()
    for name in names(scaling):
        assert after[f"norm/{name}"] == pytest.approx(before[f"norm/{name}"] / 2)
        assert after[f"target/{name}"] == before[f"target/{name}"]
    assert_training_holds(scaling, model, optimizer, images())


def test_a_compiled_model_is_not_compiled_again():
    counter = CompileCounter()
    torch.compiler.reset()
    scaling, optimizer = scaled(model := convnet())
    compiled = torch.compile(model, backend=counter)
    train(compiled, optimizer, images())
    assert (compiled_before := counter.frame_count) >= 1
    for stance in ("default", "fail_on_recompile"):
        with scaling.plain() as plain:
            build_groups(plain, None)
            assert counter.frame_count == compiled_before
            # The plain model is another one to the compiler, and stays that too.
            with torch.compiler.set_stance(stance):
                compiled(images())
            compiled_before = counter.frame_count
        with torch.compiler.set_stance("fail_on_recompile"):
            train(compiled, optimizer, images())
    assert counter.frame_count == compiled_before
    assert_training_holds(scaling, model, optimizer, images())


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_under_ddp_the_parameters_stay_the_same_objects(one_rank, tmp_path):
    ends = []
    for use in (None, save_whole):
        torch.manual_seed(0)
        scaling, optimizer = scaled(model := Mixed())
        parallel = DistributedDataParallel(model)
        train(parallel, optimizer, images())
        before = list(model.parameters())
        if use is not None:
            with scaling.plain():
                use(model, tmp_path)
        assert all(one is other for one, other in zip(model.parameters(), before, strict=True))
        train(parallel, optimizer, images())
        ends.append(model.state_dict())
    assert_equal_tensors(*ends)
