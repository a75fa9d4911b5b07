"""A report over finished runs: one HTML file to open in a browser, and the same as a W&B report.

Example: python recipes/report.py runs/mlp-5x2000

`report.html` holds the tables and pictures of a preset's runs and needs nothing else; `report.json` is what W&B would
be sent, made without network. `--publish` sends it, to the project that the runs were logged to.
"""

import base64
import json
from html import escape
from pathlib import Path
from typing import Any

import figures
import tyro
from compare import differences
from logs import say, write_atomically
from runs import Run, layers, read
from summaries import HEADER, findings, rows
from tables import html, markdown

CAPTIONS = {
    "accuracy": "Accuracy by epoch: training (while learning, on augmented images) and test.",
    "loss": "Cross entropy by epoch.",
    "curves": "Training and test together, by condition: how far they part.",
    "spectral_norms": "The spectral norm of every weight matrix; darker lines are earlier layers.",
    "excess": "How far each spectral norm is above its target; dotted lines are drops of the learning rate.",
    "spectra": "All singular values of a weight matrix, largest first; darker lines are earlier epochs.",
    "ranks": "Stable, numerical (above a hundredth of the largest) and effective rank, over the full rank.",
    "iterations": "The solver's iterations a step, mean over the epoch, of layers that are not solved exactly.",
    "operator_norms": "Each convolution's norm as an operator over that of its flattened weight.",
}

STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0 }
th, td { padding: .3em .6em; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; display: block; margin-top: 2em }
figcaption { color: #555 } .wide { overflow-x: auto }"""


def origins(runs: dict[str, list[Run]]) -> tuple[list[str], list[list[str]]]:
    """Where each run was made: a table's header and rows."""
    header = ["run", "seed", "epochs", "solver", "processes", "hardware", "threads", "torch", "commit", "command"]
    found = []
    for name, seeds in runs.items():
        for run in seeds:
            made = run.summary["provenance"]
            row = [name, run.config["seed"], len(run.epochs), run.config["solver"]]
            found.append([str(cell) for cell in (*row, *(made.get(key, "-") for key in header[4:]))])
    return header, found


def page(title: str, runs: dict[str, list[Run]], pictures: list[Path]) -> str:
    """The report as one HTML document, pictures and all."""
    said = "".join(f"<li>{escape(str(one))}</li>\n" for one in findings(runs))
    shown = ""
    for path in pictures:
        data = base64.b64encode(path.read_bytes()).decode()
        caption = escape(CAPTIONS[path.stem])
        shown += f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption>'
        shown += "</figure>\n"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>Norm scaling: {escape(title)}</h1>
<h2>Comparison</h2>
<div class="wide">{html(HEADER, rows(runs))}</div>
<p>{escape(differences(runs).strip())}</p>
<h2>The post's findings</h2>
<ul>
{said}</ul>
<h2>Figures</h2>
{shown}
<h2>Where the runs were made</h2>
<div class="wide">{html(*origins(runs))}</div>
</body></html>
"""


def wandb_report(title: str, runs: dict[str, list[Run]], project: str, entity: str = "") -> Any:
    """The report for W&B, seeds averaged; nothing is sent."""
    from wandb_workspaces.reports import v2 as wr

    preset = next(iter(runs.values()))[0].config["preset"]
    mine = wr.Runset(
        entity=entity,
        project=project,
        name=preset,
        filters=f"Config('preset') = '{preset}' and JobType = 'train'",
        groupby=["config.condition"],
    )

    def by_epoch(title: str, keys: list[str], **options: Any) -> Any:
        average = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
        return wr.LinePlot(title=title, x="epoch", y=keys, **average, **options)

    names = list(layers(next(iter(runs.values()))[0].epochs[0], "spectral_norm"))
    curves = [by_epoch(f"{s} {k}", [f"{s}/{k}"]) for k in ("accuracy", "loss") for s in ("train", "test")]
    norms = [by_epoch(f"spectral norm, {name}", [f"spectral_norm/{name}"], log_y=True) for name in names]
    overhead = [
        wr.BarPlot(title=title, metrics=[key], groupby_aggfunc="mean")
        for title, key in (("ms / step", "time/step_ms"), ("of which scaling, ms", "time/scaling_ms"))
    ]
    return wr.Report(
        project=project,
        entity=entity,
        title=f"Norm scaling: {title}",
        description="No scaling, Frobenius and spectral norm scaling, compared.",
        blocks=[
            wr.TableOfContents(),
            wr.H1("Comparison"),
            wr.MarkdownBlock(markdown(HEADER, rows(runs)) + differences(runs)),
            wr.H1("The post's findings"),
            wr.UnorderedList(
                items=list(map(str, findings(runs))) or ["The conditions that they compare are not all here."]
            ),
            wr.H1("Accuracy and loss"),
            wr.PanelGrid(runsets=[mine], panels=curves),
            wr.H1("Spectral norms"),
            wr.PanelGrid(runsets=[mine], panels=norms),
            wr.H1("Overhead"),
            wr.PanelGrid(runsets=[mine], panels=overhead),
            wr.H1("Options"),
            wr.PanelGrid(runsets=[mine], panels=[wr.RunComparer(diff_only=True)]),
        ],
        width="fluid",
    )


def spec(report: Any) -> dict[str, Any]:
    """What W&B would store of the report. The one call of wandb-workspaces' own internals."""
    return json.loads(report._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))


def main(folder: tyro.conf.Positional[Path], publish: bool = False, entity: str = "") -> None:
    """Report on one preset's runs.

    Args:
        folder: of the preset's runs.
        publish: send the report to W&B, which needs a login.
        entity: W&B user or team; empty for the login's own.
    """
    runs = read(folder)
    if not runs:
        raise SystemExit(f"report: no finished run in {folder}; give a preset's folder, such as runs/digits")
    title = folder.resolve().name
    write_atomically(folder / "report.html", page(title, runs, figures.draw(runs, folder)))
    project = next(iter(runs.values()))[0].config["wandb_project"]
    report = wandb_report(title, runs, project, entity)
    write_atomically(folder / "report.json", json.dumps(spec(report), indent=1))
    say(f"{folder}: report.html, report.json")
    if publish:
        report.save()
        say(report.url)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
