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
        """Attach, once the optimizers are there and a checkpoint is restored.

        Raises:
            ValueError: the module has no scaled weight, no optimizer owns one, or one of them is attached already.
        """
        # The earlier run's optimizers may come back, and are not to be scaled twice.
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
        # A batch that only accumulates gradients takes no step.
        if self.scaling is None or self._step == before or not trainer._logger_connector.should_update_logs:
            return
        metrics = self.scaling.metrics()
        # As Lightning's own monitors do: with `log_dict` every batch, logged or not, would loop over all names.
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
