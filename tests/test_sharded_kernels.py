"""The kernels' step on sharded weights, in Triton's interpreter and in real processes, against torch operations."""

from types import SimpleNamespace

import pytest
import torch
from ranks import on_ranks
from torch.distributed.tensor import Shard

pytest.importorskip("triton")

from sharded_kernels import compare, launched

from specscale import MatrixView, grouped, kernels
from specscale.constraints import Normalize


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(
    ("norm", "count"), [("frobenius", None), ("spectral", 2), ("cap", 3), (Normalize(one_sided=True), 2)], ids=str
)
def test_steps_of_shards_by_kernels_are_those_of_torch(norm, count, num_ranks, tmp_path):
    check(on_ranks(compare, num_ranks, tmp_path, norm, count, 2), norm, count)


def check(results, norm, count):
    """That the kernels took all weights but one, did what torch does, and left equal buffers on all ranks."""
    found, num_reduced, buffers = results[0]
    for name, (weights, norms, by_kernels) in found.items():
        # A wide matrix of at most 32 rows is summed whole, which no kernel does: here, that of one row.
        assert by_kernels == (name != "4" or norm == "frobenius" or count is None or found[name][2]), name
        assert weights < 2e-5, name
        assert norms < 3e-6, name
    assert sum(not by_kernels for _, _, by_kernels in found.values()) <= 1
    assert num_reduced == (1 if count is None else 2 * count)
    for _, _, others in results[1:]:
        assert torch.equal(others, buffers)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(
    ("norm", "count"), [("frobenius", None), ("spectral", 2), ("cap", 3), (Normalize(one_sided=True), 2)], ids=str
)
def test_steps_of_shards_on_a_gpu_are_those_of_torch(norm, count, num_ranks, tmp_path):
    """The ranks have the device in common, which gloo allows."""
    check(on_ranks(compare, num_ranks, tmp_path, norm, count, 5, "cuda"), norm, count)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", ["frobenius", "spectral", "cap"])
def test_a_step_of_shards_waits_for_nothing_on_a_gpu(norm, tmp_path):
    ((counts, by_torch),) = on_ranks(launched, 1, tmp_path, norm)
    if norm == "frobenius":
        assert not by_torch
        assert len(counts) == sum(counts.values()) == 4, "three kernels, and the norms' copy to the host"
    else:
        # A wide matrix of one row is summed whole, by torch operations.
        assert by_torch == ["4"]
        own = {name: count for name, count in counts.items() if hasattr(kernels, name)}
        assert sum(own.values()) == 1 + 8 * own["rayleigh_ritz"]


@pytest.mark.parametrize(
    ("view", "is_in_one_piece"),
    [
        (MatrixView("o i"), True),
        (MatrixView("(k o) i", count=3), True),
        # Of a matrix whose rows lie apart, some processes would have one piece, and others several.
        (MatrixView("(o k) i", count=3), False),
        (MatrixView("(o1 k o2) i", count=3, lengths={"o1": 4}), False),
    ],
    ids=str,
)
def test_all_processes_decide_alike_whether_kernels_take_a_weight(view, is_in_one_piece, monkeypatch):
    monkeypatch.setattr(grouped, "placements_of", lambda _: (Shard(0),))
    assert grouped._is_in_one_piece(SimpleNamespace(view=view, parameter=None)) == is_in_one_piece
