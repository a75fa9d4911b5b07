"""Putting a model under norm scaling, and taking it off: validate, plan, commit.

The plan reads the model and makes all that the commit registers and writes; every refusal comes before the commit, so
that a call that fails leaves the model as it was.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from specscale.block import Block
from specscale.constraints import CONSTRAINTS, Constraint
from specscale.errors import Refusal, one_of, public_call
from specscale.initialization import orthogonal_like
from specscale.layers import EMBEDDINGS, LayerRule
from specscale.parametrization import register, unregister
from specscale.plain import Rule, refuse_inside_plain
from specscale.scaler import NormScaler
from specscale.schedules import AnySchedule, check_schedule
from specscale.solvers import SVD, Power, Solver
from specscale.state import NormScaling
from specscale.state_dicts import check_before_loading, end_unused_checks
from specscale.step import solve_anew_
from specscale.targets import GAINS, Gains, Targets, check_setting, resolve_gains, resolve_targets
from specscale.watch import watch_optimizers
from specscale.weights import (
    Patterns,
    Weight,
    by_pattern,
    find_weights,
    pattern_name,
    refuse_non_finite,
    refuse_scaled,
    refuse_shared_memory,
    refuse_unwritable,
    refuse_whole_only,
    refuse_wrapped,
    scaled_weights,
    select,
    without_numbers,
)

SOLVERS: dict[str, Solver] = {"block": Block(), "power": Power(), "svd": SVD()}
"""The solvers that can be chosen by name."""


@public_call()
def apply_norm_scaling(
    module: nn.Module,
    norm: str | Constraint | Mapping[Any, str | Constraint] = "spectral",
    *,
    init: str | None = None,
    target: Targets | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    rules: Iterable[LayerRule] = (),
    solver: str | Solver | None = None,
    gain: Gains = "channels",
    schedule: AnySchedule | Mapping[Any, AnySchedule | None] | None = None,
    example_input: Any = None,
    generator: torch.Generator | None = None,
) -> NormScaler:
    """Put the weights of a model under norm scaling, in place, and return the handle.

    The model may be on the meta device, where the targets need no norms and there is no init. What first needs the
    values, such as the first step, finds those that the weights have by then.

    Args:
        module: any model; its linear, convolution, attention and recurrent weights that require gradients, and
            those that `rules` add, are scaled.
        norm: `"spectral"` (moves the first singular triple alone), `"frobenius"`, `"cap"` (lowers what is above the
            target, and leaves alone what is below), `"normalize"` (scales the whole matrix to the spectral norm),
            `"orthogonal"` (puts every singular value on the target), `"clipped"` (as spectral, and lowers every other
            singular value above the target to it: exact, by a decomposition at every step), `"rows"` or `"columns"`
            (the Frobenius norm of each row, an output, or of each column, an input); a constraint with
            options of its own, such as `Cap(exact=True)`; or a mapping from patterns, as `include` takes them, to
            these. The first pattern that matches a weight's layer wins, `"*"` matches all, and every weight must be
            matched. Embeddings are scaled by `"rows"` and `"columns"` alone, where a pattern names them: one of
            `include`, or of this mapping, that matches no other weight.
        init: None keeps the weights; `"orthogonal"` overwrites them by `gain` times orthogonal matrices.
        target: `"initial"` (the default: the norm that the weight has when the call returns); `"channels"`,
            `"features"` or `"matrix"` (the norm of an orthogonal matrix with that gain); `Relative(0.5)` (half of the
            initial norm); the norm itself as a number; a function of the weight's name and its layer; or a mapping from
            patterns to these. The function returns a number, which is the norm of *each* of the weight's matrices (of
            q, k and v each, where they are fused), or one number for each of its `k` matrices. If it has a parameter
            called `norms`, `(name, module, norms)`, it gets their initial norms, a tensor `(k,)`.
        include: shell patterns on module names, each taking everything below the modules that it matches, types of
            layers, or predicates `(name, module) -> bool`; None means all.
        exclude: the weights that are not scaled, in the same ways.
        rules: which tensors of other layers are weights too, and as which matrices; they come before the built-in ones.
        solver: of the spectral norm: `"block"`, `"power"`, `"svd"`, or an instance such as `Block(width=8)`. None means
            the constraint's own, which is `Block()` unless it was given another. Other norms need none.
        gain: of the init: `"channels"` (`sqrt(d_out / d_in)` of the feature or channel counts), `"features"` (of the
            sizes of the layer's output and input), `"matrix"` (of the weight's matrices), a number, a function
            `(name, module) -> float`, or a mapping from patterns to these.
        schedule: of the targets: `schedules.Cosine(final=0.1, steps=1000)`, another of `specscale.schedules`, or a
            function from a step, an `int`, to a factor; or a mapping from patterns to these. After `n` steps that have
            scaled a weight, its target is the factor at `n` times what `target` says.
        example_input: for `"features"`, a batch that the model can be called with.
        generator: the init's source of randomness; None means torch's global one.

    Returns:
        The handle, to be attached to an optimizer.

    Raises:
        TypeError: `module` is no module, or an option has a wrong type.
        ValueError: an unknown name, a pattern that matches nothing, a weight that no pattern of a mapping matches, a
            rule that does not fit a layer, no weight selected, a gain or target that is not finite and positive, a
            weight that is scaled already, computed from others, in the memory of another, sharded or not finite, an
            init of a weight on the meta device or a target that needs its norm, a model under
            DistributedDataParallel. The model is then as it was.
    """
    target = "initial" if target is None else target
    constraints = _constraints(norm, solver)
    if init not in (None, "orthogonal"):
        raise Refusal(f"unknown init {init!r}; choose None or 'orthogonal'")
    check_setting("gain", gain, GAINS)
    check_setting("target", target, ("initial", *GAINS))
    check_schedule(schedule)
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise Refusal(f"generator must be a torch.Generator, found {type(generator).__name__}", TypeError)
    if torch.is_inference_mode_enabled():
        raise Refusal("under torch.inference_mode() no state can be made that a step could write; call it outside")

    rules = list(rules) if isinstance(rules, Iterable) else [rules]
    if isinstance(module, nn.Module):
        refuse_inside_plain(module)
        refuse_wrapped(module)
    every = constraints.values() if isinstance(constraints, Mapping) else [constraints]
    named = EMBEDDINGS if any(one.takes_embeddings for one in every) else ()
    by_key = constraints.items() if isinstance(constraints, Mapping) else ()
    naming = [key for key, one in by_key if one.takes_embeddings]
    weights = select(module, include, exclude, rules, named=named, naming=naming, on_meta=True)
    refuse_scaled(weights)
    refuse_unwritable(weights)
    refuse_shared_memory(weights)
    constraint_of = {weight: one for one, own in by_pattern("norm", constraints, weights, module) for weight in own}
    refuse_whole_only(constraint_of.items())
    if named:
        _refuse_embeddings(constraint_of, module, rules)
    if init is not None:
        _refuse_init_on_meta(weights)
    gains = None if init is None else resolve_gains(gain, weights, module, example_input)
    schedule_of = {weight: one for one, own in by_pattern("schedule", schedule, weights, module) for weight in own}
    plan = _plan(constraint_of, schedule_of, weights, gains, generator)
    _set_targets(plan, resolve_targets(target, plan.scalings, module, example_input, plan.warnings))
    if init is None and gain != "channels":
        plan.warnings.append("gain has no effect without init='orthogonal'")
    watch_optimizers()
    for text in plan.warnings:
        warnings.warn(f"apply_norm_scaling: {text}", stacklevel=3)
    return NormScaler(module, _commit(module, plan), Rule(target, tuple(rules)))


def _refuse_embeddings(constraint_of: dict[Weight, Constraint], module: nn.Module, rules: list[LayerRule]) -> None:
    """Refuse embeddings under a constraint that does not take them, as a mapping may have it."""
    usual = {id(weight.parameter) for weight in find_weights(module, rules)}
    for weight, constraint in constraint_of.items():
        if not constraint.takes_embeddings and id(weight.parameter) not in usual:
            taking = one_of(name for name, one in CONSTRAINTS.items() if one.takes_embeddings)
            raise Refusal(
                f"{weight.name!r} is an embedding, which {constraint.name!r} does not scale; choose {taking} for it, "
                "or give a LayerRule that says as which matrices it is read"
            )


def _refuse_init_on_meta(weights: list[Weight]) -> None:
    """Refuse to initialize weights on the meta device."""
    for weight in weights:
        if weight.parameter.is_meta:
            raise without_numbers(
                weight,
                "leave out init='orthogonal' here, and call orthogonal_init_(model) after to_empty",
            )


def _constraints(norm: Any, solver: str | Solver | None) -> Constraint | dict[Any, Constraint]:
    """The constraint of a norm, or of each pattern's norm, with the solver."""
    if isinstance(norm, Mapping):
        return {
            pattern: _constraint(one, solver, f" for pattern {pattern_name(pattern)}") for pattern, one in norm.items()
        }
    return _constraint(norm, solver)


def _constraint(norm: Any, solver: str | Solver | None, where: str = "") -> Constraint:
    if isinstance(norm, str) and norm in CONSTRAINTS:
        norm = CONSTRAINTS[norm]()
    if isinstance(norm, type) and issubclass(norm, Constraint):
        raise Refusal(f"norm is the class {norm.__name__}{where}; give a constraint, {norm.__name__}()", TypeError)
    if not isinstance(norm, Constraint):
        raise Refusal(f"unknown norm {norm!r}{where}; choose {one_of(CONSTRAINTS)}")
    if solver is None:
        return norm
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise Refusal(f"unknown solver {solver!r}; choose {one_of(SOLVERS)}")
        solver = SOLVERS[solver]
    elif not isinstance(solver, Block | Power | SVD):
        raise Refusal(f"solver must be a name or a Block, Power or SVD, found {type(solver).__name__}", TypeError)
    return replace(norm, solver=solver)


@dataclass
class _Plan:
    """What a commit registers and writes."""

    scalings: dict[Weight, NormScaling] = field(default_factory=dict)
    """The scaling of each selected weight, which has been measured."""
    weights: list[Weight] = field(default_factory=list)
    """The weights to be scaled, each with its scaling and its targets."""
    values: list[tuple[Weight, Tensor]] = field(default_factory=list)
    """The values of the init."""
    warnings: list[str] = field(default_factory=list)


def _plan(
    constraints: dict[Weight, Constraint],
    schedules: dict[Weight, AnySchedule | None],
    weights: list[Weight],
    gains: dict[str, float] | None,
    generator: torch.Generator | None,
) -> _Plan:
    """Make each weight's scaling, solved to convergence for the values that the weight will have."""
    plan = _Plan()
    if gains is None:
        with_values = [weight for weight in weights if not weight.parameter.is_meta]
        refuse_non_finite(with_values, "load good weights, or start anew with init='orthogonal'")
    else:
        plan.values.extend((weight, orthogonal_like(weight, gains[weight.name], generator)) for weight in weights)
    values = [value for _, value in plan.values] or [weight.parameter for weight in weights]
    for weight, value in zip(weights, values, strict=True):
        scaling = plan.scalings[weight] = NormScaling(
            constraints[weight],
            constraints[weight].view(weight.view, value),
            value,
            seed_name=weight.name,
            is_only=weight.is_only,
            parameter_order=tuple(weight.module._parameters),
            schedule=schedules[weight],
        )
        # On the meta device, it is solved once there are values.
        if not value.is_meta:
            solve_anew_(scaling, value)
    return plan


def _set_targets(plan: _Plan, targets: dict[Weight, list[float]]) -> None:
    """Give the scalings their targets; a weight that has no matrix to scale is left out of the plan."""
    for weight, scaling in plan.scalings.items():
        scaling.set_target_(targets[weight], is_base=True)
        if bool(scaling.skip_mask.any()):
            part = scaling.constraint.part
            plan.warnings.append(
                f"{weight.name!r} holds a zero {part}, which has no direction to scale: that {part} is skipped. "
                "Give a target other than 'initial' to scale it once it has moved"
            )
        if not bool(scaling.skip_mask.all()):
            plan.weights.append(replace(weight, view=scaling.view, parametrization=scaling))
    if not plan.weights:
        raise Refusal("no weight is selected, since all of them are zero; give a target or an init")


@torch.no_grad()
def _commit(module: nn.Module, plan: _Plan) -> list[Weight]:
    """Register the scalings, then write the init; returns the scaled weights. An interruption is rolled back."""
    before: list[tuple[Weight, Tensor]] = []
    try:
        for weight in plan.weights:
            register(weight.module, weight.tensor, weight.scaling)
        check_before_loading(module, plan.weights)
        # Each new value is let go as the old one is kept, so that memory does not grow.
        while plan.values:
            weight, value = plan.values.pop()
            before.append((weight, weight.parameter.clone()))
            weight.parameter.copy_(value)
        for weight in plan.weights:
            weight.scaling.mark_current(weight.parameter)
    except BaseException:
        for weight, value in before:
            weight.parameter.copy_(value)
        for weight in plan.weights:
            if weight.is_scaled:
                unregister(weight.module, weight.tensor)
        end_unused_checks(plan.weights)
        raise
    return plan.weights


def is_norm_scaled(module: nn.Module) -> bool:
    """Whether any weight of the module, or of one below it, is under norm scaling."""
    return any(True for _ in scaled_weights(module))


@public_call()
def remove_norm_scaling(module: nn.Module) -> nn.Module:
    """Take norm scaling off a model, in place, and return it: the same parameters under their plain names.

    Raises:
        ValueError: no weight is scaled.
    """
    refuse_inside_plain(module)
    if not is_norm_scaled(module):
        raise Refusal(f"{type(module).__name__} has no scaled weight")
    return NormScaler.of(module).remove()
