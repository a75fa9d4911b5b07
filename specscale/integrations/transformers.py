"""Norm scaling in the Trainer of Hugging Face transformers: a callback that attaches and logs."""

from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from specscale.scaler import NormScaler


class NormScalingCallback(TrainerCallback):
    """Holds the norms of a scaled model through `trainer.train()`, and logs `scaling.metrics()` beside the loss.

    Examples:
        >>> trainer.add_callback(NormScalingCallback(trainer))

    Args:
        trainer: its `log` sends the metrics to the history and every reporter.
        scaling: the handle, such as `scaling.capture()`; None finds it on the model at every `train`.
    """

    def __init__(self, trainer: Trainer, scaling: NormScaler | None = None) -> None:
        self._trainer = trainer
        self._given = scaling
        self.scaling = scaling

    def on_train_begin(
        self, args: TrainingArguments, *_: Any, model: nn.Module, optimizer: torch.optim.Optimizer, **kwargs: Any
    ) -> None:
        """Attach to the optimizer that accelerate has wrapped.

        Raises:
            ValueError: the model has no scaled weight, or one that the trainer cannot save; the optimizer owns
                none of them, or is attached already.
        """
        # An earlier run's optimizer may be used again, and must not be attached twice.
        if self.scaling is not None:
            self.scaling.detach()
        self.scaling = self._given or NormScaler.of(model)
        if args.save_strategy != "no":
            _refuse_shared(self.scaling, model)
        self.scaling.attach(getattr(optimizer, "optimizer", optimizer))

    def on_log(self, *_: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Log right after the training loss: the `logs` themselves have gone to the history and the reporters."""
        if self.scaling is not None and "loss" in logs:
            self._trainer.log(self.scaling.metrics())


def _refuse_shared(scaling: NormScaler, model: nn.Module) -> None:
    # The trainer raises an error too, but only at its first checkpoint.
    names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    if shared := [weight.name for weight in scaling.weights if names[id(weight.parameter)] > 1]:
        raise ValueError(
            f"NormScalingCallback: transformers cannot save {shared[0]!r} under scaling, as it shares its weight with "
            f"another layer; call apply_norm_scaling(model, exclude={shared!r}), or set save_strategy='no'"
        )
