"""What a scaled model's state dict is without its scaling."""

from collections import defaultdict
from typing import Any

from torch import nn

from specscale.parametrization import NormScaling, on_top, places, scalings


def plain_state_dict(model: nn.Module) -> dict[str, Any]:
    """A scaled model's state dict as the plain model's: names, order and content.

    Raises:
        ValueError: a scaled weight has another parametrization on top.
    """
    scaled: dict[nn.Module, list[tuple[str, NormScaling]]] = defaultdict(list)
    for name, module, tensor, scaling in scalings(model):
        if others := on_top(module, tensor):
            kinds = ", ".join(type(one).__name__ for one in others)
            raise ValueError(
                f"plain_state_dict: {tensor!r} of {name!r} has a parametrization on top of its scaling, {kinds}; "
                "remove that first"
            )
        scaled[module].append((tensor, scaling))

    # A hook knows every name that a module has, and comes before those of modules around it.
    def rename(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        here = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
        for tensor, scaling in scaled[module]:
            weight, home = places(module, tensor, scaling, prefix)
            here = {key: value for key, value in here.items() if not key.startswith(home)}
            if weight in here:
                here[prefix + tensor] = here.pop(weight)
        # A scaled weight has gone to the end: bring it back into its module's place.
        own = [prefix + name for _, scaling in scaled[module] for name in scaling.plain_order]
        state.update({key: here.pop(key) for key in dict.fromkeys(own) if key in here})
        state.update(here)
        metadata = getattr(state, "_metadata", {})
        for key in [key for key in metadata if key.startswith(f"{prefix}parametrizations")]:
            del metadata[key]

    hooks = [module.register_state_dict_post_hook(rename) for module in scaled]
    try:
        return model.state_dict()
    finally:
        for hook in hooks:
            hook.remove()
