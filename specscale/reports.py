"""What the norms of a scaled model's weights are: metrics and table from the buffers, and the certified audit."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specscale.errors import ADVICE, Refusal, non_finite
from specscale.linalg import in_float64, no_grad_full_precision
from specscale.state import NormScaling
from specscale.weights import Weight, refuse_non_finite


@dataclass(frozen=True)
class Column:
    """A number that is reported of each weight: the largest over its matrices."""

    name: str
    values: Callable[[NormScaling], Tensor]
    """`(k,)`, from the buffers."""
    text: Callable[[float], str]


def _or_exact(value: float) -> str:
    return f"{value:.1e}" if value else "exact"


COLUMNS = (
    Column("target", lambda scaling: scaling.target, "{:.4g}".format),
    Column("norm", lambda scaling: scaling.norm, "{:.4g}".format),
    Column("excess", lambda scaling: scaling.excess(scaling.norm), "{:+.2%}".format),
    Column("drift", lambda scaling: scaling.drift(), "{:.4g}".format),
    Column("residual", lambda scaling: scaling.residual, _or_exact),
    Column("error", lambda scaling: scaling.error, _or_exact),
)
"""What `NormScaler.metrics()` and `print` report; a new column is one entry."""


def metrics(weights: list[Weight]) -> dict[str, float]:
    """Every column of every weight as `<column>/<name>`; see `NormScaler.metrics`."""
    _warn_if_stale(weights, stacklevel=5)
    rows = [(weight.name, _row(weight)) for weight in weights]
    if bad := [name for name, row in rows if not math.isfinite(row["norm"])]:
        raise non_finite(bad, f"the last step did not scale it. {ADVICE}")
    return {f"{column}/{name}": number for name, row in rows for column, number in row.items()}


def table(weights: list[Weight]) -> str:
    """The weights and their columns as lines of text."""
    _warn_if_stale(weights, stacklevel=5)
    rows = [("layer", "matrices", "shape", *(column.name for column in COLUMNS))]
    for weight in weights:
        m, n = weight.scaling.matrix_shape(weight.parameter)
        numbers = (column.text(number) for column, number in zip(COLUMNS, _row(weight).values(), strict=True))
        rows.append((weight.name, str(weight.view.count), f"{m}x{n}", *numbers))
    return aligned(rows)


def _row(weight: Weight) -> dict[str, float]:
    """The weight's columns, read from its device at once."""
    numbers = torch.stack([in_float64(column.values(weight.scaling).max()) for column in COLUMNS]).tolist()
    return dict(zip((column.name for column in COLUMNS), numbers, strict=True))


def _warn_if_stale(weights: list[Weight], stacklevel: int) -> None:
    if stale := [weight.name for weight in weights if weight.scaling.is_stale(weight.parameter)]:
        warnings.warn(
            f"the weight of {', '.join(map(repr, stale))} has changed since it was last scaled, and the reported "
            "values are stale; attach the optimizer that steps it, or call scaling.step() after each of its steps, and "
            "after whatever else writes to the weights, such as model averaging",
            stacklevel=stacklevel,
        )


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """The rows in columns of equal width: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


@dataclass(frozen=True)
class Certificate:
    """One weight's true norm; of a weight that is several matrices, the worst of them."""

    name: str
    count: int
    """Matrices in the tensor."""
    shape: tuple[int, int]
    """`(m, n)` of one matrix."""
    target: float
    """The largest target."""
    norm: float
    """The largest norm: exact to float64 where `miss` is 0, else a lower bound that is attained."""
    excess: float
    """The worst norm / target - 1: what the method leaves above the target, with an exact solver too."""
    error: float
    """The worst (reported norm) / norm - 1: negative where the solver has missed something."""
    method: str
    """`"svd"` or `"lanczos"` for the spectral norm, `"sum"` for the Frobenius norm; in float64."""
    miss: float
    """The probability that the true norm is larger than `norm` by more than the audit's tolerance."""


@dataclass(frozen=True)
class Audit:
    """The certificates of a model's weights, in its order; `print` shows them as a table."""

    certificates: list[Certificate]
    tolerance: float
    """Where `miss` is not 0, how far, relative, the true norm may lie above `norm`."""

    @property
    def miss(self) -> float:
        """The probability that any weight's norm is larger than stated, by more than the tolerance."""
        return sum(one.miss for one in self.certificates)

    @property
    def worst_error(self) -> float:
        """The largest absolute error of the solver, relative to the norm."""
        return max(abs(one.error) for one in self.certificates)

    @property
    def worst_excess(self) -> float:
        """The largest excess."""
        return max(one.excess for one in self.certificates)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("layer", "matrices", "shape", "target", "norm", "excess", "solver's error", "method", "miss")
        ]
        for one in self.certificates:
            numbers = (f"{one.target:.4g}", f"{one.norm:.6g}", f"{one.excess:+.3%}", f"{one.error:+.1e}")
            m, n = one.shape
            rows.append((one.name, str(one.count), f"{m}x{n}", *numbers, one.method, f"{one.miss:.0e}"))
        summary = "every norm is exact in float64"
        if self.miss:
            summary = (
                f"a norm by lanczos may be larger by {self.tolerance:.0e}, and by more with probability {self.miss:.0e}"
            )
        return f"{aligned(rows)}\n{summary}"


@no_grad_full_precision
def audit(weights: list[Weight], tolerance: float, miss: float, seed: int) -> Audit:
    """The weights' certified norms; see `NormScaler.audit`."""
    if not (0 < tolerance < 1 and 0 < miss < 1):
        raise Refusal(f"tolerance and miss must lie between 0 and 1, found {tolerance} and {miss}")
    refuse_non_finite(weights, ADVICE)
    _warn_if_stale(weights, stacklevel=6)
    return Audit([_certificate(weight, tolerance, miss, seed) for weight in weights], tolerance)


def _certificate(weight: Weight, tolerance: float, miss: float, seed: int) -> Certificate:
    scaling, parameter = weight.scaling, weight.parameter
    key = scaling.seeds(parameter.device, seed)
    bounds = scaling.constraint.norm.certify(scaling.matrices(parameter), key, tolerance, miss)
    norm = bounds.lower
    # A matrix of zeros has no relative error.
    error = torch.where(norm > 0, in_float64(scaling.norm) / norm - 1, 0)
    return Certificate(
        name=weight.name,
        count=weight.view.count,
        shape=weight.view.matrix_shape(parameter),
        target=scaling.target.max().item(),
        norm=norm.max().item(),
        excess=scaling.excess(norm).max().item(),
        error=error[error.abs().argmax()].item(),
        method=bounds.method,
        miss=bounds.miss,
    )
