"""What a scaled weight remembers: a parametrization whose forward is the identity and whose buffers are the state."""

import weakref
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from specscale.algebra import numerical
from specscale.matrices import MatrixView
from specscale.norms import Norm

MEASURED = ("norm", "residual", "error")
"""What a measurement leaves in the buffers, beside the solver's state."""


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class NormScaling(nn.Module):
    """The state of one scaled weight: its targets, its norms and what the solver goes on from, all buffers.

    The weight itself is always on its target, so that forward has nothing to do; `restore_` runs after the step.

    Buffers: `target (k,)`, a zero where a matrix is left alone; `norm (k,)`, the norm that is held; `residual (k,)`
    and `error (k,)`, how far the solver was from it; `order`, which norm it is; the solver's own.
    """

    target: Tensor
    norm: Tensor
    residual: Tensor
    error: Tensor
    order: Tensor

    @numerical
    def __init__(self, kind: Norm, view: MatrixView, name: str, plain_order: tuple[str, ...], weight: Tensor) -> None:
        super().__init__()
        self.kind = kind
        self.view = view
        self.name = name
        self.plain_order = plain_order
        """The names of the module's own parameters as they were before registering moved this one to the end."""
        self._load_hooks: tuple[RemovableHandle, ...] = ()
        self._holds_loaded_weight = False
        self._seen: tuple[weakref.ref[Tensor], int] | None = None
        matrices = self.matrices(weight)
        measurement = kind.measure([matrices], kind.cold(matrices, self.seeds(weight)), to_convergence=True)
        self._solver_buffers = tuple(measurement.state)
        for buffer, value in measurement.state.items():
            self.register_buffer(buffer, value)
        for name in MEASURED:
            self.register_buffer(name, getattr(measurement, name).clone())
        self.register_buffer("target", measurement.norm.clone())
        self.register_buffer("order", torch.tensor(kind.order, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def matrices(self, weight: Tensor) -> Tensor:
        """The weight as `(k, m, n)`, float32 or wider, for reading."""
        return wide(self.view.matrices(weight.detach()))

    def seeds(self, weight: Tensor, salt: int = 0) -> Tensor:
        """`(k,)`, int64: what seeds the random numbers of each matrix; a function of the layer's name."""
        return torch.arange(self.view.count, device=weight.device) + (zlib.crc32(self.name.encode()) + salt << 20)

    def excess(self, norm: Tensor) -> Tensor:
        """`(k,)`, float64: norm / target - 1; minus infinity, never the worst, for a matrix that is left alone."""
        target = self.target.double()
        return torch.where(target > 0, norm.double() / target - 1, -torch.inf)

    def solver_state(self) -> dict[str, Tensor]:
        """The solver's buffers, by name."""
        return {name: self.get_buffer(name) for name in self._solver_buffers}

    def see(self, weight: Tensor | None) -> None:
        """Remember that the buffers tell of the weight as it is now; with None, that nobody knows."""
        self._seen = None if weight is None else (weakref.ref(weight), weight._version)

    def is_behind(self, weight: Tensor) -> bool:
        """Whether the weight is known to have been written to since the buffers were."""
        return self._seen is not None and self._seen[0]() is weight and self._seen[1] != weight._version

    @numerical
    def solve_cold_(self, weight: Tensor) -> None:
        """Forget the solver's state and measure the weight anew, as after loading other weights."""
        fresh = NormScaling(self.kind, self.view, self.name, self.plain_order, weight)
        for name in (*MEASURED, *self._solver_buffers):
            self.get_buffer(name).copy_(fresh.get_buffer(name))
        self.see(weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.half()` and its like must not round targets and singular vectors: follow the device, not the dtype.
        self.see(None)
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self.get_buffer(name)
            if after.is_floating_point() and after.dtype.itemsize < 4:
                self.register_buffer(name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        count = f"{self.view.count} matrices, " if self.view.count > 1 else ""
        return f"{self.kind.name}, {count}target={float(self.target.max()):.4g}"


def scaling_of(module: nn.Module, tensor: str) -> NormScaling | None:
    """The scaling of `module`'s tensor, or None where it has none."""
    if not parametrize.is_parametrized(module, tensor):
        return None
    found = [p for p in module.parametrizations[tensor] if isinstance(p, NormScaling)]  # type: ignore[union-attr, index]
    return found[0] if found else None


def original(module: nn.Module, tensor: str) -> nn.Parameter:
    """The parameter behind a scaled tensor."""
    return module.parametrizations[tensor].original  # type: ignore[union-attr, index, return-value]


def on_top(module: nn.Module, tensor: str) -> list[nn.Module]:
    """The other parametrizations of a scaled tensor; what they make of the parameter is not what is scaled."""
    return [p for p in module.parametrizations[tensor] if not isinstance(p, NormScaling)]  # type: ignore[union-attr, index]


def scalings(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, NormScaling]]:
    """Every scaled weight below `module`: module name, module, tensor name and scaling."""
    for name, child in module.named_modules():
        for tensor, scaling in _own_scalings(child):
            yield name, child, tensor, scaling


def _own_scalings(module: nn.Module) -> Iterator[tuple[str, NormScaling]]:
    if parametrize.is_parametrized(module):
        for tensor in module.parametrizations:  # type: ignore[union-attr]
            if (scaling := scaling_of(module, tensor)) is not None:
                yield tensor, scaling


def places(module: nn.Module, tensor: str, scaling: NormScaling, prefix: str) -> tuple[str, str]:
    """Where a state dict holds a scaled weight, and what the names of its scaling's buffers begin with."""
    home = f"{prefix}parametrizations.{tensor}."
    index = list(module.parametrizations[tensor]).index(scaling)  # type: ignore[union-attr, index]
    return f"{home}original", f"{home}{index}."


def register(module: nn.Module, tensor: str, scaling: NormScaling) -> None:
    """Hang the scaling on the module; a plain checkpoint still loads into it."""
    parametrize.register_parametrization(module, tensor, scaling, unsafe=True)
    scaling.see(original(module, tensor))
    scaling._load_hooks = (
        module.register_load_state_dict_pre_hook(_complete),
        module.register_load_state_dict_post_hook(_solve_missing),
    )


def unregister(module: nn.Module, tensor: str) -> None:
    """Take the scaling off: the same parameter, under its plain name and in its plain place.

    Where another parametrization has been registered on top, that one stays.
    """
    scaling = scaling_of(module, tensor)
    assert scaling is not None
    for hook in scaling._load_hooks:
        hook.remove()
    if on_top(module, tensor):
        chain = module.parametrizations[tensor]  # type: ignore[union-attr, index]
        del chain[list(chain).index(scaling)]  # type: ignore[union-attr]
        return
    # A deep copy shares the class that parametrize made for the module, and would lose the tensor with it.
    kind = type(module)
    module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
    for name in scaling.plain_order:
        if name in module._parameters:
            parameter = module._parameters[name]
            delattr(module, name)
            module.register_parameter(name, parameter)


def _complete(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give a checkpoint what it lacks: a plain one the weight's name, and any the state that this solver goes on from.

    Raises:
        ValueError: its targets are of another norm.
    """
    for tensor, scaling in _own_scalings(module):
        # torch cannot swap a tensor that anyone refers to weakly.
        scaling.see(None)
        weight, home = places(module, tensor, scaling, prefix)
        if prefix + tensor in state_dict:
            state_dict[weight] = state_dict.pop(prefix + tensor)
        if weight not in state_dict:
            continue
        own = dict(scaling.named_buffers())
        held = {key.removeprefix(home): value for key, value in state_dict.items() if key.startswith(home)}
        if int(held.get("order", scaling.order)) != int(scaling.order):
            raise ValueError(
                f"load_state_dict: the checkpoint's target of {scaling.name!r} is not of the {scaling.kind.name} norm; "
                "apply_norm_scaling with the other norm before loading, or load a plain state dict"
            )
        solved = {name: buffer.shape for name, buffer in own.items() if name != "target"}
        if solved != {name: value.shape for name, value in held.items() if name != "target"}:
            for name in held.keys() - {"target"}:
                del state_dict[home + name]
            for name, buffer in own.items():
                state_dict.setdefault(home + name, buffer)
            scaling._holds_loaded_weight = True


def _solve_missing(module: nn.Module, _: Any) -> None:
    for tensor, scaling in _own_scalings(module):
        weight = original(module, tensor)
        scaling.see(weight)
        if scaling._holds_loaded_weight:
            scaling._holds_loaded_weight = False
            scaling.solve_cold_(weight)
