"""The data sets in memory, their order, and augmentation batched on the device."""

from dataclasses import dataclass

import numpy as np
import torch
from presets import Config
from ranks import Ranks
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
PADDING = 4


@dataclass
class Data:
    """Images `(N, C, H, W)` in uint8 and labels `(N,)` of both splits."""

    train: TensorDataset
    test: TensorDataset
    num_classes: int
    mean: Tensor
    std: Tensor
    augment: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.train.tensors[0].shape[1:])


def load(config: Config, ranks: Ranks) -> Data:
    """The configuration's data set, its parts limited; one process downloads."""
    if config.data == "cifar100" and config.download and ranks.leads:
        _cifar100(config)
    ranks.wait()
    data = _digits() if config.data == "digits" else _cifar100(config)
    data.train = _first(data.train, config.limit_train)
    data.test = _first(data.test, config.limit_test)
    return data


def _first(dataset: TensorDataset, limit: int | None) -> TensorDataset:
    images, labels = dataset.tensors
    index = torch.arange(len(images[:limit]))
    return TensorDataset(images[:limit], labels[:limit], index)


def _digits() -> Data:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images * (255 / 16)).to(torch.uint8)[:, None]
    labels = torch.from_numpy(found.target).long()
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
        found = CIFAR100(config.data_root, train=train, download=config.download)
        images = torch.from_numpy(np.ascontiguousarray(found.data.transpose(0, 3, 1, 2)))
        splits.append(TensorDataset(images, torch.tensor(found.targets)))
    mean, std = (torch.tensor(values)[:, None, None] for values in (CIFAR_MEAN, CIFAR_STD))
    return Data(*splits, 100, mean, std, True)


def synthetic(count: int) -> Data:
    """Noise in CIFAR-100's shapes: for timings where the images do not matter."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 100, (count,), generator=generator)
    split = _first(TensorDataset(images, labels), None)
    half = torch.full((3, 1, 1), 0.5)
    return Data(split, split, 100, half, half, True)


def train_loader(data: Data, config: Config, rank: int, world: int, epoch: int) -> DataLoader:
    """This rank's share of the epoch's batches; the ranks' shares together are the same batches for any world size."""
    sampler = DistributedSampler(data.train, world, rank, shuffle=True, seed=config.seed)
    sampler.set_epoch(epoch)
    return _loader(data.train, sampler, config.batch_size // world, config.num_workers)


def test_loader(data: Data, config: Config, rank: int, world: int) -> DataLoader:
    """This rank's share of the test images, each exactly once."""
    return _loader(data.test, range(rank, len(data.test), world), config.batch_size // world, config.num_workers)


def _loader(dataset, sampler, batch_size: int, num_workers: int) -> DataLoader:
    # A batch is one indexing of the tensors, not one for each image.
    batches = BatchSampler(sampler, batch_size, drop_last=False)
    return DataLoader(dataset, sampler=batches, batch_size=None, num_workers=num_workers)


class Prepare:
    """Augment and normalise a batch on the device.

    The crop and the flip of an image are a function of (seed, epoch, image), whatever the ranks, workers and batches.
    """

    def __init__(self, data: Data, device: torch.device, memory_format: torch.memory_format) -> None:
        self.data, self.memory_format = data, memory_format
        self.mean, self.std = data.mean.to(device), data.std.to(device)

    def draw(self, seed: int, epoch: int) -> None:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        count = len(self.data.train)
        self.offsets = torch.randint(0, 2 * PADDING + 1, (count, 2), generator=generator).to(self.mean.device)
        self.flips = (torch.rand(count, generator=generator) < 0.5).to(self.mean.device)

    def train(self, images: Tensor, index: Tensor) -> Tensor:
        if self.data.augment:
            images = crop_and_flip(images, self.offsets[index], self.flips[index])
        return self.test(images)

    def test(self, images: Tensor) -> Tensor:
        return ((images.float() / 255 - self.mean) / self.std).contiguous(memory_format=self.memory_format)


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """Pad by zeros, cut `(B, C, H, W)` out again at `offsets (B, 2)`, mirror where `flips (B,)`."""
    height, width = images.shape[-2:]
    padded = torch.nn.functional.pad(images, [PADDING] * 4)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(len(images), -1)
    columns = offsets[:, 1:] + torch.where(flips[:, None], width - 1 - columns, columns)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
