"""What a training survives: killed processes, torn and damaged files, a full disk, signals, and NaN on one rank."""

import os
import random
import re
import resource
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_recipe import TORCHRUN, TRAIN, lines, run
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lib.checkpoint import DamagedFileError, is_whole, load_states, save_states
from lib.distributed import Processes
from lib.files import append_json_line, atomic, read_json_lines, write_atomically
from lib.presets import digits
from lib.survival import Stop, Stopped, require_finite
from specscale import NonFiniteWeightError, apply_norm_scaling
from train import main

DIGITS = replace(digits(), norms=("spectral",), epochs=6, checkpoint_minutes=0, wandb="disabled", compare=False)


def states(folder):
    return torch.load(folder / "checkpoint.pt")


def assert_same_run(one, other):
    """The metrics of every epoch and all states, bit for bit."""
    assert lines(one) == lines(other)
    assert (one / "spectra.jsonl").read_text() == (other / "spectra.jsonl").read_text()
    left, right = states(one), states(other)
    assert left["epoch"] == right["epoch"]
    for name, value in left["model"].items():
        assert torch.equal(value, right["model"][name]), name
    for number, state in left["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, right["optimizer"]["state"][number][name])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run in this process."""
    out = tmp_path_factory.mktemp("whole")
    main(replace(DIGITS, out=out))
    return out / "digits" / "spectral-seed0"


# Files


def test_a_file_gets_its_name_when_its_bytes_are_on_the_disk(tmp_path, monkeypatch):
    done, fsync, renamed = [], os.fsync, os.replace

    def fsync_and_note(descriptor):
        done.append(f"fsync {os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_and_note)
    monkeypatch.setattr(os, "replace", lambda *paths: done.append(f"rename {paths[0].name}") or renamed(*paths))
    write_atomically(tmp_path / "a", "one")
    with atomic(tmp_path / "a", previous=tmp_path / "b") as part:
        part.write_text("two")
    folder = f"fsync {tmp_path.name}"
    first = ["fsync a.part", "rename a.part", folder]
    assert done == [*first, "fsync a.part", "rename a", "rename a.part", folder]
    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text()) == ("two", "one")


@contextmanager
def limited_files(size):
    """No file may grow beyond `size` bytes: the system's own error, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_does_not_fit_leaves_the_former_one_and_no_part(tmp_path):
    model = nn.Linear(100, 100)
    save_states(tmp_path, {"model": model})
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with limited_files(20_000), pytest.raises(OSError, match=r"File too large; not written: '.*checkpoint.pt'"):
        save_states(tmp_path, {"model": model})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_line_takes_the_place_of_one_that_was_cut_off(tmp_path):
    path = tmp_path / "lines.jsonl"
    for number in range(3):
        append_json_line(path, {"number": number})
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        known = read_json_lines(path)
        append_json_line(path, {"number": "new"})
        assert read_json_lines(path) == [*known, {"number": "new"}]
    with limited_files(len(whole) - 3), pytest.raises(OSError, match=r"a line is missing: '.*lines.jsonl'"):
        append_json_line(path, {"number": "too long"})


def test_a_damaged_checkpoint_is_seen_and_the_one_before_it_is_loaded(tmp_path):
    model, path = nn.Linear(4, 4), tmp_path / "checkpoint.pt"
    save_states(tmp_path, {"model": model})
    first = {name: value.clone() for name, value in model.state_dict().items()}
    nn.init.ones_(model.weight)
    save_states(tmp_path, {"model": model})
    good = path.read_bytes()
    assert is_whole(path)

    device = torch.device("cpu")
    for size in (0, 1, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        nn.init.zeros_(model.weight)
        with pytest.warns(UserWarning, match=r"checkpoint.pt is damaged; going on from checkpoint.pt.previous"):
            load_states(tmp_path, {"model": model}, device)
        assert torch.equal(model.weight, first["weight"])

    # The next checkpoint leaves the whole one as it is, until it is whole itself.
    assert (tmp_path / "checkpoint.pt.damaged").read_bytes() == good[:-1]
    save_states(tmp_path, {"model": model})
    assert is_whole(path)
    assert is_whole(tmp_path / "checkpoint.pt.previous")

    path.unlink()
    nn.init.zeros_(model.weight)
    # A process died between the two renamings.
    load_states(tmp_path, {"model": model}, device)
    assert torch.equal(model.weight, first["weight"])
    path.write_bytes(b"")
    (tmp_path / "checkpoint.pt.previous").unlink()
    with pytest.raises(DamagedFileError, match=r"no whole checkpoint in .*checkpoint.pt: .*put back a copy, or delete"):
        load_states(tmp_path, {"model": model}, device)


def test_no_changed_byte_of_a_checkpoint_changes_a_number(tmp_path):
    model, path = nn.Linear(4, 4), tmp_path / "checkpoint.pt"
    save_states(tmp_path, {"model": model})
    good, seen = path.read_bytes(), 0
    for position in range(0, len(good), 13):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x55]) + good[position + 1 :])
        if is_whole(path):
            # It was in the padding, or in what torch does not read.
            loaded = torch.load(path)["model"]
            assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
        else:
            seen += 1
    assert seen > len(good) // 13 / 3


# One process


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_where_there_is_room(tmp_path, whole, capsys):
    out = tmp_path / "disk"
    out.mkdir()
    # Two checkpoints and a half.
    size = (whole / "checkpoint.pt").stat().st_size * 5 // 2
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(out)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        with pytest.raises(SystemExit) as error:
            main(replace(DIGITS, out=out))
        folder = out / "digits" / "spectral-seed0"
        assert error.value.code == 1
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert re.fullmatch(
            rf"train: \[Errno 28\] No space left on device; not written: '{folder}/checkpoint.pt'; "
            rf"{folder}/checkpoint.pt holds epoch 2; once that is mended, the same command with --resume goes on",
            said,
        )
        assert states(folder)["epoch"] == 2
        assert not list(folder.glob("*.part"))
        subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(out)], check=True)
        main(replace(DIGITS, out=out, resume=True))
        assert_same_run(folder, whole)
        assert not (folder / "checkpoint.pt.previous").exists()
    finally:
        subprocess.run(["umount", str(out)], check=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_last_epoch_after_the_step(number, code, tmp_path, whole, capsys, monkeypatch):
    # Only the first epoch is saved by the clock.
    config = replace(DIGITS, out=tmp_path, checkpoint_minutes=60)
    folder, steps = tmp_path / "digits" / "spectral-seed0", []

    def send(optimizer, *_):
        steps.append(len(steps) + 1)
        if len(steps) == 4 * 12 + 5:
            assert states(folder)["epoch"] == 1
            os.kill(os.getpid(), number)

    hook = register_optimizer_step_post_hook(send)
    # A shell's background process ignores Ctrl-C.
    before = signal.getsignal(number)
    try:
        with pytest.raises(SystemExit) as error:
            main(config)
    finally:
        hook.remove()
    assert error.value.code == code
    assert len(steps) == 4 * 12 + 5
    (said,) = capsys.readouterr().err.strip().splitlines()
    name, path = signal.Signals(number).name, folder / "checkpoint.pt"
    assert said == f"train: stopped by {name}; {path} holds epoch 4; the same command with --resume goes on"
    assert signal.getsignal(number) == before
    main(replace(config, resume=True))
    assert_same_run(folder, whole)


def test_a_run_without_an_epoch_says_so_when_it_is_stopped(tmp_path, capsys):
    hook = register_optimizer_step_post_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(SystemExit):
            main(replace(DIGITS, out=tmp_path))
    finally:
        hook.remove()
    assert "stopped by SIGTERM" in (said := capsys.readouterr().err)
    assert "spectral-seed0 has no checkpoint yet" in said


def test_a_run_whose_checkpoints_are_damaged_ends_in_one_line(tmp_path, capsys):
    main(replace(DIGITS, out=tmp_path, epochs=1))
    folder = tmp_path / "digits" / "spectral-seed0"
    (folder / "summary.json").unlink()
    (folder / "checkpoint.pt").write_bytes(b"cut off")
    with pytest.raises(SystemExit):
        main(replace(DIGITS, out=tmp_path, epochs=1, resume=True))
    assert "train: no whole checkpoint in" in capsys.readouterr().err


def test_parameters_that_are_not_finite_are_named_by_their_layers():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    apply_norm_scaling(model)
    require_finite(model, "epoch 1")
    with torch.no_grad():
        model[2].parametrizations.weight.original[0, 0] = torch.inf
        model[1].bias[0] = torch.nan
    with pytest.raises(NonFiniteWeightError, match=r"epoch 7: a parameter of '1', '2' holds NaN or infinity. Lower"):
        require_finite(model, "epoch 7")


# Two processes

OPTIONS = ["digits", "--norms", "spectral", "--wandb", "disabled", "--no-compare"]


def children(process):
    """The processes that this one has started, by their ranks."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        # One may be gone by now, or not yet be the program that it will be.
        with suppress(OSError, KeyError):
            environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
            found[int(dict(entry.split("=", 1) for entry in environment if entry)["RANK"])] = int(pid)
    return found


@contextmanager
def torchrun(arguments, cwd, restarts=0):
    """A running torchrun; its output is in the file `said`."""
    command = [*TORCHRUN, f"--max-restarts={restarts}", *arguments]
    with (cwd / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=cwd, stdout=said, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def wait_for(condition, process, seconds=200):
    """Look again and again until the condition holds, while the process runs."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < end, "it has not come to this"
        time.sleep(0.001)
    return found


def epochs_in(said):
    return [int(epoch) for epoch in re.findall(r"epoch (\d+)/", said.read_text())]


@pytest.mark.slow
def test_a_killed_rank_comes_back_by_itself_and_sigterm_saves_on_all(tmp_path):
    folder, said = tmp_path / "runs" / "digits" / "spectral-seed0", tmp_path / "said"
    # An older run that is to be overwritten: by the first start, not by the second.
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "summary.json").write_text("{}")
    with torchrun([TRAIN, *OPTIONS, "--epochs", "100000", "--overwrite"], tmp_path, restarts=1) as process:
        wait_for(lambda: len(epochs_in(said)) > 2, process)
        # The clock has saved the first epoch alone, and SIGKILL leaves no time to save another.
        os.kill(children(process)[1], signal.SIGKILL)
        before = len(epochs_in(said))
        wait_for(lambda: 2 in epochs_in(said)[before:] and epochs_in(said)[-1] > 5, process)
        assert 1 not in epochs_in(said)[before:]
        process.terminate()
        # torchrun's own exit code.
        assert process.wait(timeout=60) == 1
    text = said.read_text()
    last = max(epochs_in(said))
    assert re.findall(r"train: .*", text) == [
        f"train: stopped by SIGTERM; {folder.relative_to(tmp_path)}/checkpoint.pt holds epoch {last}; "
        "the same command with --resume goes on"
    ]
    assert states(folder)["epoch"] == last
    assert [line["epoch"] for line in lines(folder)] == list(range(1, last + 1))


POISON = """
import os, runpy, sys
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

count = 0


def poison(optimizer, *_):
    global count
    count += 1
    weight = optimizer.param_groups[0]["params"][1]
    if count == 30 and os.environ["RANK"] == "1":
        if WHAT == "weight":
            weight.data[0, 0] = torch.nan
        else:
            weight.register_hook(lambda gradient: gradient * torch.nan)


register_optimizer_step_pre_hook(poison)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# The first of these is in test_recipe too.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "norm", "found"),
    [
        ("weight", "spectral", "rank 1: step: the weight of '3' holds NaN or infinity; no weight was scaled. Lower"),
        ("gradient", "spectral", "step: the weight of '3' holds NaN or infinity; no weight was scaled. Lower"),
        # What one rank computes from it reaches all weights of all ranks by their gradients.
        ("weight", "none", "epoch 3: a parameter of '1', '3', '5' holds NaN or infinity. Lower"),
    ],
)
def test_nan_on_one_rank_stops_all_ranks_with_the_name_of_the_layer(what, norm, found, tmp_path):
    script = tmp_path / "poison.py"
    script.write_text(POISON.replace("WHAT", repr(what)))
    options = [*OPTIONS, "--norms", norm, "--epochs", "1000"]
    code, output = run([*TORCHRUN, str(script), TRAIN, *options], tmp_path)
    assert code == 1
    folder = f"runs/digits/{norm}-seed0"
    (said,) = re.findall(r"train: (.*)", output)
    assert said.startswith(found)
    state = f"{folder}/checkpoint.pt holds epoch 2"
    assert said.endswith(f"{state}; once that is mended, the same command with --resume goes on")
    # Neither has lost the other while it trained.
    assert "Connection" not in output
    assert states(tmp_path / folder)["epoch"] == 2


def is_running(pid):
    try:
        # The state follows the name in brackets; a zombie runs no longer.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_bit(tmp_path):
    """While the processes start, train and save; of one rank, or of all and torchrun, as when a machine goes down."""
    options = [TRAIN, *OPTIONS, "--epochs", "60", "--width", "512", "--checkpoint-minutes", "0"]
    code, output = run([*TORCHRUN, *options, "--out", "whole"], tmp_path)
    assert code == 0, output
    whole, folder, said = tmp_path / "whole" / "digits" / "spectral-seed0", tmp_path / "runs", tmp_path / "said"
    folder = folder / "digits" / "spectral-seed0"
    part, lost = folder / "checkpoint.pt.part", 0
    moments = ["start"] * 5 + ["epoch"] * 7 + ["save"] * 8
    rng = random.Random(0)
    rng.shuffle(moments)
    table, kills = [], iter(moments)
    for launch in range(3):
        with torchrun([*options, *["--resume"] * (launch > 0)], tmp_path, restarts=30) as process:
            for moment in kills:
                seen = len(epochs_in(said))
                workers = wait_for(lambda: len(found := children(process)) == 2 and found, process)
                if moment == "start":
                    time.sleep(rng.uniform(0, 4))
                else:
                    wait_for(lambda seen=seen: len(epochs_in(said)) > seen, process)
                    time.sleep(rng.uniform(0, 0.1))
                victims = [workers[rng.randrange(2)]]
                ends_all = launch < 2 and rng.random() < 0.15
                if ends_all:
                    victims = [process.pid, *workers.values()]
                if moment == "save":
                    # Of the process that saves.
                    victims = victims if ends_all else [workers[0]]
                    wait_for(part.exists, process)
                for pid in victims:
                    os.kill(pid, signal.SIGKILL)
                if ends_all:
                    process.wait()
                while any(map(is_running, workers.values())):
                    time.sleep(0.001)
                is_torn, lost = part.exists(), lost + (bool(seen) and not (folder / "checkpoint.pt").exists())
                table.append((moment, len(victims), is_torn, epochs_in(said)[-1:]))
                print(*table[-1], flush=True)
                if ends_all:
                    break
            else:
                assert process.wait(timeout=600) == 0, said.read_text()
                break
    assert len(table) == 20
    assert sum(is_torn for _, _, is_torn, _ in table) >= 4
    assert lost == 0
    assert_same_run(folder, whole)
    assert not part.exists()


@pytest.mark.slow
def test_a_stop_with_loader_workers_and_a_second_start_change_no_bit(tmp_path):
    """SIGTERM reaches the loaders' processes too."""
    options = [TRAIN, *OPTIONS, "--epochs", "8", "--no-data-on-device", "--num-workers", "1"]
    code, output = run([*TORCHRUN, *options, "--out", "whole"], tmp_path)
    assert code == 0, output
    folder, said = tmp_path / "runs" / "digits" / "spectral-seed0", tmp_path / "said"
    with torchrun(options, tmp_path) as process:
        wait_for(lambda: len(epochs_in(said)) > 3, process)
        # A cluster may send it to all processes, and torchrun sends it on.
        os.kill(children(process)[0], signal.SIGTERM)
        process.terminate()
        process.wait()
    assert f"stopped by SIGTERM; runs/digits/spectral-seed0/checkpoint.pt holds epoch {len(lines(folder))}" in (
        said.read_text()
    )
    code, output = run([*TORCHRUN, *options, "--resume"], tmp_path)
    assert code == 0, output
    assert_same_run(folder, tmp_path / "whole" / "digits" / "spectral-seed0")


def test_a_second_ctrl_c_ends_a_training_that_another_signal_is_stopping():
    stop = Stop(Processes(0, 1, torch.device("cpu")))
    stop.receive(signal.SIGTERM, None)
    stop.receive(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        stop.receive(signal.SIGINT, None)
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        stop.check()
