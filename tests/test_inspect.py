"""The command that shows the norms in a checkpoint file or of a timm model."""

import argparse
import copy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

from specscale import apply_norm_scaling, measure
from specscale.__main__ import main
from specscale.inspection import inspect
from specscale.pictures import figure_of

ERRORS = " ".join((Path(__file__).parent.parent / "docs" / "errors_files.md").read_text().split())


class Net(nn.Module):
    """Weights in every way that layers hold matrices, and a parameter that is no weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.up = nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 8, 3, groups=2)
        self.wide_up, self.attention = nn.ConvTranspose1d(7, 5, 3), nn.MultiheadAttention(8, 2)
        self.rnn, self.norm, self.head = nn.LSTM(8, 8), nn.BatchNorm1d(8), nn.Linear(40, 50)
        self.table, self.pos_embed = nn.Embedding(11, 8), nn.Parameter(torch.randn(1, 3, 8))


def moved(net):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1 + 0.02 * torch.rand(parameter.shape))
    return net


def norms_of(found):
    return {one.name.removesuffix(".weight"): one for one in found.norms.weights}


def assert_same(found, model):
    """What is found is what `measure` says of the model, and of its scaled weights all of it."""
    expected = {one.name: one for one in measure(model).weights}
    for name, one in norms_of(found).items():
        own = expected.get(name) or expected.get(name.rpartition(".")[0])
        if own is not None and (own.target is not None or own.count == 1):
            assert (one.target, one.constraint, one.count) == (own.target, own.constraint, own.count), name
            assert one.frobenius == pytest.approx(own.frobenius, rel=1e-5), name
            # Frobenius norms do not tell which axis of a transposed convolution is which.
            if own.constraint != "frobenius" or "up" not in name:
                assert (one.spectral, one.stable_rank) == pytest.approx((own.spectral, own.stable_rank), rel=1e-5), name


@pytest.mark.parametrize("ending", [".pt", ".pth.tar", ".safetensors"])
@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_a_scaled_file_is_read_as_the_matrices_that_are_scaled(norm, ending, tmp_path):
    scaling = apply_norm_scaling(net := Net(), norm)
    moved(net)
    scaling.step()
    path = tmp_path / f"in{ending}"
    if ending == ".safetensors":
        save_file(net.state_dict(), path)
    else:
        torch.save(net.state_dict(), path, _use_new_zipfile_serialization=ending == ".pt")
    (found,) = inspect(str(path))
    assert found.title == str(path)
    names = [weight.name for weight in scaling.weights]
    read = [name.removesuffix(".in_proj_weight") for name in norms_of(found)]
    # Of a format that sorts by name, the order is its own.
    assert (sorted(read) if ending == ".safetensors" else read) == (
        sorted([*names, "table"]) if ending == ".safetensors" else [*names, "table"]
    )
    assert_same(found, net)
    assert norms_of(found)["table"].shape == (11, 8)


def test_a_file_has_several_state_dicts_and_an_optimizer(tmp_path, capsys):
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    scaling = apply_norm_scaling(net, "spectral", target=2.0).attach(optimizer)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    average = moved(copy.deepcopy(net))
    # An average of parameters alone has no targets.
    parameters = {name: value for name, value in average.state_dict().items() if ".0." not in name}
    content = {"args": argparse.Namespace(lr=0.1), "model": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content | {"ema": [average.state_dict(), parameters]}, path := tmp_path / "last.pth")
    found = inspect(str(path))
    assert [one.title for one in found] == ["model", "ema[0]", "ema[1]"]
    assert_same(found[0], net)
    assert_same(found[1], average)
    assert {one.target for one in found[2].norms.weights} == {None}
    assert norms_of(found[2])["head"].spectral == norms_of(found[1])["head"].spectral
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"model: {len(found[0].norms.weights)} weights\nlayer " in printed
    assert printed.count("one matrix, its first axis by the others, unless it is scaled\n") == 2
    assert printed.count("Not read, by their names: 1 tensor of two axes or more (pos_embed)") == 3
    scaling.detach()


def test_a_file_of_version_0_1_0_has_targets(tmp_path):
    for norm, order in (("frobenius", 2), ("spectral", 0)):
        scaling = apply_norm_scaling(net := Net(), norm, target=0.5)
        scaling.step()
        old = {name.replace(f"target_{norm}", "target"): value for name, value in net.state_dict().items()}
        homes = [name.removesuffix("target") for name in old if name.endswith(".target")]
        old |= {f"{home}order": torch.tensor(order) for home in homes}
        torch.save(old, tmp_path / "in.pt")
        (found,) = inspect(str(tmp_path / "in.pt"))
        assert len(homes) == len(scaling.weights)
        assert_same(found, net)


def test_what_a_weight_is_computed_from_is_not_read(tmp_path):
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    parametrizations.spectral_norm(net[0])
    parametrizations.weight_norm(net[1])
    prune.l1_unstructured(net[2], "weight", 0.5)
    torch.save({"net": net.state_dict()}, tmp_path / "in.pt")
    (found,) = inspect(str(tmp_path / "in.pt"))
    assert list(norms_of(found)) == ["3"]
    assert "5 tensors of two axes or more (" in found.note


def test_a_timm_model_is_built_without_the_network(monkeypatch, capsys):
    made = []
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: made.append(options) or create(*args, **options))
    assert main(["inspect", "test_resnet.r160_in1k"]) == 0
    assert made == [{"pretrained": False}]
    printed = capsys.readouterr().out.splitlines()
    model = create("test_resnet")
    assert printed[0] == f"test_resnet.r160_in1k, not trained: {len(measure(model).weights)} weights"
    assert [line.split()[0] for line in printed[2:]] == list(measure(model).as_dict())
    assert [line.split()[2] for line in printed[2:4]] == ["16x27", "16x144"]


def test_no_code_runs_and_start_is_quick(tmp_path):
    torch.save({"model": Net().state_dict()}, tmp_path / "in.pt")
    code = f"import sys; from specscale.__main__ import main; main(['inspect', {str(tmp_path / 'in.pt')!r}]); "
    code += "assert not {'timm', 'matplotlib', 'safetensors'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "head" in done.stdout


class Trap:
    ran = 0

    def __init__(self):
        self.option = 1

    def __setstate__(self, state):
        Trap.ran += 1


def refusal(capsys, *arguments):
    assert main(["inspect", *map(str, arguments)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.strip().removeprefix("python -m specscale inspect: error: ")


def test_code_in_a_file_runs_only_if_it_is_trusted(tmp_path, capsys):
    torch.save({"trap": Trap(), "model": Net().state_dict()}, path := tmp_path / "in.pt")
    Trap.ran = 0
    assert "holds test_inspect.Trap, which only Python's pickle can load" in refusal(capsys, path)
    assert Trap.ran == 0
    assert main(["inspect", str(path), "--trust-pickle"]) == 0
    assert Trap.ran == 1
    assert "head" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["missing.pt"], "there is no file 'missing.pt'"),
        (
            ["resnet5O"],
            "'resnet5O' is neither a file nor a model of timm; the nearest names are 'resnet50'",
        ),
        (["hf-hub:timm/resnet50"], "'hf-hub:timm/resnet50' is neither a file nor a model of timm"),
        (
            ["empty.pt"],
            "'empty.pt' holds no state dict with a weight: a floating-point tensor of two axes or more whose name ends "
            "in weight or kernel",
        ),
        (["empty.pt", "--pretrained"], "--pretrained is for names of timm models, and 'empty.pt' is a file"),
        (["good.pt", "--plot", "no/out.png"], "there is no folder '"),
        (["good.pt", "--plot", "out.pn"], "'out.pn' cannot be written: ValueError: Format 'pn' is not supported"),
    ],
)
def test_the_command_says_in_one_line_why_it_cannot(arguments, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state": {"weight": torch.ones(3), "pos_embed": torch.ones(3, 3)}}, "empty.pt")
    torch.save(nn.Linear(3, 2).state_dict(), "good.pt")
    found = refusal(capsys, *arguments)
    assert found.startswith(text)
    if "nearest" not in found and "folder" not in found and "written" not in found:
        assert f"python -m specscale inspect: error: {found}" in ERRORS


@pytest.mark.parametrize(
    ("missing", "arguments", "text"),
    [
        ("timm", ["resnet50"], "there is no file 'resnet50', and for the name of a model timm is needed: pip install"),
        (
            "matplotlib.figure",
            ["in.pt", "--plot", "o.png"],
            "--plot needs the package matplotlib: pip install matplotlib",
        ),
    ],
)
def test_a_package_that_is_missing_is_named(missing, arguments, text, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    assert refusal(capsys, *arguments).startswith(text)


def test_a_download_that_fails_is_said(capsys, monkeypatch):
    def fail(name, pretrained):
        assert pretrained
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(timm, "create_model", fail)
    assert refusal(capsys, "resnet18", "--pretrained") == "timm cannot make 'resnet18': OSError: no route to host"


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_the_picture_shows_norms_targets_and_ranks(norm, tmp_path):
    scaling = apply_norm_scaling(net := Net(), norm, target=0.5, include=["conv", "head"])
    scaling.step()
    net.wide_up.weight.data[0, 0, 0] = float("nan")
    torch.save({"a": net.state_dict(), "b": moved(net).state_dict()}, path := tmp_path / "in.pt")
    found = inspect(str(path))
    figure = figure_of(found)
    lines = {axis.get_ylabel(): axis.get_lines() for axis in figure.axes}
    held = {"frobenius": "Frobenius norm", "spectral": "spectral norm"}[norm]
    assert list(lines) == list(dict.fromkeys(["spectral norm", held, "stable rank"]))
    names = [one.name for one in found[0].norms.weights]
    for one, line in zip(found, lines["spectral norm"], strict=False):
        shown = [each for each in one.norms.weights if each.name != "wide_up"]
        assert list(line.get_xdata()) == [names.index(each.name) for each in shown]
        assert list(line.get_ydata()) == [each.spectral for each in shown]
    targets = lines[held][-1]
    assert list(targets.get_ydata()) == [0.5] * 4
    assert {names[number] for number in targets.get_xdata()} == {"conv", "head"}
    assert len(lines["spectral norm"]) == (3 if norm == "spectral" else 2)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "target", "full rank"]
    assert main(["inspect", str(path), "--plot", str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("norm", ["rows", "columns"])
def test_what_is_held_in_parts_is_read_whole_beside_the_largest_target(norm, tmp_path):
    model = nn.Sequential(nn.Linear(12, 12), nn.Conv2d(4, 6, 3))
    apply_norm_scaling(model, norm)
    torch.save(model.state_dict(), tmp_path / "scaled.pt")
    (found,) = inspect(str(tmp_path / "scaled.pt"))
    assert {one.constraint for one in found.norms.weights} == {norm}
    assert [one.shape for one in found.norms.weights] == [(12, 12), (6, 36)]
    for one, expected in zip(found.norms.weights, measure(model).weights, strict=True):
        assert (one.spectral, one.target) == pytest.approx((expected.spectral, expected.target))
