"""The handle of a scaled model."""

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from specscale import reports
from specscale.attach import attach, owned_by, warn_of_unowned
from specscale.errors import Refusal, public_call
from specscale.held import HeldWeights
from specscale.parametrization import unregister
from specscale.plain import PlainModel, Rule, refuse_fully_sharded, refuse_inside_plain
from specscale.state_dicts import end_unused_checks, plain_state_dict
from specscale.step import ScalingStep, solve_anew_, solve_first_
from specscale.weights import (
    Weight,
    refuse_flat,
    refuse_gathered,
    refuse_non_finite,
    refuse_unwritable,
    refuse_without_values,
    scaled_weights,
)


class NormScaler:
    """The handle that `apply_norm_scaling` returns; all that a checkpoint needs is on the model.

    Examples:
        >>> scaling = apply_norm_scaling(model, "spectral", init="orthogonal")
        >>> scaling.attach(optimizer)  # every optimizer.step() now ends on the targets
        >>> print(scaling)  # layer, shape, target, norm, excess, drift
        >>> scaling.remove()  # a plain model again
    """

    def __init__(self, model: nn.Module, weights: list[Weight], rule: Rule | None = None) -> None:
        self._model = model
        self._held = HeldWeights(model, weights)
        self._rule = rule or Rule()
        self._step = ScalingStep()
        self._handles: list[RemovableHandle] = []
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    @classmethod
    @public_call("NormScaler.of")
    def of(cls, model: nn.Module) -> "NormScaler":
        """The handle of a model that is scaled already, from the model alone.

        A schedule is on the model too, and on its copies. A checkpoint holds the step that it has reached, and no
        function: that is given to `apply_norm_scaling` before loading.

        Raises:
            TypeError: `model` is no module.
            ValueError: it has no scaled weight.
        """
        return cls._of(model, "call apply_norm_scaling(model) first")

    @classmethod
    def _of(cls, model: nn.Module, advice: str) -> "NormScaler":
        if not isinstance(model, nn.Module):
            raise Refusal(f"expected a torch.nn.Module, found {type(model).__name__}", TypeError)
        refuse_inside_plain(model)
        weights = list(scaled_weights(model))
        if not weights:
            raise Refusal(f"{type(model).__name__} has no scaled weight; {advice}")
        return cls(model, weights)

    @property
    @public_call()
    def weights(self) -> list[Weight]:
        """The weights that are under this scaling, in the model's order, without layers that the model has lost."""
        return self._held.current()

    @property
    @public_call()
    def unscaled(self) -> dict[str, nn.Parameter]:
        """The model's parameters that are under no scaling, by name: norm layers, biases, and what was left out.

        Examples:
            >>> {name: one.shape for name, one in scaling.unscaled.items() if one.ndim > 1}
        """
        self._held.current()
        scaled = {id(weight.parameter) for weight in scaled_weights(self._model)}
        return {name: one for name, one in self._model.named_parameters() if id(one) not in scaled}

    def _present(self) -> list[Weight]:
        """The weights; an empty handle must not report success."""
        weights = self._held.current()
        if not weights:
            raise Refusal(
                f"no weight of {type(self._model).__name__} is under this scaling any more; "
                "call apply_norm_scaling(model) again"
            )
        return weights

    def _scaled(self) -> list[Weight]:
        """The weights, all of them to be read."""
        weights = self._present()
        _refuse_unreadable(weights)
        return weights

    @public_call()
    def attach(self, optimizer: torch.optim.Optimizer) -> "NormScaler":
        """Scale, after every step of the optimizer, the weights that it has stepped.

        Several optimizers can be attached, each for its weights; at the first step or `metrics()`, a warning names the
        weights that are not frozen and in none of them.

        The optimizer keeps the handle alive. Nothing moves, and no state changes, in a step that a GradScaler skips,
        for a weight without a gradient, and for one whose group has the learning rate 0, as a number or as a tensor: a
        frozen group, the first step of a warm-up, the step that torch's distributed checkpoints take to make an
        optimizer's state. A weight with a gradient and another rate counts as stepped, though an optimizer may have
        left it where it was: with a gradient of zeros, for one. So does one whose group has no `lr`. At the rate 0, a
        decay that is not in proportion to it is not seen. A schedule counts, for each weight, the steps that have
        scaled it.

        Raises:
            TypeError: `optimizer` is no torch optimizer.
            ValueError: it would never call a step hook, owns none of the weights, or has them on the meta device, is
                attached already, its state is in the order of other parameters (of the plain model, for one), or the
                weights are parts of flat parameters (FSDP1), or sharded under a constraint that needs them whole. From
                then on, `optimizer.load_state_dict` refuses a state in another order too.
        """
        self._present()
        self._handles += attach(optimizer, self._held, self._step)
        self._optimizers.add(optimizer)
        return self

    def plain(self) -> PlainModel:
        """The model without its scaling, for other code: `with scaling.plain() as model:`.

        Inside, the model is the plain one: names, order and owners of parameters, types of layers, whole-model pickles,
        and weights that can be assigned. The parameters are the same objects. Afterwards, also after an exception, the
        scaling is back on what the layers then hold:

        - A layer that was left as it was has the very objects that it had, and training goes on bit for bit.
        - A weight is looked for as the same parameter, in whatever layer it now is; else as the tensor of the same name
          in the same layer, or in the layer of the same name. Its state is solved anew where its values have changed.
          The target is kept where the shape is; a weight of another shape gets the target of the call of
          `apply_norm_scaling`. Where that is relative to a norm, it is to the one that the weight then has. With
          `"initial"`, `"features"` and `NormScaler.of`, that norm is the target.
        - A weight that is not found, or computed from other parameters (pruned, quantized), is let go, and a warning
          names it. Layers that are new are not scaled.
        - A new parameter that no attached optimizer holds is named in a warning.

        Inside, an attached optimizer's step, `apply_norm_scaling` and the handle's calls raise an error; the context
        itself can be nested. What other handles hold of this model is plain too.

        Raises:
            ValueError: a scaled weight has another parametrization on top, or no weight is scaled any more.
        """
        return PlainModel(self._held, self._rule, self._optimizers)

    @public_call()
    def owned_by(self, optimizer: torch.optim.Optimizer) -> list[Weight]:
        """The scaled weights among the optimizer's parameters."""
        return owned_by(optimizer, self._held.current())

    def detach(self) -> None:
        """Stop following the optimizers; the model stays as it is, and its weights keep their state."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._optimizers.clear()

    @public_call()
    def capture(self) -> "NormScaler":
        """Replay steps from CUDA graphs from now on: `scaling.capture().attach(optimizer)`.

        The step is the same; its launches become one. Where the weights are not on one CUDA device, or a capture fails,
        a warning says why and steps run as they are.
        """
        self._step.capture(self._held.current())
        return self

    @public_call()
    def share(self, process_group: Any = None) -> "NormScaler":
        """Share the solver's work among data-parallel processes: `scaling.share().attach(optimizer)`.

        Without it, every process solves every weight. With it, each solves some of them, and one all-gather a step
        brings all of them what was found. Not a bit changes, of weights, buffers or metrics. All processes of the group
        call this, with equal weights, and from then on take the same steps of the same weights. What costs no more than
        to send it is not shared: Frobenius norms, rows and columns, what goes by the kernels of CUDA, and weights that
        are solved in one batch; nor are `project` and steps that are compiled or in a CUDA graph. With a group of one
        process, nothing changes.

        Args:
            process_group: a `torch.distributed.ProcessGroup`; None means the default one.

        Raises:
            ValueError: torch.distributed is not initialized, this process is not in the group, a weight is sharded, or
                the weights or the targets are not the same in all processes.
            TypeError: `process_group` is no process group.
        """
        self._step.share(self._present(), process_group)
        return self

    @public_call()
    def step(self) -> None:
        """Put every weight back on its target: for training loops without `attach`, once after each optimizer step.

        A frozen weight is not scaled.

        Raises:
            ValueError: no weight is scaled any more.
            NonFiniteWeightError: a weight holds NaN or infinity; no weight was written.
        """
        weights = self._scaled()
        refuse_unwritable(weights)
        self._step.take([weight for weight in weights if weight.parameter.requires_grad])

    @public_call()
    def project(self, model: nn.Module | None = None) -> None:
        """Solve the singular vectors anew and take one scaling step: for a copy of the model that holds an average.

        An average of weights (EMA, SWA) is not on the targets, and averaged singular vectors are not singular vectors.
        Frozen weights are scaled too. It is no step of a schedule: the targets are those that are in force.

        Examples:
            >>> ema = torch.optim.swa_utils.AveragedModel(model)
            >>> scaling.project(ema)

        Args:
            model: a copy of the scaled model, or a module that holds one; None means the handle's own model.

        Raises:
            ValueError: `model` has no scaled weight.
            NonFiniteWeightError: a weight holds NaN or infinity; no weight was written.
        """
        scaler = self if model is None else self._of(model, "load the average into a copy of the scaled model first")
        refuse_unwritable(scaler._scaled())
        scaler._solve_anew()
        scaler._step.take(scaler._scaled(), counts=False)

    @public_call()
    def retarget(self) -> None:
        """Hold, from now on, the norms that the weights have now: for other weights that were loaded.

        A schedule goes on from them, at the step that it has reached.

        Raises:
            ValueError: no weight is scaled any more.
            NonFiniteWeightError: a weight holds NaN or infinity; the targets are as they were.
        """
        self._solve_anew()
        for weight in self._scaled():
            weight.scaling.retarget_()

    def _solve_anew(self) -> None:
        weights = self._scaled()
        refuse_gathered(weights)
        refuse_non_finite(weights, "load good weights first")
        for weight in weights:
            weight.scaling.follow_(weight.parameter)
            solve_anew_(weight.scaling, weight.parameter)
            weight.scaling.mark_current(weight.parameter)

    @property
    @public_call()
    def num_iterations(self) -> dict[str, int]:
        """The solver's iterations in a step, by layer: the most that any of its matrices needed. No host sync.

        Zero where the norm is exact. Of the last step, or on an accelerator, which may not have ended that one yet, of
        the step before it; a layer that has not been reported yet is not in it.
        """
        found = self._step.found
        return {one.name: found[one.scaling].num_iterations for one in self._held.current() if one.scaling in found}

    @public_call()
    def metrics(self) -> dict[str, float]:
        """`target/<layer>`, `norm/`, `excess/`, `drift/`, `residual/` and `error/` of every weight, from the buffers.

        The excess is norm / target - 1. Below 0, the norm is under its target: the next step raises it, unless the
        constraint has an upper limit alone, as a cap, which leaves such a norm as it is. The drift is the norm that the
        optimizer had left before the last step put it back, over the target; it is kept through steps that are skipped,
        and is norm / target where no step has been taken since the scaling was applied, its targets set anew or a
        checkpoint loaded. The residual is the solver's, `||W^T u - s v|| / s` of the triple that its last iteration
        started from; the error is its own estimate of how far, relative, the first singular value was too low after it.
        Both are zero where the norm is exact. Under `"orthogonal"`, the residual is an estimate of
        `||I - W^T W / t^2||` after the step. A weight that is several matrices reports the largest of each. Under
        spectral scaling the norm is the larger of the target and the solver's second singular value, an estimate from
        below: `audit()` certifies it.

        A warning names the weights that have been changed since they were last scaled (by a write that torch counts:
        one to `.data` is not seen), and those that have left the model with their layers.

        Raises:
            NonFiniteWeightError: a weight held NaN or infinity at the last step, where that step could not say so.
        """
        weights = self._held.current()
        self._held.warn_of_lost("metrics", stacklevel=4)
        warn_of_unowned(self._held, "metrics", stacklevel=4)
        _refuse_unreadable(weights)
        solve_first_(weights, to_report=True)
        return reports.metrics(weights)

    @public_call()
    def audit(self, *, tolerance: float = 1e-3, miss: float = 1e-6, seed: int = 0) -> reports.Audit:
        """The weights' true norms in float64, beside what the solver reports: slow, and certified.

        A spectral norm is exact, by SVD, where a matrix's shorter side is at most 1024. A larger one is bounded by
        Lanczos iteration from a random start (Kuczynski & Wozniakowski, 1992, theorem 4.2).

        Args:
            tolerance: how far, relative, a norm found by Lanczos may lie below the true one.
            miss: the probability, for each weight, that it lies further below.
            seed: of the random start.

        A warning names the weights that have been changed since they were last scaled: what is reported is stale.

        Raises:
            ValueError: `tolerance` or `miss` is not between 0 and 1, or no weight is scaled any more.
            NonFiniteWeightError: a weight holds NaN or infinity.
        """
        weights = self._scaled()
        solve_first_(weights, to_report=True)
        return reports.audit(weights, tolerance, miss, seed)

    @public_call()
    def plain_state_dict(self) -> dict[str, Any]:
        """The model's state dict under its plain names, in its plain order, without the scaling's buffers.

        Raises:
            ValueError: a scaled weight has another parametrization on top.
        """
        self._held.current()
        return plain_state_dict(self._model)

    @public_call()
    def remove(self) -> nn.Module:
        """Detach from the optimizers and return the model, plain again: the same parameters under their plain names."""
        refuse_fully_sharded(self._model)
        weights = self._held.current()
        self.detach()
        for weight in weights:
            unregister(weight.module, weight.tensor)
        end_unused_checks(self._held.with_lost)
        return self._model

    @public_call("print")
    def __str__(self) -> str:
        weights = self._held.current()
        refuse_without_values(weights)
        solve_first_(weights, to_report=True)
        return reports.table(weights)

    def __repr__(self) -> str:
        try:
            weights = self._held.current()
        except Refusal:
            return f"NormScaler(of {type(self._model).__name__}, which is plain for a while)"
        constraints = "".join(f", {name}" for name in dict.fromkeys(one.scaling.constraint.name for one in weights))
        attached = ", ".join(sorted(type(optimizer).__name__ for optimizer in self._optimizers)) or "no optimizer"
        return (
            f"NormScaler({len(weights)} weights of {type(self._model).__name__}{constraints}, attached to {attached})"
        )


def _refuse_unreadable(weights: list[Weight]) -> None:
    """Refuse weights whose values are not in this process or the others that hold them."""
    refuse_without_values(weights)
    refuse_flat(weights)
