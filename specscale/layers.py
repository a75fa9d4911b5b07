"""Which tensors of which layers are weights, and as which matrices each is read.

The caller's rules come before the built-in ones here, which are written in the same way. A new kind of layer is one
entry in `BUILT_IN`.
"""

import math
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

    Examples:
        Every layer of a type, those that a predicate finds, and views that are made from the layer:

        >>> LayerRule(Dense, {"kernel": MatrixView("i o")})
        >>> LayerRule(lambda name, module: name == "router", {"w": MatrixView("o i")})
        >>> LayerRule(Experts, lambda layer: {"w": MatrixView("k i o", len(layer.w))})

        The layer `qkv` in every layer of a type, and layers that are not scaled:

        >>> LayerRule(Attention, {"qkv.weight": MatrixView("(k o) i", 3)})
        >>> LayerRule(Router, {})

    Raises:
        TypeError: `layer` or `weights` has a wrong type.
    """

    layer: type[nn.Module] | Callable[[str, nn.Module], bool]
    """The type of the layers, subclasses included, or a predicate of a layer's name and the layer."""
    weights: Views | Callable[[nn.Module], Views]
    """The view of each weight by the tensor's name, or a function of the layer that returns them.

    A tensor of a layer within this one is named by its path. It is then a weight of that layer all the same.
    """

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


def module_at(model: nn.Module, name: str) -> nn.Module | None:
    """The submodule of that name, if there is one."""
    module: nn.Module | None = model
    for part in name.split(".") if name else ():
        if module is None:
            return None
        module = module._modules.get(part)
    return module


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


def _is_imported(package: str, kind: str) -> Callable[[str, nn.Module], bool]:
    """Whether it is a layer of that kind, of a package that need not have been imported."""
    return lambda name, module: isinstance(module, getattr(sys.modules.get(package), kind, ()))


_is_transposed_linear = _is_imported("transformers.pytorch_utils", "Conv1D")
"""Whether it is GPT-2's linear layer."""


def _is_fused_transposed_linear(name: str, module: nn.Module) -> bool:
    return _is_transposed_linear(name, module) and name.endswith("c_attn") and module.nf == 3 * module.nx  # type: ignore[operator]


def _is_experts(name: str, module: nn.Module) -> bool:
    """Whether it holds the stacked experts of a mixture: transformers marks all such classes by these attributes."""
    return hasattr(module, "is_transposed") and hasattr(module, "is_concatenated")


def _experts(module: nn.Module) -> Views:
    axes = "k i o" if module.is_transposed else "k o i"
    names = (name for name in ("gate_up_proj", "gate_proj", "up_proj", "down_proj") if hasattr(module, name))
    return {name: MatrixView(axes, len(getattr(module, name))) for name in names}


def _per_head(fused: str, *sizes: str) -> Callable[[nn.Module], Views]:
    """The fused projection `fused` of an attention layer that lays its heads outermost.

    `sizes` names the attributes of the layer that hold the rows of each projection in a head. Projections of equal
    sizes are matrices of their own. Others cannot be one batch, and the fused weight is read as one matrix.
    """

    def views(attention: nn.Module) -> Views:
        # The layer may have been replaced, as by an adapter or a quantized one.
        projection = module_at(attention, fused)
        if not isinstance(projection, nn.Linear | nn.Conv2d) or not getattr(attention, "head_first", True):
            return {}
        columns = "i h w" if isinstance(projection, nn.Conv2d) else "i"
        rows = [getattr(attention, size) for size in sizes]
        if len(set(rows)) > 1:
            return {f"{fused}.weight": MatrixView(f"o {columns}")}
        return {f"{fused}.weight": MatrixView(f"(o1 k o2) {columns}", len(rows), {"o2": rows[0]})}

    return views


BUILT_IN = [
    *(
        LayerRule(_is_imported(module, name), _per_head(fused, *sizes))
        for module, name, fused, *sizes in (
            ("timm.layers.attention2d", "Attention2d", "qkv", *["dim_head"] * 3),
            ("timm.layers.halo_attn", "HaloAttn", "kv", "dim_head_qk", "dim_head_v"),
            ("timm.models.cpubone", "ConvAttention", "pwise", *["head_dim"] * 3),
            ("timm.models.efficientformer", "Attention", "qkv", "key_dim", "key_dim", "val_dim"),
            ("timm.models.efficientvit_mit", "LiteMLA", "qkv.conv", *["dim"] * 3),
            ("timm.models.levit", "Attention", "qkv.linear", "key_dim", "key_dim", "val_dim"),
            ("timm.models.levit", "AttentionDownsample", "kv.linear", "key_dim", "val_dim"),
            ("timm.models.lowformer", "ConvAttention", "pwise", *["head_dim"] * 3),
            ("timm.models.maxxvit", "Attention2d", "qkv", *["dim_head"] * 3),
            ("timm.models.maxxvit", "AttentionCl", "qkv", *["dim_head"] * 3),
            ("timm.models.tiny_vit", "Attention", "qkv", "key_dim", "key_dim", "val_dim"),
        )
    ),
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
"""The rules for torch's layers, for those of transformers that are not torch's, and for timm's fused projections."""


EMBEDDINGS = [LayerRule(kind, {"weight": MatrixView("o i")}) for kind in (nn.Embedding, nn.EmbeddingBag)]
"""The rules for embeddings, which are not scaled unless the caller names them.

The vector of each token is a row, as it is in the output layer that may share the weight.
"""


class RuleBook:
    """The rules of a call for a model, the built-in ones behind them, and `named` at the end.

    A layer's rule is the first one that matches it.
    """

    def __init__(self, model: nn.Module, rules: Iterable[LayerRule] = (), named: Iterable[LayerRule] = ()) -> None:
        self._model = model
        self._own = list(rules)
        self._built_in = [*BUILT_IN, *named]
        self._found: dict[str, tuple[float, Views]] = {}

    @property
    def unused(self) -> list[LayerRule]:
        """The call's rules that are the rule of no layer that has been looked up."""
        used = {number for number, _ in self._found.values()}
        return [rule for number, rule in enumerate(self._own) if number not in used]

    def look_up(self, name: str) -> tuple[float, Views]:
        """The place of a layer's rule among the rules, and what it names; infinity, and nothing, without a rule."""
        if name not in self._found:
            layer = module_at(self._model, name)
            assert layer is not None
            rules = enumerate([*self._own, *self._built_in])
            matching = ((number, rule.views(layer)) for number, rule in rules if rule.matches(name, layer))
            self._found[name] = next(matching, (math.inf, {}))
        return self._found[name]

    def views(self, name: str) -> Views:
        """The views of a layer's tensors.

        They are those of its own rule, and of the rules of layers that it lies in where these come before its own.
        """
        own, named = self.look_up(name)
        views = {path: view for path, view in named.items() if "." not in path}
        parts = name.split(".") if name else []
        outer = [(*self.look_up(".".join(parts[:depth])), ".".join(parts[depth:])) for depth in range(len(parts))]
        # The first rule comes last, and overwrites the others.
        for _, named, path in sorted((one for one in outer if one[0] < own), key=lambda one: -one[0]):
            split = {tuple(full.rpartition(".")[::2]): view for full, view in named.items()}
            views |= {tensor: view for (within, tensor), view in split.items() if within == path}
        return views
