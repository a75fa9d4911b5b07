"""Norm scaling in Lightning: a callback that attaches and logs."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from specscale.scaler import NormScaler


class NormScalingCallback(Callback):
    """Holds the norms of a scaled LightningModule through `fit`, and sends `scaling.metrics()` to the loggers.

    It attaches to each optimizer that owns a scaled weight, and logs every `log_every_n_steps` of the trainer.

    Args:
        scaling: the handle, such as `scaling.capture()`; None finds it on the module at every `fit`.
    """

    def __init__(self, scaling: NormScaler | None = None) -> None:
        self._given = scaling
        self.scaling = scaling
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, after the optimizers are made and a checkpoint is restored.

        Raises:
            ValueError: the module has no scaled weight, no optimizer owns one, or one of them is attached already.
        """
        # An earlier fit's optimizers may be used again, and must not be attached twice.
        if self.scaling is not None:
            self.scaling.detach()
        self.scaling = self._given or NormScaler.of(pl_module)
        owners = [optimizer for optimizer in trainer.optimizers if self.scaling.owned_by(optimizer)]
        if not owners:
            found = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            raise ValueError(
                f"NormScalingCallback: none of the trainer's optimizers ({found}) owns a scaled weight; build one from "
                "the scaled module's parameters in configure_optimizers"
            )
        for optimizer in owners:
            self.scaling.attach(optimizer)
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Log, at the steps at which Lightning logs."""
        before, self._step = self._step, trainer.global_step
        # Gradient accumulation: this batch took no step.
        if self.scaling is None or self._step == before or not trainer._logger_connector.should_update_logs:
            return
        metrics = self.scaling.metrics()
        # As Lightning's own monitors do: `log_dict` would loop over all names at every batch, logged or not.
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
