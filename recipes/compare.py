"""Compare finished runs from their files alone: tables and figures in each preset's folder, and all presets' above.

Example: python recipes/compare.py runs
"""

import json
import sys
from pathlib import Path

import figures
import tyro
from logs import write_atomically
from presets import HOUSEKEEPING
from runs import Run, read
from summaries import HEADER, beside_published, findings_text, ranks, record, rows
from tables import markdown


def differences(runs: dict[str, list[Run]]) -> str:
    """The options in which the runs differ, which no table should hide; nothing where the conditions alone do."""
    configs = [run.config for seeds in runs.values() for run in seeds]
    names = [name for name in configs[0] if name not in (*HOUSEKEEPING, "norm", "targets", "seed")]
    found = {name: sorted({str(config.get(name)) for config in configs}) for name in names}
    told = [f"{name} ({', '.join(values)})" for name, values in found.items() if len(values) > 1]
    return f"\nThe runs differ in {'; '.join(told)}.\n" if told else ""


def text(runs: dict[str, list[Run]]) -> str:
    """The comparison of a preset's runs: table, findings, ranks."""
    found = markdown(HEADER, rows(runs)) + differences(runs)
    if said := findings_text(runs):
        found += f"\nOf the post's findings:\n\n{said}"
    if told := ranks(runs):
        found += f"\nRanks, mean over the weight matrices:\n\n{told}"
    return found


def compare(folder: Path) -> list[list[str]]:
    """Write `comparison.md`, `results.json` and the figures into the folder of one preset's runs.

    Returns the table's rows.
    """
    runs = read(folder)
    write_atomically(folder / "comparison.md", f"# {folder.resolve().name}\n\n{text(runs)}")
    records = [record(run) for seeds in runs.values() for run in seeds]
    write_atomically(folder / "results.json", json.dumps(records, indent=1) + "\n")
    figures.draw(runs, folder)
    return rows(runs)


def compare_all(root: Path) -> str:
    """Compare every preset's runs below `root`, and those of the post's two families; returns all the tables."""
    presets = {path.name: read(path) for path in preset_folders(root)}
    said = "".join(f"## {name}\n\n{text(runs)}\n" for name, runs in presets.items())
    for name in presets:
        compare(root / name)
    if published := beside_published(presets):
        said += f"## Beside the published figures\n\n{published}"
    for prefix in ("mlp", "resnet"):
        if members := {name: runs for name, runs in presets.items() if name.startswith(prefix)}:
            figures.family(members, root / f"{prefix}.png")
    write_atomically(root / "comparison.md", said)
    return said


def preset_folders(root: Path) -> list[Path]:
    return sorted({path.parent.parent for path in root.glob("*/*-seed*/summary.json")})


def main(folder: tyro.conf.Positional[Path]) -> None:
    """Compare the runs in a folder.

    Args:
        folder: a preset's folder, or the one above it, for every preset's.
    """
    if list(folder.glob("*-seed*/summary.json")):
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
