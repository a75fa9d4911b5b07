"""The critic on points in the plane by its options and by its real command."""

import json
import sys

import pytest
from test_recipe import ROOT, run

from gan import CONDITIONS, LIMIT, Options, main, table_of


@pytest.mark.parametrize("how", ["called", pytest.param("command", marks=pytest.mark.slow)])
def test_every_constraint_holds_the_critic_and_torchs_does_not(how, tmp_path, capsys):
    out = tmp_path / "out"
    if how == "called":
        main(Options(widths=(40,), steps=12, lr=1e-2, batch_size=16, out=out))
        said = capsys.readouterr().out
    else:
        command = [sys.executable, str(ROOT / "recipes" / "gan.py"), "--widths", "40", "--steps", "12", "--lr", "1e-2"]
        code, said = run([*command, "--batch-size", "16", "--num-threads", "1", "--out", "out"], tmp_path)
        assert code == 0, said
    assert {path.name for path in out.iterdir()} == {"gan.json", "gan.md", "gan.png"}
    record = json.loads((out / "gan.json").read_text())
    assert (out / "gan.md").read_text() == table_of(record["critics"])
    assert (out / "gan.md").read_text() in said
    rows = {row["critic"]: row for row in record["critics"]}
    assert list(rows) == list(CONDITIONS)
    for name, row in rows.items():
        largest = record["largest norm by step"]["40"][name]
        assert len(largest) == 12
        assert row["looks"] == 4 * 12
        assert row["worst norm"] == pytest.approx(max(largest), rel=1e-6)
        assert (row[f"above {LIMIT}"] > 0) == (max(largest) > LIMIT)
        assert row["ms / step"] > 0
    assert rows["none"]["ratio to none"] == 1
    assert rows["torch spectral_norm"]["worst norm"] > 1.01
    for name, limit in [("clipped", 1 + 1e-5), ("cap, exact", 1 + 1e-5), ("cap", LIMIT), ("normalize", LIMIT)]:
        assert rows[name]["worst norm"] < limit


def test_options_that_cannot_work_are_refused():
    with pytest.raises(SystemExit, match=r"gan: --steps and --widths must be at least 1, found 0 and \(256, 1024\)"):
        main(Options(steps=0))
