"""How a scaling gets onto a layer and off it."""

from typing import Any, NoReturn

from torch import nn
from torch.nn.utils import parametrize

from specscale.state import REGISTERED, NormScaling, others_on_top, parametrizations_of, scaling_of, scalings_of
from specscale.state_dicts import (
    complete_state_dict,
    follow_sharding,
    refuse_pickling,
    solve_what_was_missing,
    take_as_loaded,
)


def register(module: nn.Module, tensor: str, scaling: NormScaling) -> None:
    """Put a layer's tensor under a scaling; plain checkpoints still load into the layer."""
    parametrize.register_parametrization(module, tensor, scaling, unsafe=True)
    _shorten_access(module, tensor)
    _explain_refusals(module, tensor)
    REGISTERED.add(scaling)
    scaling.is_registered_on(module.parametrizations[tensor])  # type: ignore[union-attr, index, arg-type]
    scaling.load_hooks = (
        module.register_state_dict_pre_hook(follow_sharding),
        module.register_load_state_dict_pre_hook(complete_state_dict),
        module.register_load_state_dict_post_hook(solve_what_was_missing),
        scaling.register_load_state_dict_post_hook(take_as_loaded),
    )


def _shorten_access(module: nn.Module, tensor: str) -> None:
    """Let the layer find the weight without calling its parametrizations, where a scaling is the only one.

    A scaling returns the parameter as it is, and the two calls of modules on the way take the host 15 microseconds for
    every layer in every forward pass.
    """
    kind = type(module)
    computed: property = vars(kind)[tensor]

    def weight(layer: nn.Module) -> Any:
        chain = parametrizations_of(layer, tensor)
        if chain is not None and len(chain._modules) == 1 and isinstance(chain._modules["0"], NormScaling):
            return chain._parameters["original"]
        return computed.fget(layer)  # type: ignore[misc]

    def assign(layer: nn.Module, value: Any) -> None:
        # A plain layer refuses it too. torch's parametrizations write the values into the parameter, and code that puts
        # a tensor in its place for a call (functional_call) would lose the weight.
        if not others_on_top(layer, tensor):
            raise TypeError(
                f"cannot assign a {type(value).__name__} to {tensor!r}, which is under norm scaling: write its values "
                "in place, or assign a parameter inside `with scaling.plain():`"
            )
        computed.fset(layer, value)  # type: ignore[misc]

    setattr(kind, tensor, property(weight, assign))


def _explain_refusals(module: nn.Module, tensor: str) -> None:
    """Let the layer say what to do where torch refuses: to assign or delete a scaled weight, and to be pickled."""
    kind: Any = type(module)
    plain = kind.__bases__[0]
    torch_getstate = kind.__getstate__

    def register_parameter(layer: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if name.startswith("parametrizations."):
            # Its partition functions register every parameter anew, by its name.
            raise KeyError(
                f"parameter {name!r} is under norm scaling, and parallelize_module would register it anew; the order "
                "is parallelize_module, apply_norm_scaling, fully_shard"
            )
        if scaling_of(layer, name) is not None:
            raise KeyError(
                f"attribute {name!r} already exists: it is under norm scaling. Assign it inside "
                "`with scaling.plain():`, after which the new parameter is scaled"
            )
        plain.register_parameter(layer, name, parameter)

    def delete(layer: nn.Module) -> NoReturn:
        raise AttributeError(
            f"attribute {tensor!r} is under norm scaling and cannot be deleted. Delete it inside "
            "`with scaling.plain():`, or exclude the layer from scaling if its own code does so"
        )

    def getstate(layer: nn.Module) -> Any:
        if any(True for _ in scalings_of(layer)):
            refuse_pickling()
        return torch_getstate(layer)

    kind.register_parameter = register_parameter
    kind.__getstate__ = getstate
    setattr(kind, tensor, vars(kind)[tensor].deleter(delete))


def unregister(module: nn.Module, tensor: str) -> None:
    """Take the scaling off: the same parameter, under its plain name and in its plain place.

    Another parametrization that has been registered on top stays.
    """
    scaling = scaling_of(module, tensor)
    assert scaling is not None
    REGISTERED.discard(scaling)
    for hook in scaling.load_hooks:
        hook.remove()
    if others_on_top(module, tensor):
        chain = module.parametrizations[tensor]  # type: ignore[union-attr, index]
        del chain[list(chain).index(scaling)]  # type: ignore[union-attr]
        return
    # A deep copy shares the class that parametrize made for the layer, and would lose the tensor with it.
    kind = type(module)
    module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
    for name in scaling.parameter_order:
        if name in module._parameters:
            parameter = module._parameters[name]
            delattr(module, name)
            module.register_parameter(name, parameter)
