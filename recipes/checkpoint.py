"""Checkpoints that are whole or not there."""

import os
from pathlib import Path
from typing import Any

import torch


def save(path: Path, parts: dict[str, Any], **facts: Any) -> None:
    """Write the state of the `parts` (model, optimizer, ...) and the `facts` beside it, atomically."""
    part = path.with_name(path.name + ".part")
    torch.save({name: value.state_dict() for name, value in parts.items()} | facts, part)
    os.replace(part, path)


def load(path: Path, parts: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Bring the `parts` back to the saved state and return the facts."""
    saved = torch.load(path, map_location=device)
    for name, value in parts.items():
        value.load_state_dict(saved.pop(name))
    return saved
