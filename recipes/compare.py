"""Compare finished runs from their files alone: tables and figures for each preset, and for all presets together.

Example: python recipes/compare.py runs
"""

import json
import sys
from pathlib import Path

import tyro

from lib.console import markdown
from lib.files import write_atomically
from lib.post import published_table
from lib.runs import Runs, finished_runs, preset_folders, read_runs
from lib.summaries import differing_options, header_of, rank_table, record, table_rows
from lib.tasks import task_of


def outcome(runs: Runs) -> str:
    """The runs of a preset in Markdown: their question, table and findings."""
    task = task_of(runs)
    text = f"{task.question}\n\n" if task.question else ""
    text += markdown(header_of(runs), table_rows(runs)) + differing_options(runs)
    if findings := "".join(f"- {finding}\n" for finding in task.findings(runs)):
        text += f"\n{task.findings_title}:\n\n{findings}"
    return text


def comparison(runs: Runs) -> str:
    """The outcome, and the ranks of the weight matrices."""
    ranks = rank_table(runs)
    return outcome(runs) + (f"\nRanks, mean over the weight matrices:\n\n{ranks}" if ranks else "")


def compare(folder: Path) -> Runs:
    """Write `comparison.md`, `results.json` and the figures of one preset into its folder; returns its runs."""
    from lib import figures

    runs = read_runs(folder)
    write_atomically(folder / "comparison.md", f"# {folder.resolve().name}\n\n{comparison(runs)}")
    records = [record(run) for seeds in runs.values() for run in seeds]
    write_atomically(folder / "results.json", json.dumps(records, indent=1) + "\n")
    figures.draw(runs, folder)
    return runs


def compare_all(root: Path) -> str:
    """Compare every preset in `root`, and draw the MLPs in one figure and the ResNets in one; returns all tables."""
    from lib import figures

    presets = {folder.name: read_runs(folder) for folder in preset_folders(root)}
    text = "".join(f"## {name}\n\n{comparison(runs)}\n" for name, runs in presets.items())
    for name in presets:
        compare(root / name)
    if published := published_table(presets):
        text += f"## Beside the published figures\n\n{published}"
    for prefix in ("mlp", "resnet"):
        if family := {name: runs for name, runs in presets.items() if name.startswith(prefix)}:
            figures.model_family(family, root / f"{prefix}.png")
    write_atomically(root / "comparison.md", text)
    return text


def main(folder: tyro.conf.Positional[Path]) -> None:
    """Compare the runs in a folder.

    Args:
        folder: the folder of one preset, or the folder above it to compare every preset in it.
    """
    if finished_runs(folder):
        compare(folder)
        print((folder / "comparison.md").read_text())
    elif preset_folders(folder):
        print(compare_all(folder))
    else:
        sys.exit(
            f"compare: no finished run in {folder}; a run's folder is called CONDITION-seedK and holds summary.json"
        )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
