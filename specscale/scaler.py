"""The handle of a scaled model: it follows an optimizer, takes the scaling step and reports."""

import inspect
import math
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from specscale import algebra
from specscale.algebra import numerical
from specscale.audit import Audit, Certificate
from specscale.errors import non_finite, refuse_non_finite
from specscale.graphs import Graphs, obstacle, warn
from specscale.norms import Norm
from specscale.parametrization import NormScaling, original, scaling_of, scalings, unregister
from specscale.selection import refuse_sharded, weight_name
from specscale.state_dicts import plain_state_dict
from specscale.step import Batch, Member, Readout, measure, restore_
from specscale.tables import aligned

HOOKED_STEP = torch.optim.Optimizer.profile_hook_step(max).__code__  # type: ignore[attr-defined]
"""What runs where torch has put its hooks around an optimizer's `step`."""

CURE = "Lower the learning rate or clip the gradients"


class ScaledWeight(NamedTuple):
    """One weight under scaling."""

    name: str
    module: nn.Module
    tensor: str
    scaling: NormScaling

    @property
    def is_scaled(self) -> bool:
        """Whether the scaling is still on the module."""
        return scaling_of(self.module, self.tensor) is self.scaling

    @property
    def parameter(self) -> nn.Parameter:
        return original(self.module, self.tensor)


class NormScaler:
    """The handle that `apply_norm_scaling` returns; all its state is on the model.

    >>> scaling = apply_norm_scaling(model, "spectral", init="orthogonal")
    >>> scaling.attach(optimizer)     # every optimizer.step() now ends on the targets
    >>> print(scaling)                # layer, shape, target, norm, excess
    >>> scaling.remove()              # a plain model again
    """

    def __init__(self, model: nn.Module, weights: Iterable[ScaledWeight]) -> None:
        self._model = model
        self._weights = list(weights)
        self._handles: list[RemovableHandle] = []
        self._last: Readout | None = None
        self._pace: dict[Norm, int | None] = {}
        self._graphs: Graphs | None = None
        self._num_iterations: dict[str, int] = {}

    @classmethod
    def of(cls, model: nn.Module) -> "NormScaler":
        """The handle of a model that is scaled already, from the model alone.

        Raises:
            ValueError: the model has no scaled weight.
        """
        found = list(scalings(model))
        in_one = Counter(name for name, *_ in found)
        weights = [
            ScaledWeight(weight_name(name, tensor, alone=in_one[name] == 1), module, tensor, scaling)
            for name, module, tensor, scaling in found
        ]
        if not weights:
            raise ValueError(
                f"NormScaler.of: {type(model).__name__} has no scaled weight; call apply_norm_scaling(model) first"
            )
        return cls(model, weights)

    @property
    def weights(self) -> list[ScaledWeight]:
        """The weights that are under scaling, in the model's order, without layers that the model has lost since."""
        here = set(self._model.modules())
        return [weight for weight in self._weights if weight.is_scaled and weight.module in here]

    def _held(self, call: str) -> list[ScaledWeight]:
        """The weights; a handle that has none left says so, rather than that all is well."""
        if not self.weights:
            raise ValueError(
                f"{call}: no weight of {type(self._model).__name__} is under this scaling any more; "
                "call apply_norm_scaling(model) again"
            )
        return self.weights

    def attach(self, optimizer: torch.optim.Optimizer) -> "NormScaler":
        """Scale, after every step of the optimizer, the weights that it has stepped.

        The optimizer keeps the handle alive. A step that a GradScaler skips moves nothing.

        Raises:
            TypeError: `optimizer` is no torch optimizer.
            ValueError: it would never call a step hook, owns none of the weights, is attached already, or its weights
                have been sharded.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"attach: expected a torch.optim.Optimizer, found {type(optimizer).__name__}")
        kind = type(optimizer).__name__
        if not getattr(type(optimizer).step, "hooked", False):
            raise ValueError(
                f"attach: {kind} never calls step hooks; attach to the optimizer that it wraps, or call "
                "scaling.step() after its step"
            )
        owned = self.owned_by(optimizer)
        if not owned:
            raise ValueError(f"attach: {kind} owns none of the scaled weights; build it from this model's parameters")
        refuse_sharded("attach", owned)
        # Another handle of the same model counts too, hence the look into the optimizer's own list.
        holders = [getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_post_hooks.values()]
        taken = {id(w.scaling) for holder in holders if isinstance(holder, NormScaler) for w in holder._weights}
        if any(id(weight.scaling) in taken for weight in owned):
            raise ValueError(f"attach: this {kind} is attached already; a second hook would scale twice")
        self._handles.append(optimizer.register_step_post_hook(self._after_step))
        return self

    def owned_by(self, optimizer: torch.optim.Optimizer) -> list[ScaledWeight]:
        """The scaled weights among the optimizer's parameters."""
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [weight for weight in self.weights if id(weight.parameter) in owned]

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if _is_inner_step(optimizer):
            return
        # What was not stepped stays, since the spectral update is not idempotent. An optimizer may have no gradients,
        # or clear them; and one that writes to `.data` leaves no other trace.
        stepped = [
            weight
            for weight in self.owned_by(optimizer)
            if weight.parameter.grad is not None or weight.scaling.is_behind(weight.parameter)
        ]
        # A fused optimizer is called by GradScaler even for a step that it skips inside.
        self._scale(stepped, getattr(optimizer, "found_inf", None))

    def capture(self) -> "NormScaler":
        """Replay steps from CUDA graphs from now on: `scaling.capture().attach(optimizer)`.

        The step is the same; its hundreds of small launches become one. Where the weights are not on one CUDA device,
        or a capture fails, a warning says why and steps run as they are.
        """
        why = obstacle(weight.parameter for weight in self.weights)
        if why is not None:
            warn(why)
        self._graphs = Graphs() if why is None else None
        return self

    def step(self) -> None:
        """Put every weight back on its target: for training loops without `attach`, once after each optimizer step.

        A weight that is frozen by now has not moved, and is left alone.

        Raises:
            ValueError: no weight is scaled any more.
            NonFiniteWeightError: a weight holds NaN or infinity; no weight was written.
        """
        self._scale([weight for weight in self._held("step") if weight.parameter.requires_grad], None)

    def project(self, model: nn.Module | None = None) -> None:
        """Take one scaling step from vectors that are solved anew: for a copy of the model that holds an average.

        An average of weights (EMA, SWA) is on no target, and one of singular vectors is none. Frozen weights are scaled
        too.

        >>> ema = torch.optim.swa_utils.AveragedModel(model)
        >>> scaling.project(ema)

        Args:
            model: a copy of the scaled model, or a module that holds one; None means the handle's own model.

        Raises:
            ValueError: `model` has no scaled weight.
            NonFiniteWeightError: a weight holds NaN or infinity; no weight was written.
        """
        other = self if model is None else NormScaler.of(model)
        other._solve_anew("project")
        other._scale(other.weights, None)

    def retarget(self) -> None:
        """Hold, from now on, the norms that the weights have now: for other weights that were loaded.

        Raises:
            ValueError: no weight is scaled any more.
            NonFiniteWeightError: a weight holds NaN or infinity; the targets are as they were.
        """
        self._solve_anew("retarget")
        for weight in self.weights:
            weight.scaling.target.copy_(weight.scaling.norm)

    def _solve_anew(self, call: str) -> None:
        weights = self._held(call)
        refuse_non_finite(call, ((weight.name, weight.parameter) for weight in weights), "load good weights first")
        for weight in weights:
            weight.scaling.solve_cold_(weight.parameter)

    @numerical
    def _scale(self, weights: list[ScaledWeight], skip: Tensor | None) -> None:
        members = [Member(weight.scaling, weight.parameter.detach()) for weight in weights]
        if not members:
            return
        if all(algebra.may_wait(member.weight) for member in members):
            measured = measure(members)
            if bad := Readout(measured).non_finite():
                raise non_finite("step", bad, f"no weight was scaled. {CURE}")
            restore_(measured, skip)
            self._count(measured)
            for weight in weights:
                weight.scaling.see(weight.parameter)
            return
        pace = {m.scaling.kind: self._next_pace(m.scaling.kind) for m in members}
        # Elsewhere the host must not wait for the device: it looks back to the step before, which is long done. An
        # error is raised once, so that good weights can be loaded and gone on with.
        last, self._last = self._last, None
        if last is not None and (bad := last.non_finite()):
            raise non_finite("step", bad, f"the last step did not scale it. {CURE}")

        def take(skip: Tensor | None) -> list[Batch]:
            measured = measure(members, pace)
            restore_(measured, skip)
            return measured

        graphs = self._graphs
        measured = take(skip) if graphs is None else graphs.run(members, tuple(pace.items()), skip, take)
        # A compiled step keeps the pace that it was compiled with: what changes here would compile it anew.
        if not torch.compiler.is_compiling():
            self._pace, self._last = pace, Readout(measured)
            self._count(measured)
        for weight in weights:
            weight.scaling.see(None if torch.compiler.is_compiling() else weight.parameter)

    def _count(self, measured: list[Batch]) -> None:
        self._num_iterations = {m.scaling.name: b.measurement.num_iterations for b in measured for m in b.members}

    @property
    def num_iterations(self) -> dict[str, int]:
        """The solver's iterations in the last step, by layer; zero where the norm is exact. The host knows them."""
        return dict(self._num_iterations)

    def _next_pace(self, kind: Norm) -> int | None:
        error = None if self._last is None else self._last.worst_error(kind)
        return kind.pace(self._pace.get(kind), error)

    @torch.no_grad()
    def _report(self) -> list[tuple[ScaledWeight, float, float, float, float, float]]:
        """Each weight with its largest norm, largest target, worst excess, worst residual and worst error."""
        if behind := [weight.name for weight in self.weights if weight.scaling.is_behind(weight.parameter)]:
            names = ", ".join(map(repr, behind))
            warnings.warn(
                f"the weight of {names} has changed since it was last scaled, and what is told of it is of then; "
                "attach the optimizer that steps it, or call scaling.step() after each of its steps",
                stacklevel=3,
            )
        rows = []
        for weight in self.weights:
            scaling = weight.scaling
            buffers = (scaling.norm, scaling.target, scaling.excess(scaling.norm), scaling.residual, scaling.error)
            norm, target, excess, residual, error = (buffer.max().item() for buffer in buffers)
            rows.append((weight, norm, target, excess, residual, error))
        return rows

    def metrics(self) -> dict[str, float]:
        """`norm/<layer>`, `target/`, `excess/`, `residual/` and `error/` of every weight, from the buffers.

        The excess is norm / target - 1. The residual is the solver's, `||W^T u - s v|| / s` of the triple that its last
        iteration set out from; the error is its own estimate of how far, relative, the first singular value was too
        low after it. Both are zero where the norm is exact. A tensor that is several matrices reports the largest
        of each. Under spectral scaling the norm is the larger of the target and the solver's second singular value, an
        estimate from below: `audit()` certifies it.

        A warning names the weights that have been changed since they were last scaled.

        Raises:
            NonFiniteWeightError: a weight held NaN or infinity at the last step, where that step could not say so.
        """
        rows = self._report()
        if bad := [weight.name for weight, norm, *_ in rows if not math.isfinite(norm)]:
            raise non_finite("metrics", bad, f"the last step did not scale it. {CURE}")
        metrics: dict[str, float] = {}
        for weight, *values in rows:
            keys = (f"{key}/{weight.name}" for key in ("norm", "target", "excess", "residual", "error"))
            metrics |= dict(zip(keys, values, strict=True))
        return metrics

    @numerical
    def audit(self, *, tolerance: float = 1e-3, miss: float = 1e-6, seed: int = 0) -> Audit:
        """What the norms truly are, in float64, beside what the solver believes: slow, and certain.

        A spectral norm is exact, by SVD, where a matrix's shorter side is at most 1024. A larger one is found by
        Lanczos iteration from a random start (Kuczynski & Wozniakowski, 1992, theorem 4.2).

        Args:
            tolerance: how far, relative, a norm found by Lanczos may lie below the true one.
            miss: the probability, for each weight, that it lies further below.
            seed: of the random start.

        Raises:
            ValueError: `tolerance` or `miss` is not between 0 and 1, or no weight is scaled any more.
            NonFiniteWeightError: a weight holds NaN or infinity.
        """
        if not (0 < tolerance < 1 and 0 < miss < 1):
            raise ValueError(f"audit: tolerance and miss must lie between 0 and 1, found {tolerance} and {miss}")
        weights = self._held("audit")
        refuse_non_finite("audit", ((weight.name, weight.parameter) for weight in weights), CURE)
        certificates = []
        for weight in weights:
            scaling, parameter = weight.scaling, weight.parameter
            matrices = scaling.matrices(parameter)
            bounds = scaling.kind.certify(matrices, scaling.seeds(parameter, seed), tolerance, miss)
            norm = bounds.lower
            # A matrix of zeros has no error.
            error = torch.where(norm > 0, scaling.norm.double() / norm - 1, 0)
            certificates.append(
                Certificate(
                    name=weight.name,
                    count=scaling.view.count,
                    shape=scaling.view.matrix_shape(parameter),
                    target=scaling.target.max().item(),
                    norm=norm.max().item(),
                    excess=scaling.excess(norm).max().item(),
                    error=error[error.abs().argmax()].item(),
                    method=bounds.method,
                    miss=bounds.miss,
                )
            )
        return Audit(certificates, tolerance)

    def plain_state_dict(self) -> dict[str, Any]:
        """The model's state dict under its plain names, in its plain order, without the scaling's buffers."""
        return plain_state_dict(self._model)

    def detach(self) -> None:
        """Let the optimizers go; the model stays as it is, and its weights keep their state."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def remove(self) -> nn.Module:
        """Let the optimizers go and return the model, plain again: the same parameters under their plain names."""
        self.detach()
        for weight in self.weights:
            unregister(weight.module, weight.tensor)
        return self._model

    def __str__(self) -> str:
        header = ("layer", "matrices", "shape", "target", "norm", "excess", "residual", "error")
        rows: list[tuple[str, ...]] = [header]
        for weight, norm, target, excess, *solved in self._report():
            m, n = weight.scaling.view.matrix_shape(weight.parameter)
            layer = (weight.name, str(weight.scaling.view.count), f"{m}x{n}")
            held = (f"{target:.4g}", f"{norm:.4g}", f"{excess:+.2%}")
            rows.append((*layer, *held, *(f"{value:.1e}" if value else "exact" for value in solved)))
        return aligned(rows)

    def __repr__(self) -> str:
        return f"NormScaler({len(self.weights)} weights of {type(self._model).__name__})"


def _is_inner_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step that is over was called by one that overrides it: torch calls the hooks after both."""
    if torch.compiler.is_compiling():
        return False
    if sum(getattr(vars(kind).get("step"), "hooked", False) for kind in type(optimizer).__mro__) < 2:
        return False
    # A count of the steps that have begun would be wrong for good after one that raises: the stack is not.
    running, frame = 0, inspect.currentframe()
    while frame is not None:
        running += frame.f_code is HOOKED_STEP and frame.f_locals["args"][0] is optimizer
        frame = frame.f_back
    return running > 1
