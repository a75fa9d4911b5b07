"""Many families of models under scaling: a sample here, every architecture by the recipe (slow)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import transformers
from test_recipe import ROOT
from torch import nn

import zoo
from lib.files import read_json_lines
from lib.provenance import commit
from specscale import NormScaler, apply_norm_scaling

TRAINED = [
    "test_byobnet",
    "test_convnext",
    "test_resnet",
    "test_vit",
]
BUILT = [
    "starnet_s050",
    "test_coatnet",
    "test_efficientnet",
    "test_mambaout",
    "test_nfnet",
]
# Trained by the slow tests alone.
TRAINED_TOO = ["test_efficientnet", "test_mambaout", "test_nfnet"]
# Of these, each takes seconds.
TRAINED_SLOWLY = ["efficientvit_m0", "ghostnet_050", "mobilenetv3_small_050"]
BUILT_SLOWLY = [
    "dla46x_c",
    "test_vit_relpos",
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "edgenext_xx_small",
    "efficientvit_b0",
    "ese_vovnet19b_slim_dw",
    "iformer_t",
    "lcnetv2_small",
    "pvt_v2_b0",
    "repghostnet_050",
]
SMALL = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 2}
TRANSFORMERS = {
    "bert": transformers.BertConfig(**SMALL, vocab_size=50),
    "gpt2": transformers.GPT2Config(n_embd=48, n_layer=1, n_head=2, vocab_size=50),
    "llama": transformers.LlamaConfig(**SMALL, vocab_size=50),
    "mixtral": transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3, vocab_size=50),
    "t5": transformers.T5Config(d_model=48, d_ff=80, d_kv=24, num_layers=1, num_heads=2, vocab_size=50),
    "vit": transformers.ViTConfig(**SMALL, image_size=32),
}


def slow(names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", [*TRAINED, *BUILT, *slow(TRAINED_SLOWLY + BUILT_SLOWLY)])
def test_families_of_timm(name):
    assert zoo.check(timm.create_model(name))["weights"] > 10


@pytest.mark.parametrize("config", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_families_of_transformers(config):
    assert zoo.check(transformers.AutoModel.from_config(config))["weights"] >= 4


@pytest.mark.parametrize("name", [*TRAINED, *slow(TRAINED_TOO + TRAINED_SLOWLY)])
def test_families_train(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    scaling = apply_norm_scaling(model, "spectral")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    scaling.attach(optimizer)
    size = model.default_cfg["input_size"]
    nn.functional.cross_entropy(model(torch.randn(2, *size)), torch.tensor([0, 1])).backward()
    optimizer.step()
    for _, target, norm in zoo.norms_of(NormScaler.of(model), zoo.exact_norms):
        # The second singular value may lie above the target after a step.
        assert (norm >= (1 - 1e-4) * target).all()
        assert (norm <= 1.3 * target).all()


def test_what_is_off_target_is_named():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    scaling = apply_norm_scaling(model)
    with torch.no_grad():
        model[1].weight.mul_(1.1)
    with pytest.raises(zoo.Mismatch, match=r"spectral step: 1 is 1.0e-01 from its target"):
        zoo.worst_error("spectral step", zoo.norms_of(scaling, zoo.exact_norms), 1e-3)


def test_the_sweep_goes_on_where_it_stopped_and_says_what_failed(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("no such weights")

    def lazy():
        return nn.LazyLinear(3)

    built = []

    def small():
        built.append("small")
        normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))
        return nn.Sequential(nn.Linear(80, 90), nn.Conv2d(3, 4, 3), normed)

    builders = {"small": small, "broken": broken, "lazy": lazy, "large": lambda: nn.Linear(2000, 2000)}
    monkeypatch.setitem(zoo.REGISTRIES, "timm", lambda: builders)
    options = zoo.Options(registries=("timm",), max_params=1e5, meta_above=3e6, out=tmp_path)
    zoo.main(options)
    lines = {line["name"]: line for line in map(json.loads, (tmp_path / "zoo.jsonl").read_text().splitlines())}
    assert lines["small"]["weights"] == 2
    assert lines["small"]["spectral step error"] < 1e-3
    assert lines["small"]["commit"] == commit()
    assert lines["broken"]["not built"] == "RuntimeError: no such weights"
    assert lines["lazy"]["failed"].startswith("ValueError")
    assert (lines["large"]["on meta"], lines["large"]["weights"]) == (True, 1)
    count = len(built)
    zoo.main(options)
    assert len(built) == count
    table = (tmp_path / "zoo.md").read_text()
    assert "| timm | 2 | 4 | 1 | 1 | 1 | 1 | 3 | 3 |" in table
    assert "Not built:\n\n- timm, `broken`: RuntimeError: no such weights" in table
    assert "Passed without layers whose weights are computed:\n\n- timm, `small`: ParametrizedLinear" in table


@pytest.mark.slow
def test_every_architecture():
    """Hours; the report in runs/zoo, or $SPECSCALE_ZOO, is gone on with."""
    out = Path(os.environ.get("SPECSCALE_ZOO", ROOT / "runs" / "zoo"))
    subprocess.run([sys.executable, ROOT / "recipes" / "zoo.py", "--out", out], check=True)
    lines = {(line["registry"], line["name"]): line for line in read_json_lines(out / "zoo.jsonl")}
    assert len(lines) > 2000
    assert not [line for line in lines.values() if "failed" in line]
