"""Callbacks for other libraries' training loops; each module here imports the library that it is named after."""

from specscale.scaler import NormScaler


def let_go(scaling: NormScaler | None) -> None:
    """Take the scaling off the optimizers of an earlier run: one that comes back is not to be scaled twice."""
    if scaling is not None:
        for handle in scaling._handles:
            handle.remove()
        scaling._handles.clear()
