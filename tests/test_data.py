"""The data sets, their order and their augmentation."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from torch.utils.data import DistributedSampler

from lib.datasets import Preprocessing, crop_and_flip, load_data, train_loader
from lib.datasets import test_loader as loader_of_test
from lib.distributed import Processes
from lib.presets import digits, mlp_5x2000

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """Files in CIFAR-100's own format, of noise: torchvision knows the real ones by their checksums."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    random = np.random.default_rng(0)
    for split, count in (("train", 300), ("test", 70)):
        found = {
            "data": random.integers(0, 256, (count, 3072), dtype=np.uint8),
            "fine_labels": random.integers(0, 100, count).tolist(),
        }
        (folder / split).write_bytes(pickle.dumps(found))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    return replace(mlp_5x2000(), data_root=tmp_path, batch_size=64)


def epoch_of(config, data, rank=0, world_size=1):
    preprocessing = Preprocessing(data, ALONE.device, torch.contiguous_format)
    preprocessing.draw_augmentation(config.seed, 3)
    loader = train_loader(data, config, rank, world_size, epoch=3)
    return {int(i): image for images, _, index in loader for i, image in zip(index, preprocessing.train(images, index))}  # noqa: B905


def test_cifar100_is_read_whole_and_limited(cifar100):
    data = load_data(cifar100, ALONE)
    assert (data.image_shape, data.num_classes, len(data.train), len(data.test)) == ((3, 32, 32), 100, 300, 70)
    raw = pickle.loads((cifar100.data_root / "cifar-100-python" / "train").read_bytes())
    assert torch.equal(data.train[5][0], torch.from_numpy(raw["data"][5]).reshape(3, 32, 32))
    assert data.train[5][1] == raw["fine_labels"][5]
    data = load_data(replace(cifar100, limit_train=20, limit_test=10), ALONE)
    assert (len(data.train), len(data.test)) == (20, 10)


def test_an_image_looks_the_same_whatever_the_workers_and_ranks(cifar100):
    data = load_data(cifar100, ALONE)
    whole = epoch_of(cifar100, data)
    assert sorted(whole) == list(range(300))
    by_workers = epoch_of(replace(cifar100, data_on_device=False, num_workers=2), data)
    assert list(by_workers) == list(whole)
    by_ranks = epoch_of(cifar100, data, 0, 2) | epoch_of(cifar100, data, 1, 2)
    for other in (by_workers, by_ranks):
        assert all(torch.equal(image, whole[index]) for index, image in other.items())


@pytest.mark.parametrize("world_size", [1, 3])
def test_batches_are_the_same_selected_on_the_device_and_loaded_on_the_host(world_size, cifar100):
    data = load_data(cifar100, ALONE)
    on_host = replace(cifar100, data_on_device=False)
    for rank in range(world_size):
        pairs = [[train_loader(data, config, rank, world_size, epoch=2) for config in (cifar100, on_host)]]
        pairs += [[loader_of_test(data, config, rank, world_size) for config in (cifar100, on_host)]]
        for selected, loaded in pairs:
            assert type(selected) is not type(loaded)
            assert len(selected) == len(loaded) == len(list(selected))
            for batch, expected in zip(selected, loaded, strict=True):
                assert all(torch.equal(one, other) for one, other in zip(batch, expected, strict=True))


def test_the_order_is_that_of_torchs_sampler(cifar100):
    data = load_data(cifar100, ALONE)
    for rank in range(7):
        sampler = DistributedSampler(data.train, 7, rank, shuffle=True, seed=cifar100.seed)
        sampler.set_epoch(5)
        batches = train_loader(data, cifar100, rank, 7, epoch=5)
        assert [i for _, _, index in batches for i in index.tolist()] == list(sampler)


def test_data_that_is_moved_is_all_there():
    data = load_data(digits(), ALONE)
    moved = data.to(torch.device("meta"))
    for split, whole in ((moved.train, data.train), (moved.test, data.test)):
        assert [(one.device.type, one.shape, one.dtype) for one in split.tensors] == [
            ("meta", one.shape, one.dtype) for one in whole.tensors
        ]
    images, labels, index = next(iter(train_loader(moved, digits(), 0, 1, 1)))
    assert {images.device.type, labels.device.type, index.device.type} == {"meta"}


def test_a_step_sees_the_same_images_on_any_number_of_ranks():
    config = digits()
    data = load_data(config, ALONE)

    def steps(world):
        parts = [[index.tolist() for _, _, index in train_loader(data, config, r, world, 1)] for r in range(world)]
        return [sorted(i for share in shares for i in share) for shares in zip(*parts, strict=True)]

    # The last step is short, and the ranks' shares of it are made equal.
    assert steps(1)[:-1] == steps(2)[:-1] == steps(4)[:-1]


def test_every_test_image_counts_once():
    config, data = digits(), load_data(digits(), ALONE)
    seen = [i for rank in range(3) for _, _, index in loader_of_test(data, config, rank, 3) for i in index.tolist()]
    assert sorted(seen) == list(range(len(data.test)))


def test_crop_and_flip_against_one_image_at_a_time():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (5, 3, 32, 32), generator=generator, dtype=torch.uint8)
    offsets = torch.randint(0, 9, (5, 2), generator=generator)
    flips = torch.tensor([True, False, True, False, True])
    for image, (top, left), flip, out in zip(
        images, offsets, flips, crop_and_flip(images, offsets, flips), strict=True
    ):
        padded = torch.nn.functional.pad(image, [4] * 4)
        expected = padded[:, top : top + 32, left : left + 32]
        assert torch.equal(out, expected.flip(-1) if flip else expected)
