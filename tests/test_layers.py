"""Rules: the caller's own layers, and those of transformers that are none of torch's."""

import pytest
import torch
import transformers
from torch import nn

from specscale import LayerRule, MatrixView, apply_norm_scaling, orthogonal_init_, spectral_norms


class Dense(nn.Module):
    """A layer that keeps its weight transposed, under a name of its own."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(d_in, d_out))

    def forward(self, x):
        return x @ self.kernel


def norms(model, **options):
    scaling = apply_norm_scaling(model, **options)
    model.zero_grad()
    scaling.step()
    return {weight.name: weight.scaling.view.matrix_shape(weight.parameter) for weight in scaling.weights}


def test_a_rule_of_three_lines_scales_a_layer_of_ones_own():
    model = nn.Sequential(Dense(8, 6), nn.Linear(6, 3))
    rule = LayerRule(Dense, {"kernel": MatrixView("i o")})
    exact = torch.linalg.matrix_norm(model[0].kernel.detach(), 2).item()
    assert spectral_norms(model, rules=rule)["0"] == pytest.approx(exact, rel=1e-5)
    assert norms(model, rules=rule, init="orthogonal", target=0.5) == {"0": (6, 8), "1": (3, 6)}
    values = torch.linalg.svdvals(model[0].kernel.detach())
    torch.testing.assert_close(values, torch.tensor([(6 / 8) ** 0.5] * 5 + [0.5]))


def test_the_first_rule_that_matches_wins():
    def is_head(name, module):
        return name == "1"

    assert norms(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)), rules=[LayerRule(is_head, {})]) == {"0": (6, 8)}
    two = LayerRule(is_head, lambda module: {"weight": MatrixView("(k o) i", module.out_features // 2)})
    assert norms(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), rules=[two]) == {"0": (6, 8), "1": (2, 6)}


def test_stacked_matrices_are_initialised_and_held_one_by_one():
    model = nn.Module()
    model.kernel = nn.Parameter(torch.zeros(5, 4, 6))
    rule = LayerRule(nn.Module, {"kernel": MatrixView("k i o", 5)})
    orthogonal_init_(model, rules=[rule])
    values = torch.linalg.svdvals(model.kernel.detach())
    torch.testing.assert_close(values, torch.full((5, 4), (6 / 4) ** 0.5))


@pytest.mark.parametrize(
    ("rules", "error", "text"),
    [
        (
            [LayerRule(Dense, {"kernal": MatrixView("i o")})],  # codespell:ignore
            ValueError,
            "names 'kernal', which '0' .*; its .* 'kernel'",  # codespell:ignore
        ),
        (
            [LayerRule(Dense, {"kernel": MatrixView("k i o")})],
            ValueError,
            r"'kernel' of '0' as .*shape \(8, 6\) does not",
        ),
        ([LayerRule(nn.Bilinear, {})], ValueError, "the rule for Bilinear matches no layer of Sequential"),
        ([Dense], TypeError, "rules takes LayerRule objects, found type"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(rules, error, text):
    with pytest.raises(error, match=f"apply_norm_scaling: .*{text}"):
        apply_norm_scaling(nn.Sequential(Dense(8, 6)), rules=rules)


@pytest.mark.parametrize(
    ("layer", "weights", "text"),
    [
        ("Dense", {}, r"layer must be a type of layer, or a predicate \(name, module\) -> bool, found str"),
        ((Dense, nn.Linear), {}, "layer must be a type of layer.*, found tuple"),
        (Dense, {"kernel": "i o"}, "weights must map tensors' names to MatrixView objects, found {'kernel': 'i o'}"),
        (Dense, None, "weights must map"),
    ],
)
def test_what_is_no_rule_is_refused(layer, weights, text):
    with pytest.raises(TypeError, match=f"LayerRule: {text}"):
        LayerRule(layer, weights)


def test_fused_projections_are_matrices_of_their_own():
    model = nn.ModuleDict({"qkv": nn.Linear(8, 24), "to_kv": nn.Linear(8, 16), "skv": nn.Linear(8, 20)})
    # Two heads' queries, one's keys and values.
    model["grouped_qkv"] = nn.Linear(8, 16)
    assert norms(model) == {"qkv": (8, 8), "to_kv": (8, 8), "skv": (20, 8), "grouped_qkv": (16, 8)}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: nn.LSTM(6, 8, num_layers=2, bidirectional=True, proj_size=5),
            {
                f"weight_{kind}_l{layer}{way}"
                for kind in ("ih", "hh", "hr")
                for layer in (0, 1)
                for way in ("", "_reverse")
            },
        ),
        (lambda: nn.GRU(6, 8), {"weight_ih_l0", "weight_hh_l0"}),
        (lambda: nn.RNN(6, 8), {"weight_ih_l0", "weight_hh_l0"}),
        (lambda: nn.LSTMCell(6, 8), {"weight_ih", "weight_hh"}),
    ],
    ids=["LSTM", "GRU", "RNN", "LSTMCell"],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_each_gate_of_a_recurrent_layer_is_held_and_the_layer_sees_it(make, expected):
    torch.manual_seed(0)
    model, x = make(), torch.randn(3, 6)
    scaling = apply_norm_scaling(model, init="orthogonal")
    assert {weight.name for weight in scaling.weights} == expected
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaling.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(x)[0].square().sum().backward()
        optimizer.step()
        for weight in scaling.weights:
            gates = weight.parameter.detach().unflatten(0, (weight.scaling.view.count, -1))
            values = torch.linalg.svdvals(gates)
            assert ((values / weight.scaling.target[:, None] - 1).abs().amin(-1) < 1e-4).all()
            assert values.shape[0] == (1 if "hr" in weight.name else len(weight.parameter) // 8)
    trained = model(x)[0]
    (plain := make()).load_state_dict(scaling.plain_state_dict())
    torch.testing.assert_close(plain(x)[0], trained)
    torch.testing.assert_close(scaling.remove().double()(x.double())[0].float(), trained)


def test_the_transposed_layers_of_gpt2():
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    assert norms(model) == {
        "transformer.h.0.attn.c_attn": (32, 32),
        "transformer.h.0.attn.c_proj": (32, 32),
        "transformer.h.0.mlp.c_fc": (128, 32),
        "transformer.h.0.mlp.c_proj": (32, 128),
        "lm_head": (50, 32),
    }
    first = model.transformer.h[0].attn.c_attn
    scaling = first.parametrizations.weight[0]
    for index, target in enumerate(scaling.target):
        matrix = first.weight.detach()[:, 32 * index : 32 * (index + 1)]
        assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(target.item(), rel=1e-4)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_a_mixtures_experts_are_matrices_of_their_own(family):
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        vocab_size=50,
        pad_token_id=0,
    )
    model = getattr(transformers, f"{family}Model")(config)
    found = norms(model, include="*experts*", init="orthogonal")
    assert found == {"layers.0.mlp.experts.gate_up_proj": (96, 32), "layers.0.mlp.experts.down_proj": (32, 48)}
    experts = model.layers[0].mlp.experts
    values = torch.linalg.svdvals(experts.down_proj.detach())
    torch.testing.assert_close(values, torch.full((4, 32), (32 / 48) ** 0.5), rtol=1e-4, atol=0)
    tokens = torch.randint(50, (2, 8))
    assert model(tokens).last_hidden_state.isfinite().all()
