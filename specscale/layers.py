"""Which tensors of which layers are weights, and as which matrices each is read.

The caller's rules come before the built-in ones here, which are written in the same way. A new kind of layer is one
entry in `BUILT_IN`.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from specscale.views import MatrixView

Views = Mapping[str, MatrixView]


@dataclass(frozen=True)
class LayerRule:
    """The weights of one kind of layer: tensors by name, each with the matrices it is read as.

    >>> LayerRule(Dense, {"kernel": MatrixView("i o")})               # every layer of a type
    >>> LayerRule(lambda name, module: name == "router", {"weight": MatrixView("o i")})      # or by a predicate
    >>> LayerRule(Experts, lambda experts: {"w": MatrixView("k i o", len(experts.w))})       # as the layer has it
    >>> LayerRule(Router, {})                                         # no weight: such layers are not scaled

    Raises:
        TypeError: `layer` or `weights` has a wrong type.
    """

    layer: type[nn.Module] | Callable[[str, nn.Module], bool]
    """The type of the layers, subclasses included, or a predicate of a layer's name and the layer."""
    weights: Views | Callable[[nn.Module], Views]
    """The view of each weight by the tensor's name, or a function of the layer that returns them."""

    def __post_init__(self) -> None:
        if isinstance(self.layer, nn.Module) or not callable(self.layer):
            raise TypeError(
                f"LayerRule: layer must be a type of layer, or a predicate (name, module) -> bool, "
                f"found {type(self.layer).__name__}"
            )
        if not callable(self.weights):
            _check_views(self.weights)

    def matches(self, name: str, module: nn.Module) -> bool:
        if isinstance(self.layer, type):
            return isinstance(module, self.layer)
        return self.layer(name, module)

    def views(self, module: nn.Module) -> Views:
        if not callable(self.weights):
            return self.weights
        views = self.weights(module)
        _check_views(views)
        return views


def _check_views(views: Views) -> None:
    """Raise TypeError where `views` does not map tensors' names to views."""
    if not isinstance(views, Mapping) or not all(isinstance(view, MatrixView) for view in views.values()):
        raise TypeError(f"LayerRule: weights must map tensors' names to MatrixView objects, found {views!r}")


def _grouped(axes: str) -> Callable[[nn.Module], Views]:
    return lambda module: {"weight": MatrixView(axes, module.groups)}  # type: ignore[arg-type]


def _gates(module: nn.Module) -> Views:
    """One matrix per gate of a recurrent layer or cell; an LSTM's projection is one matrix."""
    hidden_size: int = module.hidden_size  # type: ignore[assignment]
    layers = range(getattr(module, "num_layers", 1))
    ends = ["", *(f"_l{layer}{way}" for layer in layers for way in ("", "_reverse"))]
    views = {}
    for name in (f"weight_{kind}{end}" for end in ends for kind in ("ih", "hh", "hr")):
        if hasattr(module, name):
            count = 1 if "_hr" in name else len(getattr(module, name)) // hidden_size
            views[name] = MatrixView("(k o) i", count)
    return views


def _is_fused(ending: str, count: int) -> Callable[[str, nn.Module], bool]:
    """Whether a linear layer holds several projections, by the name and shape that it has in most transformers."""
    return lambda name, module: (
        isinstance(module, nn.Linear)
        and re.search(f"{ending}$", name.lower()) is not None
        and module.out_features == count * module.in_features
    )


def _is_transposed_linear(name: str, module: nn.Module) -> bool:
    """Whether it is the `Conv1D` of transformers, GPT-2's linear layer, where that package has been imported."""
    return isinstance(module, getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ()))


def _is_fused_transposed_linear(name: str, module: nn.Module) -> bool:
    return _is_transposed_linear(name, module) and name.endswith("c_attn") and module.nf == 3 * module.nx  # type: ignore[operator]


def _is_experts(name: str, module: nn.Module) -> bool:
    """Whether it holds the stacked experts of a mixture: transformers marks all such classes by these attributes."""
    return hasattr(module, "is_transposed") and hasattr(module, "is_concatenated")


def _experts(module: nn.Module) -> Views:
    axes = "k i o" if module.is_transposed else "k o i"
    names = (name for name in ("gate_up_proj", "gate_proj", "up_proj", "down_proj") if hasattr(module, name))
    return {name: MatrixView(axes, len(getattr(module, name))) for name in names}


BUILT_IN = [
    LayerRule(_is_fused("qkv", 3), {"weight": MatrixView("(k o) i", 3)}),
    LayerRule(_is_fused("(?<!q)kv", 2), {"weight": MatrixView("(k o) i", 2)}),
    LayerRule(nn.Linear, {"weight": MatrixView("o i")}),
    LayerRule(nn.Conv1d, _grouped("(k o) i w")),
    LayerRule(nn.Conv2d, _grouped("(k o) i h w")),
    LayerRule(nn.Conv3d, _grouped("(k o) i d h w")),
    LayerRule(nn.ConvTranspose1d, _grouped("(k i) o w")),
    LayerRule(nn.ConvTranspose2d, _grouped("(k i) o h w")),
    LayerRule(nn.ConvTranspose3d, _grouped("(k i) o d h w")),
    LayerRule(
        nn.MultiheadAttention,
        {
            "in_proj_weight": MatrixView("(k o) i", 3),
            "q_proj_weight": MatrixView("o i"),
            "k_proj_weight": MatrixView("o i"),
            "v_proj_weight": MatrixView("o i"),
        },
    ),
    LayerRule(nn.RNNBase, _gates),
    LayerRule(nn.RNNCellBase, _gates),
    LayerRule(_is_fused_transposed_linear, {"weight": MatrixView("i (k o)", 3)}),
    LayerRule(_is_transposed_linear, {"weight": MatrixView("i o")}),
    LayerRule(_is_experts, _experts),
]
"""The rules for torch's layers, and for those of transformers that are not torch's."""


def rule_for(name: str, module: nn.Module, rules: Iterable[LayerRule] = ()) -> LayerRule | None:
    """The first rule that matches a layer: of `rules`, then of the built-in ones."""
    return next((rule for rule in (*rules, *BUILT_IN) if rule.matches(name, module)), None)
