"""Files that survive a crash: written as a whole or not at all, and files of one JSON object per line."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """A temporary path to write to; it replaces `path` when the block ends without an error.

    Its bytes are on the disk before it gets its name, so that not even a power cut leaves half a file. The file that it
    replaces stays as `previous`, if that is given.

    Raises:
        OSError: the file cannot be written, for example to a full disk. The error names it, and it is as it was.
    """
    part = path.with_name(path.name + ".part")
    try:
        yield part
        flush_to_disk(part)
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(part, path)
        flush_to_disk(path.parent)
    except BaseException as error:
        part.unlink(missing_ok=True)
        # torch.save raises an error of its own while that of the disk is under way.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise OSError(cause.errno, f"{cause.strerror}; not written", str(path)) from error
        raise


def flush_to_disk(path: Path) -> None:
    """Wait until what was written to a file is on the disk, or the names in a folder are."""
    if path.is_dir() and os.name == "nt":
        # Windows opens no folders, and writes their names itself.
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    """Append a line and wait until it is on the disk. It takes the place of a last line that was cut off.

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    try:
        with path.open("a+b") as file:
            file.truncate(_end_of_lines(path))
            file.write(f"{json.dumps(values)}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; a line is missing", str(path)) from error


def _end_of_lines(path: Path) -> int:
    """The size of a file without a last line that was cut off."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 1))
        if file.read() in (b"", b"\n"):
            return size
        file.seek(0)
        return file.read().rfind(b"\n") + 1
