"""What the commands print: progress, and tables in Markdown."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence

from tqdm import tqdm


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose other columns are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def progress(total: int, label: str) -> Iterator[int]:
    """Count from 1 to `total`, with a progress bar in a terminal, and a line every 30 seconds in a log file."""
    terminal = sys.stderr.isatty()
    printed = time.monotonic()
    for count in tqdm(range(1, total + 1), label, disable=not terminal):
        yield count
        if not terminal and time.monotonic() - printed > 30:
            printed = time.monotonic()
            print(f"{label}: {count} of {total}", flush=True)
