"""The data sets in memory, loaders that shard them over the ranks, and augmentation on the device."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from lib.distributed import Processes
from lib.presets import Config

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
PADDING = 4


@dataclass
class Data:
    """Training and test split: each holds uint8 images `(N, C, H, W)`, labels `(N,)` and indices `(N,)`."""

    train: TensorDataset
    test: TensorDataset
    num_classes: int
    mean: Tensor
    std: Tensor
    augment: bool

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return tuple(self.train.tensors[0].shape[1:])


def load_data(config: Config, processes: Processes) -> Data:
    """The configuration's data set, limited to its number of images; only the main process downloads."""
    if config.data == "cifar100" and config.download and processes.is_main:
        _cifar100(config)
    processes.barrier()
    data = _digits() if config.data == "digits" else _cifar100(config)
    data.train = _limit(data.train, config.limit_train)
    data.test = _limit(data.test, config.limit_test)
    return data


def _limit(dataset: TensorDataset, limit: int | None) -> TensorDataset:
    """The first `limit` images and labels, with the index of each image."""
    images, labels = dataset.tensors
    index = torch.arange(len(images[:limit]))
    return TensorDataset(images[:limit], labels[:limit], index)


def _digits() -> Data:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    half = torch.full((1, 1, 1), 0.5)
    return Data(
        TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test]), 10, half, half, False
    )


def _cifar100(config: Config) -> Data:
    from torchvision.datasets import CIFAR100

    splits = []
    for train in (True, False):
        split = CIFAR100(config.data_root, train=train, download=config.download)
        images = torch.from_numpy(np.ascontiguousarray(split.data.transpose(0, 3, 1, 2)))
        splits.append(TensorDataset(images, torch.tensor(split.targets)))
    mean, std = (torch.tensor(values)[:, None, None] for values in (CIFAR_MEAN, CIFAR_STD))
    return Data(*splits, 100, mean, std, True)


def random_data(count: int) -> Data:
    """Random images in the shape of CIFAR-100, for timings."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 100, (count,), generator=generator)
    split = _limit(TensorDataset(images, labels), None)
    half = torch.full((3, 1, 1), 0.5)
    return Data(split, split, 100, half, half, True)


def train_loader(data: Data, config: Config, rank: int, world_size: int, epoch: int) -> DataLoader:
    """This rank's shard of every training batch; the shards add up to the same batches for any world size."""
    sampler = DistributedSampler(data.train, world_size, rank, shuffle=True, seed=config.seed)
    sampler.set_epoch(epoch)
    return _loader(data.train, sampler, config.batch_size // world_size, config.num_workers)


def test_loader(data: Data, config: Config, rank: int, world_size: int) -> DataLoader:
    """This rank's shard of the test images; each image is in exactly one shard."""
    shard = range(rank, len(data.test), world_size)
    return _loader(data.test, shard, config.batch_size // world_size, config.num_workers)


def _loader(dataset: TensorDataset, sampler: Iterable[int], batch_size: int, num_workers: int) -> DataLoader:
    # The dataset is indexed once for a whole batch instead of once for each image.
    batches = BatchSampler(sampler, batch_size, drop_last=False)
    return DataLoader(dataset, sampler=batches, batch_size=None, num_workers=num_workers)


class Preprocessing:
    """Augmentation and normalization of batches on the device.

    Crop and flip of an image depend only on seed, epoch and image, not on the ranks, workers and batches.
    """

    def __init__(self, data: Data, device: torch.device, memory_format: torch.memory_format) -> None:
        self.data, self.memory_format = data, memory_format
        self.mean, self.std = data.mean.to(device), data.std.to(device)

    def draw_augmentation(self, seed: int, epoch: int) -> None:
        """Draw the crop and flip of every training image for an epoch."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        count = len(self.data.train)
        self.offsets = torch.randint(0, 2 * PADDING + 1, (count, 2), generator=generator).to(self.mean.device)
        self.flips = (torch.rand(count, generator=generator) < 0.5).to(self.mean.device)

    def train(self, images: Tensor, index: Tensor) -> Tensor:
        """Training images, augmented if the data set asks for it, and normalized."""
        if self.data.augment:
            images = crop_and_flip(images, self.offsets[index], self.flips[index])
        return self.test(images)

    def test(self, images: Tensor) -> Tensor:
        """Test images, normalized."""
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
