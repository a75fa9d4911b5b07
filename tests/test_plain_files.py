"""Checkpoint files of other trainers, made plain by the command."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch.nn.utils import parametrize

from specscale import apply_norm_scaling
from specscale.__main__ import main

ERRORS = " ".join((Path(__file__).parent.parent / "docs" / "errors_files.md").read_text().split())


class Net(nn.Module):
    """Layers whose weights are behind other tensors under scaling: their own, and those of layers inside."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.rnn = nn.LSTM(8, 8, 2)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.embed(x)
        x = self.rnn(self.attention(x, x, x)[0])[0]
        return self.head(self.norm(x.flatten(0, 1)))


def train(net, optimizer, steps):
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(3, 2, 4, generator=generator)).square().mean().backward()
        optimizer.step()


def trained(named=True, groups=lambda net: net.named_parameters(), optimizer_of=torch.optim.AdamW):
    """A scaled net after three steps, and its optimizer, built on the names under scaling."""
    torch.manual_seed(0)
    scaling = apply_norm_scaling(net := Net(), "frobenius")
    optimizer = optimizer_of(groups(net) if named else net.parameters(), lr=1e-2)
    scaling.attach(optimizer)
    train(net, optimizer, 3)
    return scaling, net, optimizer


def decay_by_dimension(net):
    parameters = dict(net.named_parameters())
    return [
        {"params": [(n, p) for n, p in parameters.items() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in parameters.items() if p.ndim < 2], "weight_decay": 0.0},
    ]


def plain(source, target, *options):
    """Run the command, and return where it has written."""
    assert main(["plain", str(source), str(target), *options]) == 0
    return target


def refusal(capsys, *arguments):
    """The command's one line about why it cannot."""
    assert main(["plain", *map(str, arguments)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err.strip()


def test_what_timm_saves_loads_into_plain_timm(tmp_path):
    """By the real command; the file is that of timm's own saver."""
    torch.manual_seed(0)
    name, options = "vit_tiny_patch16_224", {"num_classes": 3, "depth": 2, "img_size": 32}
    scaling = apply_norm_scaling(net := timm.create_model(name, **options), "frobenius")
    optimizer = create_optimizer_v2(net, "adamw", lr=1e-2)
    scaling.attach(optimizer)
    ema = ModelEmaV3(net, decay=0.5)
    x = torch.randn(2, 3, 32, 32)
    for _ in range(2):
        net(x).square().mean().backward()
        optimizer.step()
        ema.update(net)
    args = argparse.Namespace(model=name, lr=1e-2, mean=[0.5])
    saver = CheckpointSaver(net, optimizer, args, ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(1, metric=0.5)
    best = tmp_path / "model_best.pth.tar"
    command = [sys.executable, "-m", "specscale", "plain", best, best]
    printed = subprocess.run(command, check=True, capture_output=True, text=True)
    assert printed.stderr == ""
    assert sorted(printed.stdout.splitlines()) == [
        "optimizer: dropped: without param_names in its groups, it cannot be known whose state is whose",
        "state_dict: 10 weights made plain",
        "state_dict_ema: 10 weights made plain",
    ]
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(best)
    assert saved["args"] == args
    assert (saved["epoch"], saved["metric"]) == (1, 0.5)
    assert "optimizer" not in saved
    net.eval()
    ema.module.eval()
    for use_ema, expected in ((True, ema.module), (False, net)):
        loaded = timm.create_model(name, **options).eval()
        timm.models.load_checkpoint(loaded, str(best), use_ema=use_ema, weights_only=False)
        assert torch.equal(loaded(x), expected(x))
    assert list(saved["state_dict"]) == list(loaded.state_dict())


@pytest.mark.parametrize("groups", [lambda net: net.named_parameters(), decay_by_dimension])
@pytest.mark.parametrize("optimizer_of", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_an_optimizer_with_names_goes_on_in_the_plain_model(groups, optimizer_of, tmp_path, capsys):
    options = {"momentum": 0.9} if optimizer_of is not torch.optim.AdamW else {}
    make = lambda parameters, lr: optimizer_of(parameters, lr=lr, **options)  # noqa: E731
    scaling, net, optimizer = trained(groups=groups, optimizer_of=make)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "in.pt")
    saved = torch.load(plain(tmp_path / "in.pt", tmp_path / "out.pt"))
    count = len(list(net.parameters()))
    assert capsys.readouterr().out.splitlines() == [
        "net: 8 weights made plain",
        f"optimizer: {count} parameters put into the plain order, with their state",
    ]
    other = Net()
    other.load_state_dict(saved["net"])
    again = make(groups(other), lr=1.0)
    fresh = again.state_dict()["param_groups"]
    for ours, theirs in zip(saved["optimizer"]["param_groups"], fresh, strict=True):
        assert (ours["params"], ours["param_names"]) == (theirs["params"], theirs["param_names"])
    again.load_state_dict(saved["optimizer"])
    scaling.remove()
    train(net, optimizer, 3)
    train(other, again, 3)
    states = net.state_dict(), other.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_names_in_place_of_numbers_become_plain(tmp_path):
    """As torch.distributed.checkpoint writes an optimizer's state."""
    _, net, optimizer = trained()
    state = optimizer.state_dict()
    names = state["param_groups"][0].pop("param_names")
    state["param_groups"][0]["params"] = names
    state["state"] = {names[number]: value for number, value in state["state"].items()}
    torch.save({"model": net.state_dict(), "optimizer": state}, tmp_path / "in.pt")
    saved = torch.load(plain(tmp_path / "in.pt", tmp_path / "out.pt"))["optimizer"]
    expected = [name for name, _ in Net().named_parameters()]
    assert saved["param_groups"][0]["params"] == list(saved["state"]) == expected
    original = state["state"]["head.parametrizations.weight.original"]["exp_avg"]
    assert torch.equal(saved["state"]["head.weight"]["exp_avg"], original)


@pytest.mark.parametrize("wrap", ["module.", "_orig_mod.", "net."])
def test_an_optimizer_knows_the_weights_by_the_names_of_another_wrapper(wrap, tmp_path):
    _, net, optimizer = trained()
    state = {f"{wrap}{name}": value for name, value in net.state_dict().items()}
    torch.save({"model": state, "optimizer": optimizer.state_dict()}, tmp_path / "in.pt")
    saved = torch.load(plain(tmp_path / "in.pt", tmp_path / "out.pt"))
    assert list(saved["model"]) == [f"{wrap}{name}" for name in Net().state_dict()]
    assert saved["optimizer"]["param_groups"][0]["param_names"] == [name for name, _ in Net().named_parameters()]


def test_an_optimizer_on_plain_names_is_kept(tmp_path, capsys):
    scaling = apply_norm_scaling(net := Net(), "frobenius")
    names = [name for name, _ in Net().named_parameters()]
    parameters = {
        name.replace(".parametrizations", "").replace(".original", ""): p for name, p in net.named_parameters()
    }
    optimizer = torch.optim.Adam([(name, parameters[name]) for name in names], lr=1e-2)
    scaling.attach(optimizer)
    train(net, optimizer, 1)
    stateless = torch.optim.SGD(net.parameters(), lr=0.1)
    content = {"model": net.state_dict(), "adam": optimizer.state_dict(), "sgd": stateless.state_dict()}
    torch.save(content, tmp_path / "in.ckpt")
    saved = torch.load(plain(tmp_path / "in.ckpt", tmp_path / "out.ckpt"))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "adam: kept: its parameters have their plain names",
        "sgd: kept: it holds no state of a parameter",
    ]
    assert saved["adam"]["param_groups"] == content["adam"]["param_groups"]
    assert saved["sgd"] == content["sgd"]


def test_what_is_nested_is_found_and_all_else_stays(tmp_path, capsys):
    """State dicts in lists, a whole list of optimizers (as Lightning's), an average of parameters alone."""
    _, net, optimizer = trained(named=False)
    average = {f"module.{name}": value.detach() for name, value in net.named_parameters()}
    other = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
    content = {
        "models": [net.state_dict(), other.state_dict()],
        "callbacks": {"EMA": {"average": average, "decay": 0.9}},
        "optimizer_states": [optimizer.state_dict()],
        "pair": (optimizer.state_dict(), {"epoch": 3}),
        "rng": torch.get_rng_state(),
        "numbers": [1, 2.5, "three", None],
    }
    torch.save(content, tmp_path / "in.pth")
    saved = torch.load(plain(tmp_path / "in.pth", tmp_path / "out.pth"))
    dropped = "dropped: without param_names in its groups, it cannot be known whose state is whose"
    assert capsys.readouterr().out.splitlines() == [
        "models[0]: 8 weights made plain",
        "callbacks.EMA.average: 8 weights made plain",
        f"optimizer_states[0]: {dropped}",
        f"pair[0]: {dropped}",
    ]
    assert list(saved) == ["models", "callbacks", "pair", "rng", "numbers"]
    assert list(saved["models"][0]) == list(Net().state_dict())
    assert list(saved["models"][1]) == list(other.state_dict())
    assert list(saved["callbacks"]["EMA"]["average"]) == [f"module.{name}" for name, _ in Net().named_parameters()]
    assert saved["callbacks"]["EMA"]["decay"] == 0.9
    assert saved["pair"] == (None, {"epoch": 3})
    assert torch.equal(saved["rng"], content["rng"])
    assert saved["numbers"] == content["numbers"]


def test_another_models_parametrization_of_the_same_name_stays(tmp_path, capsys):
    _, net, _ = trained()
    teacher = Net()
    nn.utils.parametrizations.orthogonal(teacher.head)
    torch.save({"teacher": teacher.state_dict(), "net": net.state_dict()}, tmp_path / "in.pt")
    saved = torch.load(plain(tmp_path / "in.pt", tmp_path / "out.pt"))
    assert capsys.readouterr().out == "net: 8 weights made plain\n"
    assert list(saved["teacher"]) == list(teacher.state_dict())
    assert list(saved["net"]) == list(Net().state_dict())


def test_a_bare_state_dict_and_shared_memory(tmp_path, capsys):
    """Tied tensors stay in one memory."""
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    net[1].weight = net[0].weight
    expected = list(net.state_dict())
    scaling = apply_norm_scaling(net, "frobenius")
    torch.save(net.state_dict(), tmp_path / "in.pt")
    saved = torch.load(plain(tmp_path / "in.pt", tmp_path / "out.pt"))
    assert capsys.readouterr().out == "the whole file: 1 weight made plain\n"
    assert list(saved) == expected
    assert saved["0.weight"].data_ptr() == saved["1.weight"].data_ptr()
    assert torch.equal(saved["0.weight"], scaling.weights[0].parameter)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_version_0_1_0_becomes_plain(zipped, tmp_path, capsys):
    """In torch's format of today, and in the one before torch 1.6."""
    old = torch.load(Path(__file__).parent / "checkpoints" / "0.1.0-spectral.pt")
    torch.save(old, tmp_path / "in.pt", _use_new_zipfile_serialization=zipped)
    saved = torch.load(plain(tmp_path / "in.pt", tmp_path / "in.pt"))
    assert capsys.readouterr().out == "model: 2 weights made plain\n"
    assert list(saved["model"]) == ["qkv.weight", "qkv.bias", "wide.weight", "wide.bias"]
    assert torch.equal(saved["model"]["wide.weight"], old["model"]["wide.parametrizations.weight.original"])
    assert saved["metrics"] == old["metrics"]
    assert os.listdir(tmp_path) == ["in.pt"]


def test_safetensors_keep_their_metadata(tmp_path, capsys):
    _, net, _ = trained()
    save_file(net.state_dict(), tmp_path / "in.safetensors", {"format": "pt"})
    with safe_open(plain(tmp_path / "in.safetensors", tmp_path / "out.safetensors"), "pt") as file:
        assert file.metadata() == {"format": "pt"}
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert capsys.readouterr().out == "the whole file: 8 weights made plain\n"
    other = Net().eval()
    other.load_state_dict(saved)
    x = torch.randn(3, 2, 4)
    assert torch.equal(other(x), net.eval()(x))


def test_safetensors_are_asked_for_where_they_are_missing(tmp_path, capsys, monkeypatch):
    save_file({"x": torch.ones(1)}, tmp_path / "in.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    found = refusal(capsys, tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert found.endswith("in.safetensors' needs the package safetensors: pip install safetensors")


class Trap:
    """What a file must not be able to do."""

    ran = 0

    def __init__(self):
        self.option = 1

    def __setstate__(self, state):
        self.__dict__.update(state)
        Trap.ran += 1


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_runs_only_if_it_is_trusted(zipped, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, net, _ = trained()
    torch.save({"trap": Trap(), "model": net.state_dict()}, "in.pt", _use_new_zipfile_serialization=zipped)
    Trap.ran = 0
    found = refusal(capsys, "in.pt", "out.pt")
    assert Trap.ran == 0
    assert found == (
        f"python -m specscale plain: error: 'in.pt' holds {Trap.__module__}.Trap, which only Python's pickle can load, "
        "and pickle runs whatever code a file asks for; if you trust the file, say --trust-pickle"
    )
    assert found.replace(f"{Trap.__module__}.Trap", "trainer.Config") in ERRORS
    saved = torch.load(plain("in.pt", "out.pt", "--trust-pickle"), weights_only=False)
    assert Trap.ran == 2
    assert list(saved["model"]) == list(Net().state_dict())


def nothing_scaled():
    torch.save({"model": Net().state_dict()}, "in.pt")


def damaged():
    Path("in.pt").write_bytes(b"nothing that torch has written")


def damaged_safetensors():
    Path("in.safetensors").write_bytes(b"no header")


def with_another_on_top():
    apply_norm_scaling(net := Net(), "frobenius")
    parametrize.register_parametrization(net.head, "weight", nn.Identity())
    torch.save(net.state_dict(), "in.pt")


def from_scaled():
    torch.save(trained()[1].state_dict(), "in.pt")


@pytest.mark.parametrize(
    ("make", "source", "target", "text"),
    [
        (lambda: None, "in.pt", "out.pt", "there is no file 'in.pt'"),
        (
            lambda: Path("in.txt").touch(),
            "in.txt",
            "out.pt",
            "'in.txt' is of no known format; its name must end in .pt, .pth, .pth.tar, .ckpt, .bin, .safetensors",
        ),
        (
            nothing_scaled,
            "in.pt",
            "out.safetensors",
            "'out.safetensors' is not of the format of 'in.pt', which is written as it is read",
        ),
        (nothing_scaled, "in.pt", "out.pt", "'in.pt' holds no scaled weight"),
        (
            with_another_on_top,
            "in.pt",
            "out.pt",
            "'weight' of 'head' has a parametrization on top of its scaling, 'head.parametrizations.weight.1'; "
            "remove that first",
        ),
    ],
)
def test_the_command_says_in_one_line_why_it_cannot(make, source, target, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make()
    found = refusal(capsys, source, target)
    assert found == f"python -m specscale plain: error: {text}"
    assert found in ERRORS
    assert not Path(target).exists()


@pytest.mark.parametrize(
    ("make", "source", "target", "text"),
    [
        (damaged, "in.pt", "out.pt", "'in.pt' cannot be read: UnpicklingError: "),
        (
            damaged_safetensors,
            "in.safetensors",
            "out.safetensors",
            "cannot be read: SafetensorError: ",
        ),
        (from_scaled, "in.pt", "nowhere/out.pt", "there is no folder '"),
        (from_scaled, "in.pt", "folder.pt", "folder.pt' cannot be written: IsADirectoryError: "),
    ],
)
def test_a_file_that_cannot_be_read_or_written_is_named(make, source, target, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder.pt").mkdir()
    make()
    assert text in refusal(capsys, source, target)
    assert sorted(os.listdir()) == sorted({source, "folder.pt"})


def test_a_write_that_fails_leaves_the_old_file(tmp_path, capsys, monkeypatch):
    path = tmp_path / "in.pt"
    torch.save(trained()[1].state_dict(), path)
    before = path.read_bytes()

    def half(content, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file: no space left\nand a long trace")

    monkeypatch.setattr(torch, "save", half)
    assert "cannot be written: RuntimeError: PytorchStreamWriter failed" in refusal(capsys, path, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["in.pt"]


def test_a_link_is_followed(tmp_path):
    torch.save(trained()[1].state_dict(), tmp_path / "epoch-3.pt")
    (tmp_path / "best.pt").symlink_to(tmp_path / "epoch-3.pt")
    plain(tmp_path / "best.pt", tmp_path / "best.pt")
    assert (tmp_path / "best.pt").is_symlink()
    assert list(torch.load(tmp_path / "epoch-3.pt")) == list(Net().state_dict())


def test_help_and_a_missing_argument(capsys):
    for arguments, code in ((["plain", "--help"], 0), (["plain", "in.pt"], 2), ([], 2)):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == code
    printed = capsys.readouterr()
    assert "--trust-pickle" in printed.out
    assert "the following arguments are required: OUT" in printed.err
