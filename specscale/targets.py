"""Gains and targets: from a name, a number or a function to a positive number for each weight or matrix."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from specscale.errors import Refusal, one_of, positive, public_call
from specscale.state import NormScaling
from specscale.weights import Weight, by_pattern, evaluation_mode, pattern_name, without_numbers

Gain = str | float | Callable[[str, nn.Module], float]
Target = str | float | Callable[..., float | Iterable[float]]
Gains = Gain | Mapping[Any, Gain]
"""A gain for all weights, or one for each pattern (`specscale.weights.Pattern`), of which the first match wins."""
Targets = Target | Mapping[Any, Target]
"""The same of targets."""


@dataclass(frozen=True)
class Relative:
    """A target relative to the norm that each matrix has, whatever the norm: `target=Relative(0.5)` is half of it.

    Examples:
        >>> targets = {"*.attn": "initial", "*.mlp": Relative(0.5)}
        >>> apply_norm_scaling(gpt, target=targets, exclude="head")

    It is a target function like a caller's own: `lambda name, module, norms: 0.5 * norms`.

    Raises:
        TypeError: the factor is no number.
        ValueError: it is not finite and positive.
    """

    factor: float
    """The target over the norm that the matrix has when `apply_norm_scaling` returns, after its init."""

    @public_call("Relative")
    def __post_init__(self) -> None:
        positive("factor", self.factor)

    def __call__(self, name: str, module: nn.Module, norms: Tensor) -> Tensor:
        return self.factor * norms


def depends_on_norms(target: Any) -> bool:
    """Whether a target is made from the norms of the weight: `"initial"`, or a function with a parameter `norms`."""
    if not callable(target):
        return bool(target == "initial")
    try:
        return "norms" in inspect.signature(target).parameters
    except (TypeError, ValueError):
        # What is not written in Python may not say.
        return False


def _by_channels(weights: list[Weight], model: nn.Module, example_input: Any) -> dict[str, float]:
    """`sqrt(d_out / d_in)` of the feature or channel counts."""
    return {weight.name: _ratio(*weight.view.channels(weight.parameter)) for weight in weights}


def _by_features(weights: list[Weight], model: nn.Module, example_input: Any) -> dict[str, float]:
    """`sqrt(d_out / d_in)` of the sizes of each layer's output and input, in a call of the model."""
    if example_input is None:
        raise Refusal('"features" needs example_input, a batch to read the activation sizes from')
    sizes = activation_sizes(model, [weight.module for weight in weights], example_input)
    gains = {}
    for weight in weights:
        d_out, d_in = weight.view.channels(weight.parameter)
        # Without a kernel, each position of the output comes from one position of the input: the ratio of the sizes is
        # that of the counts, and is known for a projection within attention too, which is never called as a module.
        if weight.view.has_kernel:
            if weight.module not in sizes:
                raise Refusal(
                    f'"features" needs the sizes of {weight.name!r}, which example_input did not reach; '
                    "exclude it, or choose another gain or target"
                )
            d_in, d_out = sizes[weight.module]
        gains[weight.name] = _ratio(d_out, d_in)
    return gains


def _by_matrix(weights: list[Weight], model: nn.Module, example_input: Any) -> dict[str, float]:
    """`sqrt(m / n)` of the weight's matrices `(m, n)`."""
    return {weight.name: _ratio(*weight.view.matrix_shape(weight.parameter)) for weight in weights}


def _ratio(d_out: int, d_in: int) -> float:
    return math.sqrt(d_out / d_in)


GAINS = {"channels": _by_channels, "features": _by_features, "matrix": _by_matrix}
"""The named gains."""


def check_setting(option: str, setting: Any, names: Iterable[str]) -> None:
    """Refuse what is no gain or target, before a model is looked at."""
    if not isinstance(setting, Mapping):
        _check_value(option, setting, names)
        return
    for pattern, value in setting.items():
        _check_value(option, value, names, f" for pattern {pattern_name(pattern)}")


def _check_value(option: str, value: Any, names: Iterable[str], where: str = "") -> None:
    if isinstance(value, str):
        if value not in names:
            raise Refusal(
                f"unknown {option} {value!r}{where}; choose {one_of(names)}, a number, or a function "
                "(name, module) -> float"
            )
    elif not callable(value):
        positive(option, value, where)


def _ask(option: str, function: Callable[..., Any], weight: Weight, **more: Any) -> Any:
    """What the caller's function says of a weight."""
    try:
        return function(weight.name, weight.module, **more)
    except Exception as error:
        error.add_note(f"raised by the {option} function for {weight.name!r}")
        raise


def resolve_gains(setting: Gains, weights: list[Weight], model: nn.Module, example_input: Any) -> dict[str, float]:
    """The init's gain for each weight, by name, within the range of the weight's dtype.

    Raises:
        Refusal: a function's value is no number (TypeError); a value is not finite and positive, `"features"` cannot be
            measured, or patterns and weights do not fit (ValueError).
    """
    gains: dict[str, float] = {}
    for value, own in by_pattern("gain", setting, weights, model):
        if isinstance(value, str):
            gains |= GAINS[value](own, model, example_input)
            continue
        for weight in own:
            number = _ask("gain", value, weight) if callable(value) else value
            gains[weight.name] = positive("gain", number, f" for {weight.name!r}")
    for weight in weights:
        _refuse_out_of_range("gain", gains[weight.name], weight, weight.parameter.dtype)
    return gains


def resolve_targets(
    setting: Targets,
    measured: dict[Weight, NormScaling],
    model: nn.Module,
    example_input: Any,
    warnings: list[str],
) -> dict[Weight, list[float]]:
    """The target norm of each matrix of each weight, within the range of the buffer that holds it.

    The scalings hold the norms that were measured, to which a target may be relative. Zero, of a matrix of
    zeros that has a target relative to its norm, means that it cannot be scaled. What the caller should know is
    appended to `warnings`.

    Raises:
        Refusal: a function's value is neither a number nor one for each matrix (TypeError); a value is not finite and
            positive, their count is not that of the matrices, `"features"` cannot be measured, or patterns and weights
            do not fit (ValueError).
    """
    targets: dict[Weight, list[float]] = {}
    far_off: list[str] = []
    for value, own in by_pattern("target", setting, list(measured), model):
        if value == "initial":
            value = Relative(1.0)
        gains = GAINS[value](own, model, example_input) if isinstance(value, str) else {}
        is_relative = depends_on_norms(value)
        for weight in own:
            scaling = measured[weight]
            norms = _known_norms(scaling)
            numbers: Any = value
            if is_relative and weight.parameter.is_meta:
                raise without_numbers(
                    weight,
                    "give the model memory (to_empty) and values first, or a target that needs none: a number, "
                    f"{one_of(GAINS)}",
                )
            if isinstance(value, str):
                numbers = scaling.constraint.of_orthogonal(gains[weight.name], weight.view, weight.parameter)
            elif callable(value):
                numbers = _ask_target(value, weight, scaling.norm)
                if weight.view.count > 1 and isinstance(numbers, Real) and _is_far_off(numbers, norms):
                    far_off.append(weight.name)
            targets[weight] = _checked(numbers, weight, norms, is_relative)
    if far_off:
        warnings.append(
            f"the target function's number for {', '.join(map(repr, far_off))} is the norm of each of the weight's "
            f"matrices, and more than {FAR_OFF} times off what each of them has; return one number for each matrix, "
            "such as 0.5 * norms from a function (name, module, norms)"
        )
    return targets


FAR_OFF = 1.5
"""From which ratio to the norms of all of a weight's matrices a single number is thought to be a mistake.

The Frobenius norm of a fused weight of `k` like matrices is `sqrt(k)` times that of each: 1.73 for three.
"""


def _known_norms(scaling: NormScaling) -> list[float]:
    """The norms of the weight's matrices; NaN where it has no values yet."""
    return [math.nan] * scaling.view.count if scaling.norm.is_meta else scaling.norm.tolist()


def _is_far_off(number: Real, norms: list[float]) -> bool:
    norms = [one for one in norms if one > 0]
    return bool(norms) and all(not one / FAR_OFF <= float(number) <= one * FAR_OFF for one in norms)


def _ask_target(function: Callable[..., Any], weight: Weight, norm: Tensor) -> Any:
    """What a target function says of a weight: a number, or a list of one for each matrix."""
    norms = {"norms": norm.clone()} if depends_on_norms(function) else {}
    numbers = _ask("target", function, weight, **norms)
    if isinstance(numbers, Tensor):
        return numbers.tolist()
    # NumPy's arrays are no sequences.
    if not isinstance(numbers, Iterable) or isinstance(numbers, str):
        return numbers
    return [one.tolist() if isinstance(one, Tensor) else one for one in numbers]


def _checked(numbers: Any, weight: Weight, norms: list[float], is_relative: bool) -> list[float]:
    """A target's number or numbers as one for each matrix of the weight, of which each is good."""
    where, count = f" for {weight.name!r}", len(norms)
    if not isinstance(numbers, list):
        numbers = [numbers] * count
    elif len(numbers) != count:
        raise Refusal(
            f"target must be one number{where}, or one for each of its {count} matrices, found {len(numbers)}"
        )
    dtype = torch.promote_types(weight.parameter.dtype, torch.float32)
    values = []
    for number, norm in zip(numbers, norms, strict=True):
        is_of_zeros = is_relative and norm == 0 and isinstance(number, Real) and number == 0
        value = 0.0 if is_of_zeros else positive("target", number, where)
        if not is_of_zeros:
            _refuse_out_of_range("target", value, weight, dtype)
        values.append(value)
    return values


def _refuse_out_of_range(option: str, number: float, weight: Weight, dtype: torch.dtype) -> None:
    """Refuse a number that the dtype does not hold: it would be zero, infinite, or have few digits."""
    if not torch.finfo(dtype).tiny <= number <= torch.finfo(dtype).max:
        raise Refusal(f"{option} {number:.3g} for {weight.name!r} is out of the range of {dtype}")


def activation_sizes(
    model: nn.Module, modules: list[nn.Module], example_input: Any
) -> Mapping[nn.Module, tuple[int, int]]:
    """Elements of each module's input and output in its first call; the model is left as it was.

    `example_input` is a tensor, a tuple of positional or a dictionary of keyword arguments. The model runs in
    evaluation mode, so that no running statistics move.
    """
    sizes: dict[nn.Module, tuple[int, int]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            sizes.setdefault(module, (args[0].numel(), output.numel()))

    handles = [module.register_forward_hook(record) for module in modules]
    try:
        with evaluation_mode(model), torch.no_grad():
            if isinstance(example_input, Mapping):
                model(**example_input)
            else:
                model(*example_input if isinstance(example_input, tuple) else (example_input,))
    finally:
        for handle in handles:
            handle.remove()
    return sizes
