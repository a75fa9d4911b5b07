"""The errors that are worth catching by name, how they get their call's name, and the pieces that their texts share."""

import difflib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

ADVICE = "Lower the learning rate or clip the gradients"
"""The advice to a training run whose weights are not finite any more."""


class NonFiniteWeightError(ValueError):
    """A weight holds NaN or infinity; the message names its layer. It was not written."""


class Refusal(Exception):
    """Why a public call cannot do what it was asked: raised inside the package, and caught by `public_call`."""

    def __init__(self, text: str, error: type[Exception] = ValueError) -> None:
        super().__init__(text)
        self.error = error


def public_call(name: str | None = None) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function that users call: a `Refusal` becomes the error that they see, with the call's name in front.

    The name is the function's own, unless another is given. What a user's own function raises (a predicate, a target,
    the model) passes through as it is.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        call = name or function.__name__

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return function(*args, **kwargs)
            except Refusal as refusal:
                error = refusal.error(f"{call}: {refusal}")
                raise error.with_traceback(refusal.__traceback__) from refusal.__cause__

        return run

    return decorate


def non_finite(names: Iterable[str], advice: str) -> Refusal:
    """The refusal of a call that found NaN or infinity in the weights of these names."""
    text = f"the weight of {', '.join(map(repr, names))} holds NaN or infinity; {advice}"
    return Refusal(text, NonFiniteWeightError)


def one_of(choices: Iterable[str]) -> str:
    """The choices as an error text lists them: `'a', 'b' or 'c'`."""
    *head, last = (repr(choice) for choice in choices)
    return f"{', '.join(head)} or {last}" if head else last


def some_of(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many there are more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(map(repr, names[:most]))}{more}"


def nearest(name: str, names: Iterable[str]) -> str:
    """Says which names are most like `name`, best first, or what the outermost are where none is similar."""
    # The modules that hold parametrizations are no layers of the user's.
    names = [n for n in names if n and "parametrizations" not in n.split(".")]
    if (module := name.rpartition(".")[0]) in names:
        # It is a parameter's name, where a module's is asked for.
        return f"the nearest name is {module!r}"
    if similar := difflib.get_close_matches(name, names, n=3, cutoff=0.5):
        return f"the nearest names are {', '.join(map(repr, similar))}"
    outermost = [n for n in names if "." not in n] or names
    return f"no name is similar to it; the outermost are {some_of(outermost, most=12) or 'none'}"


def positive(option: str, number: Any, where: str = "") -> float:
    """The number, where it is finite and positive.

    Raises:
        Refusal: it is no number (TypeError), or not finite and positive (ValueError).
    """
    if isinstance(number, bool) or not isinstance(number, Real):
        raise Refusal(f"{option} must be a number{where}, found {type(number).__name__}", TypeError)
    value = float(number)
    if not (math.isfinite(value) and value > 0):
        raise Refusal(f"{option} must be finite and positive{where}, found {value}")
    return value
