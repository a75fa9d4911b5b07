"""Files that are written atomically, and files of one JSON object per line."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it replaces `path` when the block ends without an error."""
    part = path.with_name(path.name + ".part")
    yield part
    os.replace(part, path)


def write_atomically(path: Path, text: str) -> None:
    """Write the whole file or nothing."""
    with atomic(path) as part:
        part.write_text(text)


def write_json_lines(path: Path, objects: list[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(one) + "\n" for one in objects))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """One object per line; nothing if there is no file. A last line that an interruption cut off is skipped."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append_json_line(path: Path, values: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(values) + "\n")
