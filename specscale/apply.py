"""Putting a model under norm scaling, and taking it off."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from specscale.errors import one_of, refuse_non_finite
from specscale.initialization import write_orthogonal_
from specscale.norms import Clipped, Frobenius, Norm, Spectral
from specscale.parametrization import NormScaling, register, scaling_of, scalings, unregister
from specscale.rules import LayerRule
from specscale.scaler import NormScaler, ScaledWeight
from specscale.selection import Patterns, Weight, refuse_computed, select
from specscale.solvers import SOLVERS, SVD, Block, Power, Solver
from specscale.targets import GAINS, Rule, check_rule, evaluate

CALL = "apply_norm_scaling"
NORMS = ("frobenius", "spectral", "clipped")


def apply_norm_scaling(
    module: nn.Module,
    norm: str = "spectral",
    *,
    init: str | None = None,
    target: Rule | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    rules: Iterable[LayerRule] = (),
    solver: str | Solver = "block",
    gain: Rule = "channels",
    example_input: Any = None,
    generator: torch.Generator | None = None,
) -> NormScaler:
    """Put the weights of a model under norm scaling, in place, and return the handle.

    Args:
        module: any model; its linear, convolution, attention and recurrent weights that require gradients, and
            those that `rules` add, are scaled.
        norm: `"spectral"` (of the first singular triple alone), `"frobenius"`, or `"clipped"` (as spectral, and every
            other singular value above the target comes down to it too: exact, by a decomposition at every step).
        init: None keeps the weights; `"orthogonal"` overwrites them by `gain` times orthogonal matrices.
        target: `"initial"` (the default: the norm that the weight has when the call returns); `"channels"`,
            `"features"` or `"matrix"` (the norm of an orthogonal matrix with that gain); the norm itself as a number,
            or as a function `(name, module) -> float`.
        include: shell patterns on module names, each taking everything below the modules that it matches, types of
            layers, or predicates `(name, module) -> bool`; None means all.
        exclude: likewise, what to leave alone.
        rules: which tensors of other layers are weights too, and as which matrices; they come before the built-in ones.
        solver: of the spectral norm: `"block"`, `"power"`, `"svd"`, or an instance such as `Block(width=8)`.
        gain: of the init: `"channels"` (`sqrt(d_out / d_in)` of the feature or channel counts), `"features"` (of the
            sizes of the module's output and input), `"matrix"` (of the matrix view), a number, or a function.
        example_input: for `"features"`, a batch that the model can be called with.
        generator: the init's source of randomness; None means torch's global one.

    Returns:
        The handle, to be attached to an optimizer.

    Raises:
        TypeError: `module` is no module, or an option has a wrong type.
        ValueError: an unknown name, a pattern that matches nothing, a rule that does not fit a layer, no weight
            selected, a gain or target that is not finite and positive, a weight that is scaled already, computed from
            others, in the memory of another, sharded or not finite, a model under DistributedDataParallel. The model
            is then as it was.
    """
    kind = _kind(norm, solver)
    if init not in (None, "orthogonal"):
        raise ValueError(f"{CALL}: unknown init {init!r}; choose None or 'orthogonal'")
    check_rule(CALL, "gain", gain, GAINS)
    if init is None and gain != "channels":
        warnings.warn(f"{CALL}: gain has no effect without init='orthogonal'", stacklevel=2)
    target = "initial" if target is None else target
    check_rule(CALL, "target", target, ("initial", *GAINS))
    weights = select(CALL, module, include, exclude, rules)
    _refuse_wrapped(module)
    _refuse_scaled(weights)
    refuse_computed(CALL, weights)
    _refuse_shared_memory(weights)
    targets = None
    if target != "initial":
        targets = evaluate(CALL, "target", target, weights, module, example_input)
    if init is None:
        named = ((weight.name, weight.parameter) for weight in weights)
        refuse_non_finite(CALL, named, "load good weights, or start anew with init='orthogonal'")
    else:
        write_orthogonal_(weights, evaluate(CALL, "gain", gain, weights, module, example_input), generator)
    scaled = []
    for weight in weights:
        order = tuple(weight.module._parameters)
        scaling = NormScaling(kind, weight.view, weight.name, order, weight.parameter)
        if targets is not None:
            value = targets[weight.name]
            if isinstance(target, str):
                value = kind.of_orthogonal(value, *weight.view.matrices(weight.parameter).shape[1:])
            scaling.target.fill_(value)
        elif not bool(scaling.target.all()):
            warnings.warn(
                f"{CALL}: {weight.name!r} holds a zero matrix, which has no direction to scale: it is skipped. "
                "Give a target other than 'initial' to scale it once it has moved",
                stacklevel=2,
            )
            if not bool(scaling.target.any()):
                continue
        scaled.append(ScaledWeight(weight.name, weight.module, weight.tensor, scaling))
    if not scaled:
        raise ValueError(f"{CALL}: no weight is selected, since all of them are zero; give a target or an init")
    try:
        for one in scaled:
            register(one.module, one.tensor, one.scaling)
    except BaseException:
        for one in scaled:
            if one.is_scaled:
                unregister(one.module, one.tensor)
        raise
    return NormScaler(module, scaled)


def _kind(norm: str, solver: str | Solver) -> Norm:
    if norm not in NORMS:
        raise ValueError(f"{CALL}: unknown norm {norm!r}; choose {one_of(NORMS)}")
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise ValueError(f"{CALL}: unknown solver {solver!r}; choose {one_of(SOLVERS)}")
        solver = SOLVERS[solver]
    elif not isinstance(solver, Block | Power | SVD):
        raise TypeError(f"{CALL}: solver must be a name or a Block, Power or SVD, found {type(solver).__name__}")
    kinds: dict[str, Norm] = {"spectral": Spectral(solver), "frobenius": Frobenius(), "clipped": Clipped()}
    return kinds[norm]


def _refuse_wrapped(module: nn.Module) -> None:
    if any(isinstance(child, DistributedDataParallel) for child in module.modules()):
        raise ValueError(
            f"{CALL}: the model is under DistributedDataParallel already, which would wait for the parameters by their "
            "old names; scale the model first, then wrap it"
        )


def _refuse_scaled(weights: list[Weight]) -> None:
    for weight in weights:
        if scaling_of(weight.module, weight.tensor) is not None:
            raise ValueError(
                f"{CALL}: {weight.name!r} is scaled already; call remove_norm_scaling(model) first, or exclude it"
            )


def _refuse_shared_memory(weights: list[Weight]) -> None:
    """A parameter that is tied as such is one weight; memory under two parameters would be scaled twice."""
    first: dict[int, Weight] = {}
    for weight in weights:
        other = first.setdefault(weight.parameter.data_ptr(), weight)
        if other is not weight:
            raise ValueError(
                f"{CALL}: the weights of {other.name!r} and {weight.name!r} are two parameters in the same memory; "
                "exclude one, which then follows the other, or tie them as one parameter"
            )


def is_norm_scaled(module: nn.Module) -> bool:
    """Whether any weight of the module, or of one below it, is under norm scaling."""
    return any(True for _ in scalings(module))


def remove_norm_scaling(module: nn.Module) -> nn.Module:
    """Take norm scaling off a model, in place, and return it: the same parameters under their plain names.

    Raises:
        ValueError: no weight is scaled.
    """
    if not is_norm_scaled(module):
        raise ValueError(f"remove_norm_scaling: {type(module).__name__} has no scaled weight")
    return NormScaler.of(module).remove()
