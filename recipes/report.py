"""A report on the finished runs of a preset: one HTML file to open in a browser, and the same as a W&B report.

Example: python recipes/report.py runs/mlp-5x2000

`report.html` contains all tables and images. With `--publish`, which needs wandb-workspaces, the W&B report is written
to `report.json` too, and sent to the W&B project that the runs were logged to.
"""

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import tyro

from lib import figures
from lib.console import markdown
from lib.files import write_atomically
from lib.runs import Runs, per_layer, read_runs
from lib.summaries import differing_options, header_of, table_rows
from lib.tasks import task_of

STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0 }
th, td { padding: .3em .6em; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; display: block; margin-top: 2em }
figcaption { color: #555 } .wide { overflow-x: auto }"""


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}</table>\n"


def provenance_table(runs: Runs) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of where each run was made."""
    keys = ["processes", "hardware", "threads", "torch", "commit", "command"]
    rows = []
    for condition, seeds in runs.items():
        for run in seeds:
            options = [condition, run.config["seed"], len(run.epochs), run.config["solver"]]
            provenance = [run.summary["provenance"].get(key, "-") for key in keys]
            rows.append([str(cell) for cell in (*options, *provenance)])
    return ["run", "seed", "epochs", "solver", *keys], rows


def html_report(title: str, runs: Runs, images: list[Path]) -> str:
    """The report as one HTML document that contains its images."""
    task = task_of(runs)
    question = f"<p>{escape(task.question)}</p>\n" if task.question else ""
    items = "".join(f"<li>{escape(str(finding))}</li>\n" for finding in task.findings(runs))
    findings = f"<h2>{escape(task.findings_title)}</h2>\n<ul>\n{items}</ul>\n" if items else ""
    figure_elements = ""
    for path in images:
        data = base64.b64encode(path.read_bytes()).decode()
        caption = escape(figures.FIGURES[path.stem].__doc__ or "")
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        figure_elements += f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>Norm scaling: {escape(title)}</h1>
{question}<h2>Comparison</h2>
<div class="wide">{html_table(header_of(runs), table_rows(runs))}</div>
<p>{escape(differing_options(runs).strip())}</p>
{findings}<h2>Figures</h2>
{figure_elements}
<h2>Where the runs were made</h2>
<div class="wide">{html_table(*provenance_table(runs))}</div>
</body></html>
"""


def wandb_report(title: str, runs: Runs, project: str, entity: str = "") -> Any:
    """The report for W&B, averaged over seeds. This only builds it; nothing is sent."""
    try:
        from wandb_workspaces.reports import v2 as wr
    except ImportError as error:
        raise SystemExit(
            f"report: --publish needs wandb-workspaces ({error}); pip install wandb-workspaces, or leave --publish "
            "out: report.html needs neither it nor a login"
        ) from error

    task, preset = task_of(runs), next(iter(runs.values()))[0].config["preset"]
    items = list(map(str, task.findings(runs)))
    findings = [wr.H1(task.findings_title), wr.UnorderedList(items=items)] if items else []
    runset = wr.Runset(
        entity=entity,
        project=project,
        name=preset,
        filters=f"Config('preset') = '{preset}' and JobType = 'train'",
        groupby=["config.condition"],
    )

    def by_epoch(title: str, keys: list[str], **options: Any) -> Any:
        average = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
        return wr.LinePlot(title=title, x="epoch", y=keys, **average, **options)

    names = list(per_layer(next(iter(runs.values()))[0].epochs[0], "spectral_norm"))
    curves = [
        by_epoch(f"{split} {key}", [f"{split}/{key}"]) for key in ("accuracy", "loss") for split in ("train", "test")
    ]
    norms = [by_epoch(f"spectral norm, {name}", [f"spectral_norm/{name}"], log_y=True) for name in names]
    overhead = [
        wr.BarPlot(title=title, metrics=[key], groupby_aggfunc="mean")
        for title, key in (("ms / step", "time/step_ms"), ("of which scaling, ms", "time/scaling_ms"))
    ]
    return wr.Report(
        project=project,
        entity=entity,
        title=f"Norm scaling: {title}",
        description=task.question or "Training without scaling and under norm constraints, compared.",
        blocks=[
            wr.TableOfContents(),
            wr.H1("Comparison"),
            wr.MarkdownBlock(markdown(header_of(runs), table_rows(runs)) + differing_options(runs)),
            *findings,
            wr.H1("Accuracy and loss"),
            wr.PanelGrid(runsets=[runset], panels=curves),
            wr.H1("Spectral norms"),
            wr.PanelGrid(runsets=[runset], panels=norms),
            wr.H1("Overhead"),
            wr.PanelGrid(runsets=[runset], panels=overhead),
            wr.H1("Options"),
            wr.PanelGrid(runsets=[runset], panels=[wr.RunComparer(diff_only=True)]),
        ],
        width="fluid",
    )


def report_json(report: Any) -> dict[str, Any]:
    """The JSON that W&B stores for the report. It takes a private method: wandb-workspaces has no public one."""
    return json.loads(report._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))


def main(folder: tyro.conf.Positional[Path], publish: bool = False, entity: str = "") -> None:
    """Report on the runs of one preset.

    Args:
        folder: the preset's folder.
        publish: send the report to W&B; this needs a login.
        entity: W&B user or team; empty for the default of the login.
    """
    runs = read_runs(folder)
    if not runs:
        raise SystemExit(f"report: no finished run in {folder}; give a preset's folder, such as runs/digits")
    title = folder.resolve().name
    # Before the figures, which take long: publishing may not be possible.
    report = None
    if publish:
        report = wandb_report(title, runs, next(iter(runs.values()))[0].config["wandb_project"], entity)
        write_atomically(folder / "report.json", json.dumps(report_json(report), indent=1))
    write_atomically(folder / "report.html", html_report(title, runs, figures.draw(runs, folder)))
    print(f"{folder}: report.html{', report.json' if publish else ''}", flush=True)
    if report is not None:
        report.save()
        print(report.url, flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
