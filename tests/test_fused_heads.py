"""Fused projections of timm that lay the heads outermost: their matrices are what the attention uses as q, k and v."""

import copy

import pytest
import torch
from held import off_target
from timm.layers.attention2d import Attention2d
from timm.layers.halo_attn import HaloAttn
from timm.models import cpubone, efficientformer, efficientvit_mit, levit, lowformer, maxxvit, tiny_vit
from torch import nn
from torch.linalg import svdvals
from torch.overrides import TorchFunctionMode

from specscale import LayerRule, MatrixView, apply_norm_scaling
from specscale.weights import find_weights

TOKENS, IMAGE = (2, 16, 24), (2, 24, 4, 4)
LAYERS = {
    "tiny_vit": (lambda: tiny_vit.Attention(24, 8, 3, attn_ratio=1, resolution=(4, 4)), TOKENS, 3),
    "tiny_vit, 2 heads": (lambda: tiny_vit.Attention(24, 10, 2, attn_ratio=1, resolution=(4, 4)), TOKENS, 3),
    "maxxvit": (lambda: maxxvit.AttentionCl(24, dim_head=8), TOKENS, 3),
    "maxxvit 2d": (lambda: maxxvit.Attention2d(24, dim_head=6), IMAGE, 3),
    "attention2d": (lambda: Attention2d(24, num_heads=3, head_first=True), IMAGE, 3),
    "lowformer": (lambda: lowformer.ConvAttention(120, att_stride=1, att_kernel=3), (2, 120, 4, 4), 3),
    "cpubone": (lambda: cpubone.ConvAttention(120, head_dim_mul=0.5, att_stride=1), (2, 120, 4, 4), 3),
    "efficientvit": (lambda: efficientvit_mit.LiteMLA(24, 24, heads=3, dim=8, scales=()), IMAGE, 3),
    "efficientformer": (lambda: efficientformer.Attention(24, 8, 3, attn_ratio=1, resolution=4), TOKENS, 3),
    "levit": (lambda: levit.Attention(24, 8, 3, attn_ratio=1, resolution=(4, 4)), TOKENS, 3),
    "levit 2d": (lambda: levit.Attention(24, 8, 3, attn_ratio=1, resolution=(4, 4), use_conv=True), IMAGE, 3),
    "levit down": (lambda: levit.AttentionDownsample(24, 24, 8, 3, attn_ratio=1, resolution=4), TOKENS, 2),
    "halo": (lambda: HaloAttn(24, num_heads=3, block_size=2, halo_size=1), IMAGE, 2),
}


class Parts(TorchFunctionMode):
    """What the forward pass splits into parts."""

    def __init__(self):
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.__name__ in ("split", "chunk"):
            self.found.append(out)
        return out


def fused(model):
    """The fused projection's weight: the first one that is several matrices by heads."""
    return next(weight for weight in find_weights(model) if "o1" in weight.view.axes)


def farthest(values, among):
    """How far the one of `values` that is farthest from any of `among` is from it."""
    among = among.flatten().sort().values
    at = torch.searchsorted(among, values.flatten().contiguous()).clamp(1, len(among) - 1)
    return torch.minimum((among[at] - values.flatten()).abs(), (among[at - 1] - values.flatten()).abs()).max().item()


@pytest.mark.parametrize(("make", "shape", "count"), LAYERS.values(), ids=LAYERS)
def test_the_matrices_are_what_the_attention_uses(make, shape, count):
    torch.manual_seed(0)
    model = make()
    # Not all of them return themselves.
    model.eval()
    weight = fused(model)
    assert weight.view.count == count
    assert weight.tensor == "weight"
    inputs = []
    handle = weight.module.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    if weight.module.bias is not None:
        nn.init.zeros_(weight.module.bias)
    with Parts() as parts, torch.no_grad():
        model(torch.randn(shape))
    handle.remove()
    (used,) = (own for own in parts.found if len(own) == count)
    # As values only, since each layer has its own order of batch, heads and positions. Those of other rows are others.
    tokens = inputs[0].movedim(1, -1).flatten(0, -2) if inputs[0].ndim == 4 else inputs[0].flatten(0, -2)
    for matrix, own in zip(weight.view.matrices(weight.parameter.detach()), used, strict=True):
        expected = tokens @ matrix.T
        assert farthest(expected, own) < 1e-4
        # Halo attention pads its images.
        assert farthest(own[own != 0], expected) < 1e-4
        assert not any(farthest(tokens @ other.T, own) < 1e-2 for other in weight.view.matrices(-weight.parameter))


@pytest.mark.parametrize(
    ("make", "name", "shape"),
    [
        # Values of another size than keys.
        (lambda: tiny_vit.Attention(24, 8, 3, attn_ratio=2, resolution=(4, 4)), "qkv", (96, 24)),
        # As many rows as three times the columns, and yet no three matrices of equal size.
        (lambda: tiny_vit.Attention(32, 8, 3, attn_ratio=2, resolution=(4, 4)), "qkv", (96, 32)),
        (lambda: levit.Attention(24, 8, 3, resolution=(4, 4)), "qkv.linear", (144, 24)),
        (lambda: HaloAttn(24, num_heads=3, dim_head=16, block_size=2, halo_size=1), "kv", (72, 24)),
        # Heads innermost, as in a layer of any name.
        (lambda: maxxvit.Attention2d(24, dim_head=6, head_first=False), "qkv", (72, 24)),
    ],
)
def test_projections_of_unequal_sizes_are_read_as_one_matrix(make, name, shape):
    weight = next(one for one in find_weights(make()) if one.layer == name)
    assert (weight.view.count, weight.view.matrix_shape(weight.parameter)) == (1, shape)


def test_tiny_vit_and_maxvit_are_read_so():
    import timm

    for name, num_fused in (("tiny_vit_5m_224", 10), ("maxvit_rmlp_pico_rw_256", 22)):
        with torch.device("meta"):
            model = timm.create_model(name)
        weights = [weight for weight in find_weights(model) if weight.layer.endswith("qkv")]
        assert len(weights) == num_fused
        for weight in weights:
            m, n = weight.view.matrix_shape(weight.parameter)
            assert (weight.view.axes, weight.view.count, m) == ("(o1 k o2) i", 3, n)


class Attentions(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = tiny_vit.Attention(48, 12, 4, attn_ratio=1, resolution=(4, 4))
        self.image = maxxvit.Attention2d(48, dim_head=12)

    def forward(self, x):
        x = self.image(x) + x
        return self.tokens(x.flatten(2).mT)


def attentions(memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    return Attentions().to(memory_format=memory_format)


def train(model, scaling, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaling.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 48, 4, 4)).square().mean().backward()
        optimizer.step()
        yield


@pytest.mark.parametrize("on", ["cpu", "accelerator"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("norm", ["frobenius", "spectral", "clipped"])
def test_every_norm_is_held_on_every_matrix(norm, memory_format, on, monkeypatch):
    if on == "accelerator":
        monkeypatch.setattr("specscale.linalg.can_sync", lambda tensor: False)
    model = attentions(memory_format)
    scaling = apply_norm_scaling(model, norm, init="orthogonal")
    assert {weight.name: weight.view.count for weight in scaling.weights} == {
        "tokens.qkv": 3,
        "tokens.proj": 1,
        "image.qkv": 3,
        "image.proj": 1,
    }
    tolerance = 1e-3 if norm == "spectral" else 1e-5
    for _ in train(model, scaling, 5):
        assert max(map(off_target, scaling.weights)) < tolerance
        for attention in (model.tokens, model.image):
            qkv = (
                attention.qkv.weight.detach().double().flatten(1).unflatten(0, (4, 3, 12)).transpose(0, 1).flatten(1, 2)
            )
            values = torch.linalg.vector_norm(qkv, dim=(1, 2))[:, None] if norm == "frobenius" else svdvals(qkv)
            target = attention.qkv.parametrizations.weight[0].target[:, None]
            assert ((values / target - 1).abs().min(dim=1).values < tolerance).all()


def test_a_checkpoint_of_heads_goes_on_bit_for_bit():
    model = attentions()
    scaling = apply_norm_scaling(model, target=0.7)
    for _ in train(model, scaling, 2):
        pass
    other = attentions()
    resumed = apply_norm_scaling(other)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    plain = attentions()
    plain.load_state_dict(scaling.plain_state_dict())
    assert torch.equal(plain.tokens.qkv.weight, model.tokens.qkv.weight)
    for handle in (scaling, resumed):
        handle.step()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    with resumed.plain():
        other.tokens.qkv = nn.Linear(48, 144)
    assert next(weight for weight in resumed.weights if weight.layer == "tokens.qkv").view.count == 3


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 16)
        self.out = nn.Linear(16, 4)


def counts(model, rules):
    return {weight.name: weight.view.count for weight in find_weights(model, rules)}


def test_a_rule_names_tensors_of_layers_within_by_their_paths():
    model = nn.Sequential(Own(), Own())
    pairs = LayerRule(Own, {"mix.weight": MatrixView("(k o) i", 2)})
    assert counts(model, [pairs]) == {"0.mix": 2, "0.out": 1, "1.mix": 2, "1.out": 1}
    # Of two rules for one tensor, the first counts, whichever layer it is for.
    rows = LayerRule(nn.Linear, lambda layer: {"weight": MatrixView("(k o) i", layer.out_features)})
    assert counts(model, [rows, pairs]) == {"0.mix": 16, "0.out": 4, "1.mix": 16, "1.out": 4}
    assert counts(model, [pairs, rows]) == {"0.mix": 2, "0.out": 4, "1.mix": 2, "1.out": 4}
    whole = LayerRule(nn.Sequential, {"0.mix.weight": MatrixView("(k o) i", 4)})
    assert counts(model, [whole, pairs])["0.mix"] == 4
    assert counts(model, [pairs, whole])["0.mix"] == 2
    none = LayerRule(lambda name, module: name == "1.mix", {})
    assert counts(model, [none, pairs]) == {"0.mix": 2, "0.out": 1, "1.out": 1}


@pytest.mark.parametrize("path", ["mixer.weight", "mix.kernel", "mix.weight.data"])
def test_a_path_to_nothing_is_refused(path):
    rule = LayerRule(Own, {path: MatrixView("o i")})
    with pytest.raises(ValueError, match=rf"the rule for Own names '{path}', which '0' .*are 'mix.weight', 'mix.bias'"):
        apply_norm_scaling(nn.Sequential(Own()), rules=rule)


def test_a_layer_may_be_called_like_a_method():
    model = nn.Module()
    model.half, model.float = nn.Sequential(Own()), nn.Linear(3, 2)
    rule = LayerRule(nn.Sequential, {"0.mix.weight": MatrixView("(k o) i", 4)})
    assert counts(model, [rule]) == {"half.0.mix": 4, "half.0.out": 1, "float": 1}
