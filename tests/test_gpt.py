"""The small GPT by its options and by its real command."""

import json
import sys

import pytest
from test_recipe import ROOT, run

from gpt import Options, main, table_of


@pytest.mark.parametrize("how", ["called", pytest.param("command", marks=pytest.mark.slow)])
def test_attention_stays_on_its_norms_the_mlps_on_half_of_theirs_and_the_head_alone(how, tmp_path, capsys):
    out = tmp_path / "out"
    if how == "called":
        main(Options(steps=4, num_blocks=1, width=32, num_tokens=16, out=out))
        said = capsys.readouterr().out
    else:
        small = ["--steps", "4", "--num-blocks", "1", "--width", "32", "--num-tokens", "16", "--num-threads", "1"]
        code, said = run([sys.executable, str(ROOT / "recipes" / "gpt.py"), *small, "--out", "out"], tmp_path)
        assert code == 0, said
    assert {path.name for path in out.iterdir()} == {"gpt.json", "gpt.md", "gpt.png"}
    record = json.loads((out / "gpt.json").read_text())
    assert (out / "gpt.md").read_text() == table_of(record)
    assert (out / "gpt.md").read_text() in said
    layers = record["layers"]
    assert list(layers) == [f"blocks.0.{kind}" for kind in ("qkv", "projection", "mlp.0", "mlp.2")]
    for name, layer in layers.items():
        factor = 0.5 if ".mlp." in name else 1
        assert layer["target"] == pytest.approx(factor * layer["initial norm"], rel=1e-6)
        assert layer["norm"] == pytest.approx(layer["target"], rel=1e-6)
        assert len(layer["drift"]) == 4
        # The optimizer moves the norms, from the targets on.
        assert 1e-5 < max(abs(one - 1) for one in layer["drift"]) < 0.1
    assert record["test bits per byte"] < record["train bits per byte"][0] + 0.5


def test_an_unknown_norm_is_refused():
    with pytest.raises(SystemExit, match="gpt: unknown norm 'none'; choose frobenius, "):
        main(Options(norm="none"))
