"""Where results come from: the code, the libraries and the machine."""

import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch


def provenance() -> dict[str, str | int]:
    """The commit, the version of torch, the GPU or CPU, and the number of torch's threads."""
    return {
        "commit": commit(),
        "torch": torch.__version__,
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
    }


def command() -> str:
    """The command line; a script of this checkout is named by its path in it, wherever the checkout lies."""
    root, script = Path(__file__).resolve().parents[2], Path(sys.argv[0]).resolve()
    name = str(script.relative_to(root)) if script.is_relative_to(root) else sys.argv[0]
    return shlex.join([name, *sys.argv[1:]])


def commit() -> str:
    """The commit of this checkout, with -dirty if files differ from it; "unknown" outside a git checkout."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        process = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return process.stdout.strip() or "unknown"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
