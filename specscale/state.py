"""What a scaled weight carries: a parametrization whose forward is the identity and whose buffers are all the state."""

import copy
import weakref
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from einops import EinopsError
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from specscale.constraints import Constraint
from specscale.errors import Refusal
from specscale.linalg import at_least_float32, in_float64
from specscale.schedules import AnySchedule, Schedule, own_factor
from specscale.shards import ShardedMatrices, is_sharded, layout_of, local, num_shards_of, placements_of, whole
from specscale.views import MatrixView

MEASURED = ("norm", "norm_before", "residual", "error")
"""The buffers that a measurement fills, beside the solver's."""

SCHEDULED = ("base_target", "num_steps")
"""The buffers of a weight that has a schedule."""
NOT_SAVED = frozenset({"norm_before"})
"""The buffers that are in no state dict: until the next step, they tell of the last one."""

PLAIN_LAYERS: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""The layers that are plain for a while, by `NormScaler.plain()`. A copy of such a layer is plain for good."""

REGISTERED: "weakref.WeakSet[NormScaling]" = weakref.WeakSet()
"""The scalings that are on a layer, of all models, with those that `NormScaler.plain()` has taken off for a while."""


class NormScaling(nn.Module):
    """The state of one scaled weight: its targets, its norms and what the solver continues from, all buffers.

    The step writes the weight itself, so that forward has nothing to do.

    What is held survives the meta device: while the weight is there, its buffers are on the CPU. The others hold no
    numbers then, and none that count (`norm` is NaN) until the weight is solved: `is_unsolved`.

    Buffers, one number for each of the weight's `k` matrices, float32 or wider:

    - `target_<constraint>`: the target norm. A checkpoint names its constraint by this key.
    - `skip_mask`: 1 for a matrix that is not scaled, 0 for the others.
    - `norm`: the norm after the last step.
    - `norm_before`: the norm before it, as the optimizer had left it; in no state dict. The same as `norm` where none
      has been taken since the weight was measured anew or loaded.
    - `residual`, `error`: the solver's residual and its estimate of its relative error.

    With a schedule, there are two more, and `target_<constraint>` is what is in force:

    - `base_target`: the target before its factor.
    - `num_steps`: the steps that the weight has taken.

    The solver adds its state: see `init_state` of `Block`, `Power` and `SVD`.
    """

    norm: Tensor
    norm_before: Tensor
    residual: Tensor
    error: Tensor
    skip_mask: Tensor
    base_target: Tensor
    num_steps: Tensor

    def __init__(
        self,
        constraint: Constraint,
        view: MatrixView,
        weight: Tensor,
        *,
        seed_name: str,
        is_only: bool,
        parameter_order: tuple[str, ...],
        schedule: AnySchedule | None = None,
    ) -> None:
        super().__init__()
        self.constraint = constraint
        self.schedule = schedule
        self.seed_name = seed_name
        """The weight's name when it was put under scaling, which seeds the random numbers."""
        self.is_only = is_only
        """Whether it is its layer's only weight, so that its name is the layer's."""
        self.parameter_order = parameter_order
        """The layer's parameters in their order before registering moved this one to the end."""
        self.load_hooks: tuple[RemovableHandle, ...] = ()
        self.load_check: object = None
        """What `check_before_loading` has put on the model: one for all weights of a call."""
        self.needs_solve = False
        """While a checkpoint is loaded: whether it has brought the weight without a state for this solver."""
        self.is_unsolved = True
        """Whether the weight is to be solved before its next step. The values of one that was on the meta device come
        without a call of ours, and are solved when something is asked of them: the buffers tell nothing of it, and
        `norm` is NaN. A checkpoint of a weight that was sharded in another way brings the norms without the state."""
        self.placements: tuple[Any, ...] = ()
        """How the weight was sharded when it was last looked at: torch's placements; empty where it was whole."""
        self.num_shards = 1
        """Over how many processes it was split then."""
        self._owner: weakref.ref[nn.Module] | None = None
        """torch's list of the tensor's parametrizations; None in a copy, and where it is not registered."""
        self._recorded: tuple[int, int] | None = None
        """The id and the version of the weight that the buffers describe."""
        self.reset_(view, weight)

    def reset_(self, view: MatrixView, weight: Tensor) -> None:
        """Make the buffers, of zeros, for a weight as it is now: its shape, dtype and device may be others."""
        self.view = view
        for name in list(self._buffers):
            delattr(self, name)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for buffer in (*MEASURED, *self.held_buffers):
            is_kept = weight.is_meta and buffer in self.held_buffers
            zeros = torch.zeros(view.count, dtype=dtype, device="cpu" if is_kept else weight.device)
            self.register_buffer(buffer, zeros, persistent=buffer not in NOT_SAVED)
        # The state of no matrices has the shapes and costs nothing; the first solve fills the buffers.
        state = self.init_solver_state(weight, count=0)
        self._solver_buffers = tuple(state)
        for buffer, value in state.items():
            self.register_buffer(buffer, value.new_zeros(view.count, *value.shape[1:]))
        self.is_unsolved = True

    def follow_(self, weight: Tensor) -> bool:
        """Follow a weight that has left the meta device by itself, or that has been sharded; what is held stays held.

        The solver's block of a sharded weight may lie on another side than it did: the weight is then solved anew.
        Returns whether the buffers are others now.
        """
        self.placements, self.num_shards = placements_of(weight), num_shards_of(weight)
        if self.norm.device != weight.device or not self._is_on_its_side(weight):
            held = {name: self.get_buffer(name) for name in self.held_buffers}
            self.reset_(self.view, weight)
            for name, value in held.items():
                self.get_buffer(name).copy_(value)
            for name in MEASURED:
                self.get_buffer(name).fill_(torch.nan)
            return True
        return False

    def follow_sharding_(self, weight: Tensor) -> bool:
        """Follow a weight that has been sharded since it was last looked at; returns what `follow_` does."""
        is_new = is_sharded(weight) and placements_of(weight) != self.placements and not self.is_gathered(weight)
        return is_new and self.follow_(weight)

    def _is_on_its_side(self, weight: Tensor) -> bool:
        """Whether the solver's state is the one that it needs for a sharded weight."""
        if not is_sharded(weight):
            return True
        needed = self.init_solver_state(weight, count=0)
        own = self.solver_state()
        return {n: one.shape[1:] for n, one in own.items()} == {n: one.shape[1:] for n, one in needed.items()}

    def is_gathered(self, weight: Tensor) -> bool:
        """Whether the weight is sharded, and whole or less sharded for a forward pass now: a write would be lost."""
        # With `reshard_after_forward=2`, say, it is in fewer shards, of a mesh of more dimensions.
        return len(placements_of(weight)) < len(self.placements) or num_shards_of(weight) < self.num_shards

    @property
    def target_name(self) -> str:
        return f"target_{self.constraint.name}"

    @property
    def held_buffers(self) -> tuple[str, ...]:
        """The names of the buffers that say what is held: a solver does not know them."""
        return (self.target_name, "skip_mask", *(() if self.schedule is None else SCHEDULED))

    @property
    def target(self) -> Tensor:
        """`(k,)`: the target norm of each matrix."""
        return getattr(self, self.target_name)  # type: ignore[no-any-return]

    def forward(self, weight: Tensor) -> Tensor:
        return weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def operand(self, weight: Tensor, *, is_known: bool = True) -> Tensor | ShardedMatrices:
        """The weight as `(k, m, n)`, float32 or wider, for reading; sharded, what this process holds of it.

        Where its norm `is_known` from the last step, no process asks the others for its scale.
        """
        self.matrix_shape(weight)
        layout = layout_of(weight, self.view)
        if layout is None:
            return at_least_float32(self.view.matrices(local(weight)))
        return ShardedMatrices(layout, local(weight)).with_scale(self.norm if is_known else None)

    def matrices(self, weight: Tensor) -> Tensor:
        """The weight as `(k, m, n)`, float32 or wider, whole in every process; if it is sharded, all must call this."""
        self.matrix_shape(weight)
        return at_least_float32(self.view.matrices(whole(weight.detach())))

    def matrix_shape(self, weight: Tensor) -> tuple[int, int]:
        """`(m, n)` of one of its matrices.

        Raises:
            Refusal: the weight has another shape now.
        """
        try:
            return self.view.matrix_shape(weight)
        except EinopsError:
            raise Refusal(
                f"the weight of {self.seed_name!r} has the shape {tuple(weight.shape)} now, which {self.view} does not "
                "fit; change shapes inside `with scaling.plain():`. FullyShardedDataParallel, which flattens weights, "
                "is not supported; fully_shard is"
            ) from None

    def seeds(self, device: torch.device, salt: int = 0) -> Tensor:
        """`(k,)`, int64: what seeds the random numbers of each matrix, a function of the weight's name."""
        return torch.arange(self.view.count, device=device) + ((zlib.crc32(self.seed_name.encode()) + salt) << 20)

    def excess(self, norm: Tensor) -> Tensor:
        """`(k,)`, float64: `norm / target - 1`; minus infinity, which is never the largest, where `skip_mask` is 1."""
        excess = in_float64(norm) / in_float64(self.target) - 1
        return torch.where(self.skip_mask.to(excess) > 0, -torch.inf, excess)

    def drift(self) -> Tensor:
        """`(k,)`, float64: `norm_before / target`; minus infinity where `skip_mask` is 1, as in `excess`."""
        return self.excess(self.norm_before) + 1

    def forget_step_(self) -> None:
        """Say of no step what the norm was before it: the weight has been loaded with its norm."""
        if self.norm_before.device == self.norm.device:
            self.norm_before.copy_(self.norm)
        else:
            # What is loaded by assignment takes the buffers that are saved to another device.
            self.register_buffer("norm_before", self.norm.clone(), persistent=False)

    def take_as_loaded_(self, weight: Tensor | None, *, is_unsolved: bool = False) -> None:
        """Say that the buffers describe this weight, since both have been loaded; where their norms are known.

        None where the weight is not at hand.
        """
        if weight is not None:
            self.mark_current(weight)
        # Not finite, it has not been solved yet, be it of this model or of the one that was saved.
        self.is_unsolved = is_unsolved or self.norm.is_meta or bool(self.norm.isnan().any())
        self.forget_step_()

    @property
    def owned(self) -> nn.Parameter | None:
        """The weight, where this is registered on one; None in a copy."""
        chain = None if self._owner is None else self._owner()
        return None if chain is None else chain._parameters.get("original")

    def solver_state(self) -> dict[str, Tensor]:
        """The solver's buffers, by name."""
        return {name: self.get_buffer(name) for name in self._solver_buffers}

    def init_solver_state(self, weight: Tensor, count: int | None = None) -> dict[str, Tensor]:
        """The solver's state before the first solve of such a weight, of its first `count` matrices or of all."""
        key, dtype = self.seeds(weight.device)[:count], torch.promote_types(weight.dtype, torch.float32)
        layout = layout_of(weight, self.view)
        side = None if layout is None else layout.other_side
        return self.constraint.norm.init_state(key, self.matrix_shape(weight), dtype, side)

    def set_target_(self, numbers: list[float], *, is_base: bool) -> None:
        """Hold these norms, one for each matrix; where it is 0, the matrix has no direction and is skipped.

        Under a schedule they are the base targets, or the targets that are in force now.
        """
        # The default device is the user's.
        self._hold_(torch.tensor(numbers, dtype=self.target.dtype, device="cpu").to(self.target.device), is_base)

    def retarget_(self) -> None:
        """Hold the norms that were measured last; a matrix of zeros has no direction and is skipped."""
        self._hold_(self.norm, is_base=False)
        self.forget_step_()

    def _hold_(self, target: Tensor, is_base: bool) -> None:
        self.skip_mask.copy_(target == 0)
        if self.schedule is None:
            self.target.copy_(target)
        else:
            factors = self.factors(self.num_steps)
            self.base_target.copy_(target if is_base else target / factors)
            self.target.copy_(target * factors if is_base else target)

    def factors(self, num_steps: Tensor) -> Tensor:
        """The schedule's factors `(k,)` after so many steps `(k,)`; a caller's function makes the host wait."""
        if isinstance(self.schedule, Schedule):
            return self.schedule.factors(num_steps)
        assert self.schedule is not None
        return torch.full_like(num_steps, own_factor(self.schedule, int(num_steps[0])))

    def mark_current(self, weight: Tensor | None) -> None:
        """Record the weight's version as the one that the buffers describe; None clears it."""
        version = None if weight is None else version_of(weight)
        recorded = None if weight is None or version is None else (id(weight), version)
        # The module's own way takes ten times as long, for each weight at each step.
        self.__dict__["_recorded"] = recorded

    def is_registered_on(self, chain: nn.Module) -> None:
        """Remember torch's list of the tensor's parametrizations that it is in."""
        self._owner = weakref.ref(chain)

    @property
    def recorded_id(self) -> int | None:
        """The id of the weight that `mark_current` has recorded, None once that weight is gone."""
        if self._recorded is None or self._owner is None:
            # In a copy, an id that has been used again cannot be told from its own.
            return None if self._recorded is None else self._recorded[0]
        return self._recorded[0] if id(self.owned) == self._recorded[0] else None

    def is_stale(self, weight: Tensor) -> bool:
        """Whether the weight is known to have been written to since `mark_current`."""
        recorded = self._recorded
        return recorded is not None and recorded[0] == id(weight) and recorded[1] != version_of(weight)

    def keep_current(self, weight: Tensor, version: int | None) -> None:
        """Mark the weight as current if it was so at this version: what was written since were the same values."""
        if self._recorded == (id(weight), version):
            self.mark_current(weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # The copy's weight is another one: without this, a copy that is trained without scaling would not be told of.
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        # A function may hold anything.
        memo[id(self.schedule)] = self.schedule
        copied.__dict__ = copy.deepcopy(
            {k: v for k, v in self.__dict__.items() if k not in ("_recorded", "_owner")}, memo
        )
        copied._owner = None
        # What has been written since is not known here: such a copy counts as current.
        copied.mark_current(None if self._recorded is None else memo.get(self._recorded[0]))
        if self in REGISTERED:
            REGISTERED.add(copied)
        return copied

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.half()` and its like must not round targets and singular vectors: follow the device, not the dtype.
        if torch.__future__.get_swap_module_params_on_conversion():
            # The parameter stays the same object, and gets another version.
            self.mark_current(None)
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self.get_buffer(name)
            dtype = before.dtype if after.dtype.itemsize < 4 else after.dtype
            if name in self.held_buffers:
                # `to_empty` gives memory without values, and the meta device takes them.
                self.register_buffer(name, before.to("cpu" if after.is_meta else after.device, dtype))
            elif dtype != after.dtype:
                self.register_buffer(name, before.to(after.device), persistent=name not in NOT_SAVED)
            elif before.is_meta and not after.is_meta:
                after.fill_(torch.nan if name in MEASURED else 0)
        if self.norm.is_meta:
            self.is_unsolved = True
        return self

    def extra_repr(self) -> str:
        count = f"{self.view.count} matrices, " if self.view.count > 1 else ""
        without = ", without values" if self.norm.is_meta else ""
        return f"{self.constraint.name}, {count}target={float(self.target.max()):.4g}{without}"


def version_of(tensor: Tensor) -> int | None:
    """How often the tensor has been written to; None for one made under `torch.inference_mode()`."""
    if tensor.is_inference():
        return None
    # An optimizer writes a DTensor, and the step what it holds of it.
    return tensor._version + (tensor._local_tensor._version if is_sharded(tensor) else 0)  # type: ignore[attr-defined]


def scalings_of(module: nn.Module) -> Iterator[tuple[str, NormScaling]]:
    """The scaled tensors of a layer itself: the tensor's name and its scaling."""
    if parametrize.is_parametrized(module):
        for tensor in module.parametrizations:  # type: ignore[union-attr]
            if (scaling := scaling_of(module, tensor)) is not None:
                yield tensor, scaling


def scaling_of(module: nn.Module, tensor: str) -> NormScaling | None:
    """The scaling of a layer's tensor, or None where it has none."""
    parametrizations = parametrizations_of(module, tensor)
    if parametrizations is None:
        return None
    # A loop takes half the time of a generator.
    for one in parametrizations._modules.values():
        if isinstance(one, NormScaling):
            return one
    return None


def others_on_top(module: nn.Module, tensor: str) -> list[nn.Module]:
    """The parametrizations that others have registered on top; the scaling holds the parameter behind them."""
    return [p for p in module.parametrizations[tensor] if not isinstance(p, NormScaling)]  # type: ignore[union-attr, index]


def original(module: nn.Module, tensor: str) -> nn.Parameter:
    """The parameter behind a parametrized tensor; of a layer that is plain for a while, the tensor itself."""
    chain = parametrizations_of(module, tensor)
    if chain is None:
        return getattr(module, tensor)  # type: ignore[no-any-return]
    parameter = chain._parameters.get("original")
    return chain.original if parameter is None else parameter  # type: ignore[return-value]


def parametrizations_of(module: nn.Module, tensor: str) -> nn.Module | None:
    """torch's list of a tensor's parametrizations; None where it has none.

    Looked up as a module's attribute, it takes ten times as long, several times for each weight at each step.
    """
    own = module._modules.get("parametrizations")
    return own._modules.get(tensor) if isinstance(own, nn.ModuleDict) else None
