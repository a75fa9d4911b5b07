"""What the commands print: progress, tables in Markdown, and how to go on after an interruption."""

import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose other columns are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def format_cell(value: Any) -> str:
    """A number with the digits that matter; a dash for None."""
    if isinstance(value, list):
        return " / ".join(f"{x:.2f}" for x in value)
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.3f}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def mean_and_deviation(values: Sequence[float | None], digits: int) -> str:
    """The mean of several seeds, with their standard deviation; a dash where one has no value."""
    if None in values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def progress(total: int, label: str, done: int = 0) -> Iterator[int]:
    """Count from `done + 1` to `total`, with a progress bar in a terminal, and a line every 30 s in a log file."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(range(done + 1, total + 1), label, initial=done, total=total)
        return
    printed = time.monotonic()
    for count in range(done + 1, total + 1):
        yield count
        if time.monotonic() - printed > 30:
            printed = time.monotonic()
            print(f"{label}: {count} of {total}", flush=True)


@contextmanager
def interruption_message(message: str) -> Iterator[None]:
    """End the program at Ctrl-C with one line in place of a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{message}", file=sys.stderr, flush=True)
        # The status of a program that was ended by SIGINT.
        raise SystemExit(130) from None
