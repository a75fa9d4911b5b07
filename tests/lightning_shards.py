"""What ranks do that train by Lightning's ModelParallelStrategy, which shards in `configure_model`."""

import os
import warnings

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from sharded_checkpoints import ignore_torchs_own, net, shard, values_of, worst_off_target
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from specscale import NormScaler, apply_norm_scaling
from specscale.integrations.lightning import NormScalingCallback

STEPS = 8


class Module(pl.LightningModule):
    """Scaled, then sharded, where Lightning asks for it."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.net = norm, None

    def configure_model(self):
        if self.net is None:
            self.net = net()
            apply_norm_scaling(self.net, self.norm)
            shard(self.net, self.device_mesh["data_parallel"])

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Watch(pl.Callback):
    """How far off the whole weights' norms are after every step, and what the parameters are."""

    def __init__(self):
        self.off, self.local_shapes = [], {}

    def on_train_batch_end(self, trainer, module, *_):
        scaling = NormScaler.of(module)
        self.off.append(worst_off_target(scaling))
        parameters = [weight.parameter for weight in scaling.weights]
        assert all(isinstance(one, DTensor) and one.device_mesh.size() == dist.get_world_size() for one in parameters)
        self.local_shapes = {weight.name: tuple(weight.parameter.to_local().shape) for weight in scaling.weights}


def fit(norm, folder, epochs, **resume):
    module, watch, callback = Module(norm), Watch(), NormScalingCallback()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=ModelParallelStrategy(dist.get_world_size(), 1, resume.pop("distributed", True)),
        callbacks=[callback, watch],
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    x = torch.randn(4 * STEPS, 40, generator=torch.Generator().manual_seed(1))
    data = DataLoader(TensorDataset(x, x[:, :10].sin()), batch_size=4 // dist.get_world_size())
    trainer.fit(module, data, **resume)
    return trainer, module, watch


def train(folder, norm):
    """Two epochs at once; and one that is saved, in two ways, and gone on from."""
    ignore_torchs_own()
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    _, expected, watch = fit(norm, folder, 2)
    found = {"off": watch.off, "local shapes": watch.local_shapes}
    for distributed in (True, False):
        path = folder / f"{norm}-{distributed}.ckpt"
        trainer, _, _ = fit(norm, folder, 1, distributed=distributed)
        trainer.save_checkpoint(path)
        _, resumed, watch = fit(norm, folder, 2, distributed=distributed, ckpt_path=path)
        assert len(watch.off) == STEPS
        found["off"] += watch.off
        own, other = values_of(expected), values_of(resumed)
        assert all(torch.equal(value, other[name]) for name, value in own.items()), (norm, distributed)
    return found
