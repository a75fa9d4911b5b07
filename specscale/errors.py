"""The errors that are worth catching by name, and the pieces that error texts share."""

import difflib
from collections.abc import Iterable

from torch import Tensor


class NonFiniteWeightError(ValueError):
    """A weight holds NaN or infinity; the message names its layer. It was not written."""


def non_finite(call: str, names: Iterable[str], advice: str) -> NonFiniteWeightError:
    """The error of a call that found NaN or infinity in the weights of these names."""
    return NonFiniteWeightError(f"{call}: the weight of {', '.join(map(repr, names))} holds NaN or infinity; {advice}")


def refuse_non_finite(call: str, weights: Iterable[tuple[str, Tensor]], advice: str) -> None:
    """Raise `NonFiniteWeightError` where any of the named weights holds NaN or infinity."""
    if bad := [name for name, weight in weights if not bool(weight.isfinite().all())]:
        raise non_finite(call, bad, advice)


def one_of(choices: Iterable[str]) -> str:
    """The choices as an error text lists them: `'a', 'b' or 'c'`."""
    *head, last = (repr(choice) for choice in choices)
    return f"{', '.join(head)} or {last}" if head else last


def nearest(name: str, names: Iterable[str]) -> str:
    """The names most like `name`, best first, or the first few where none is alike."""
    names = [n for n in names if n]
    if (module := name.rpartition(".")[0]) in names:
        # It is a parameter's name, where a module's is asked for.
        return repr(module)
    found = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
    return ", ".join(repr(n) for n in found) or "none"
