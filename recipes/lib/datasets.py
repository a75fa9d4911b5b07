"""The data sets in memory, loaders that shard them over the ranks, and augmentation on the device."""

import signal
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lib.distributed import Processes
from lib.modular_addition import MODULUS, pairs
from lib.presets import Config

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
PADDING = 4


@dataclass
class Data:
    """Training and test split: each holds inputs, labels `(N,)` and indices `(N,)`.

    Inputs are uint8 images `(N, C, H, W)`, normalized by mean and standard deviation, or numbers `(N, 2)` as they are.
    """

    train: TensorDataset
    test: TensorDataset
    num_classes: int
    mean: Tensor | None = None
    std: Tensor | None = None
    augment: bool = False

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.train.tensors[0].shape[1:])

    def to(self, device: torch.device) -> "Data":
        """Both splits on the device; mean and standard deviation stay."""
        splits = (TensorDataset(*(one.to(device) for one in split.tensors)) for split in (self.train, self.test))
        return Data(*splits, self.num_classes, self.mean, self.std, self.augment)


def load_data(config: Config, processes: Processes) -> Data:
    """The configuration's data set, limited to its number of images; one process of each node downloads."""
    # The main process first: where the nodes share a folder, the others find the data there.
    for downloads in (processes.is_main, processes.local_rank == 0):
        if config.data == "cifar100" and config.download and downloads:
            _cifar100(config)
        processes.barrier()
    data = {"digits": _digits, "cifar100": _cifar100, "modular-addition": _modular_addition}[config.data](config)
    data.train = _limit(data.train, config.limit_train)
    data.test = _limit(data.test, config.limit_test)
    return data


def _limit(dataset: TensorDataset, limit: int | None) -> TensorDataset:
    """The first `limit` images and labels, with the index of each image."""
    images, labels = dataset.tensors
    index = torch.arange(len(images[:limit]))
    return TensorDataset(images[:limit], labels[:limit], index)


def _modular_addition(config: Config) -> Data:
    return Data(*(TensorDataset(*split) for split in pairs(config.seed)), MODULUS)


def _digits(config: Config) -> Data:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    half = torch.full((1, 1, 1), 0.5)
    return Data(TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test]), 10, half, half)


def _cifar100(config: Config) -> Data:
    from torchvision.datasets import CIFAR100

    splits = []
    for train in (True, False):
        split = CIFAR100(config.data_root, train=train, download=config.download)
        images = torch.from_numpy(np.ascontiguousarray(split.data.transpose(0, 3, 1, 2)))
        splits.append(TensorDataset(images, torch.tensor(split.targets)))
    mean, std = (torch.tensor(values)[:, None, None] for values in (CIFAR_MEAN, CIFAR_STD))
    return Data(*splits, 100, mean, std, True)


class Loader(Sized, Protocol):
    """Batches of images, labels and indices."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]: ...


def train_loader(data: Data, config: Config, rank: int, world_size: int, epoch: int) -> Loader:
    """This rank's shard of every training batch; the shards add up to the same batches for any world size."""
    count = len(data.train)
    length = config.steps_per_epoch * config.batch_size if config.steps_per_epoch else count
    generator = torch.Generator().manual_seed(config.seed + epoch)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(-(-length // count))])[:length]
    # The first images once more, until the ranks' shares are equal.
    order = order[torch.arange(length + -length % world_size) % length]
    return _loader(data.train, order[rank::world_size], config.batch_size // world_size, config)


def test_loader(data: Data, config: Config, rank: int, world_size: int) -> Loader:
    """This rank's shard of the test images; each image is in exactly one shard, and all have as many batches."""
    shard = torch.arange(rank, len(data.test), world_size)
    batch_size = config.batch_size // world_size
    num_batches = -(-len(range(0, len(data.test), world_size)) // batch_size)
    return _loader(data.test, shard, batch_size, config, num_batches)


def _loader(
    dataset: TensorDataset, order: Tensor, batch_size: int, config: Config, num_batches: int | None = None
) -> Loader:
    parts = list(order.split(batch_size))
    if config.parallel == "fsdp" and num_batches is not None:
        # In a forward pass, the processes wait for each other: the last batch may be empty.
        parts += [order[:0]] * (num_batches - len(parts))
    if config.data_on_device:
        return DeviceLoader(dataset, parts)
    # The dataset is indexed once for a whole batch instead of once for each image.
    batches = [batch.tolist() for batch in parts]
    pin_memory = torch.cuda.is_available()
    return DataLoader(
        dataset,
        sampler=batches,
        batch_size=None,
        num_workers=config.num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_trainer,
    )


def _leave_signals_to_trainer(_: int) -> None:
    """Ctrl-C and torchrun's SIGTERM reach loader workers too: without batches, no last step could be taken."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class DeviceLoader:
    """Batches selected on the device that the data set is on: the host copies one order of images for all of them."""

    def __init__(self, dataset: TensorDataset, batches: Sequence[Tensor]) -> None:
        self.tensors = dataset.tensors
        order = torch.cat(tuple(batches)).to(self.tensors[0].device)
        self.batches = order.split([len(batch) for batch in batches])

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for batch in self.batches:
            images, labels, index = (tensor.index_select(0, batch) for tensor in self.tensors)
            yield images, labels, index


class Preprocessing:
    """Augmentation and normalization of batches on the device.

    Crop and flip of an image depend only on seed, epoch and image, not on the ranks, workers and batches.
    """

    def __init__(self, data: Data, device: torch.device, memory_format: torch.memory_format) -> None:
        self.data, self.memory_format = data, memory_format
        self.device = device
        if data.mean is not None and data.std is not None:
            self.mean, self.std = data.mean.to(device), data.std.to(device)

    def draw_augmentation(self, seed: int, epoch: int) -> None:
        """Draw the crop and flip of every training image for an epoch, if the data set asks for it."""
        if not self.data.augment:
            return
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        count = len(self.data.train)
        self.offsets = torch.randint(0, 2 * PADDING + 1, (count, 2), generator=generator).to(self.device)
        self.flips = (torch.rand(count, generator=generator) < 0.5).to(self.device)

    def train(self, images: Tensor, index: Tensor) -> Tensor:
        """Training images, augmented if the data set asks for it, and normalized."""
        if self.data.augment:
            images = crop_and_flip(images, self.offsets[index], self.flips[index])
        return self.test(images)

    def test(self, images: Tensor) -> Tensor:
        """Test images, normalized; numbers as they are."""
        if self.data.mean is None:
            return images
        return ((images.float() / 255 - self.mean) / self.std).contiguous(memory_format=self.memory_format)


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """Pad images `(B, C, H, W)` with zeros, crop to their size at `offsets (B, 2)`, and mirror where `flips (B,)`."""
    height, width = images.shape[-2:]
    padded = torch.nn.functional.pad(images, [PADDING] * 4)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(len(images), -1)
    columns = offsets[:, 1:] + torch.where(flips[:, None], width - 1 - columns, columns)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
