"""Which weights a handle holds: followed when other code moves them to other layers, and named when they are lost."""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from specscale.errors import Refusal
from specscale.layers import module_at
from specscale.parametrization import register, unregister
from specscale.state import PLAIN_LAYERS, NormScaling, version_of
from specscale.weights import Weight, holds_tensor, scaled_weights

INSIDE_PLAIN = "the model is plain inside `with scaling.plain():`; leave that first"


class HeldWeights:
    """The weights of a model that a handle holds.

    A weight is held by its scaling. A scaling that has left the model with its layer is put on the layer that the
    parameter is in now, if there is one: quantization, float8 training and fused layers swap layers around parameters.
    """

    def __init__(self, model: nn.Module, weights: Iterable[Weight]) -> None:
        self.model = model
        self._weights = list(weights)
        self._lost: list[Weight] = []
        """Those whose layer has left the model with the parameter. It may come back."""
        self._unsaid: dict[str, list[Weight]] = {"step": [], "metrics": []}
        """The lost weights that a call has not named yet."""

    @property
    def with_lost(self) -> list[Weight]:
        """All its weights, with those whose layer has left the model."""
        return [*self._weights, *self._lost]

    @property
    def is_off(self) -> bool:
        """Whether the model is plain for a while."""
        return any(weight.module in PLAIN_LAYERS for weight in self.with_lost)

    def current(self) -> list[Weight]:
        """The weights that are held now, in the model's order."""
        # At every step: to follow the names takes a tenth of the time of a walk over the model. Another handle's
        # `plain()` may have given a scaling another view.
        if not (
            all(w.is_scaled and w.view is w.scaling.view and self._is_in_place(w) for w in self._weights)
            and not any(map(self._is_in_place, self._lost))
        ):
            self._look_around()
        return list(self._weights)

    def _is_in_place(self, weight: Weight) -> bool:
        return module_at(self.model, weight.layer) is weight.module

    def _look_around(self) -> None:
        held = self.with_lost
        if self.is_off:
            raise Refusal(INSIDE_PLAIN)
        present = {weight.scaling for weight in scaled_weights(self.model)}
        # A scaling that was removed from its layer by a call is neither followed nor missed.
        missing = [weight for weight in held if weight.is_scaled and weight.scaling not in present]
        places = places_of(self.model) if missing else {}
        lost = [weight for weight in missing if not _follow(weight, places)]
        own = {weight.scaling for weight in held}
        self._weights = [weight for weight in scaled_weights(self.model) if weight.scaling in own]
        for names in self._unsaid.values():
            names += [weight for weight in lost if weight not in self._lost]
        self._lost = lost

    def warn_of_lost(self, call: str, stacklevel: int) -> None:
        """Name, once in each call that does so, the weights that are not held any more."""
        gone = {weight.scaling for weight in self._lost}
        unsaid, self._unsaid[call] = self._unsaid[call], []
        if names := [repr(weight.name) for weight in unsaid if weight.scaling in gone]:
            warnings.warn(
                f"{call}: the weight of {', '.join(names)} is not in the model any more, and is no longer scaled. "
                "Replace layers inside `with scaling.plain():`, after which the new one is scaled; for one that was "
                "replaced already, call apply_norm_scaling(model, include=...) and attach that handle to the optimizer "
                "that holds the new parameter",
                stacklevel=stacklevel,
            )


class Place(NamedTuple):
    """Where a parameter is in a model."""

    layer: str
    module: nn.Module
    tensor: str


def places_of(model: nn.Module) -> dict[int, list[Place]]:
    """Where each parameter of a model is, by its id; not those that a parametrization is computed from."""
    places: dict[int, list[Place]] = defaultdict(list)
    for layer, module in model.named_modules():
        if not isinstance(module, ParametrizationList):
            for tensor, parameter in module._parameters.items():
                places[id(parameter)].append(Place(layer, module, tensor))
    return places


def is_source(place: Place, tensor: str) -> bool:
    """Whether the layer computes the tensor from the parameter at this place, as pruning does from `weight_orig`."""
    return place.tensor != tensor and holds_tensor(place.module, tensor)


def put_on(scaling: NormScaling, place: Place) -> None:
    """Put a scaling on a layer's parameter."""
    scaling.parameter_order = tuple(place.module._parameters)
    register(place.module, place.tensor, scaling)


def _follow(weight: Weight, places: Mapping[int, list[Place]]) -> bool:
    """Put the scaling on the layer that has the parameter now; whether there is one."""
    parameter = weight.parameter
    place = next((one for one in places.get(id(parameter), []) if not is_source(one, weight.tensor)), None)
    if place is None:
        return False
    version = version_of(parameter)
    unregister(weight.module, weight.tensor)
    put_on(weight.scaling, place)
    weight.scaling.keep_current(parameter, version)
    return True
