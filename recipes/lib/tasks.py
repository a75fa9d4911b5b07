"""What the runs on a data set are for: the question, the columns of their table, and the claims that they decide."""

from collections.abc import Callable
from dataclasses import dataclass

from lib import post
from lib.columns import COLUMNS, STEPS_TO_GENERALIZE, Column, mean_of
from lib.findings import Finding
from lib.runs import Runs


def no_findings(runs: Runs) -> list[Finding]:
    return []


@dataclass(frozen=True)
class Task:
    """What is asked of the runs on one data set."""

    question: str = ""
    """What the runs are for, in sentences above the table."""
    columns: tuple[Column, ...] = COLUMNS
    """The columns of the table."""
    findings: Callable[[Runs], list[Finding]] = no_findings
    """The claims that the runs decide."""
    findings_title: str = "Findings"


def generalization_findings(runs: Runs) -> list[Finding]:
    """Under which conditions the network, once it fits the pairs that it sees, gets the others right as well."""
    claims = {
        "none": ("without scaling, the network fits the pairs that it sees and gets the others wrong", False),
        "decay": ("with weight decay, it gets the others right", True),
        "frobenius": ("with every linear layer held at its initial Frobenius norm, it gets the others right", True),
        "spectral": ("with their spectral norms held at the initial ones, it gets the others wrong", False),
    }
    found = []
    for condition, seeds in runs.items():
        if condition not in claims:
            continue
        claim, generalizes = claims[condition]
        train, test = (mean_of(seeds, f"{split} accuracy %") for split in ("train", "test"))
        holds = train >= 99 and (test >= 99 if generalizes else test < 50)
        found.append(Finding(claim, holds, f"train {train:.1f} %, test {test:.1f} %"))
    return found


TASKS = {
    "digits": Task("A quick run of every part. The task is too small to say anything of norm scaling."),
    "cifar100": Task(findings=post.findings, findings_title="Of the post's findings"),
    "modular-addition": Task(
        "A network learns a + b modulo 97 from 40 % of all pairs of numbers. Which conditions, once they fit these "
        "pairs, get the other 60 % right as well, and after how many steps? The weight decay is tuned for this task; "
        "the target norms are the default, the initial ones.",
        columns=tuple(
            column
            for column in (COLUMNS[0], STEPS_TO_GENERALIZE, *COLUMNS[1:])
            if column.title not in ("accuracy gap", "loss gap", "spectral norm, deviation")
        ),
        findings=generalization_findings,
    ),
}
"""The tasks, by data set."""


def task_of(runs: Runs) -> Task:
    """The task of the runs of a preset."""
    return TASKS[next(iter(runs.values()))[0].config["data"]]
