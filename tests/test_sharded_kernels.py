"""The kernels' step on sharded weights, in Triton's interpreter and in real processes, against torch operations."""

from types import SimpleNamespace

import pytest
import torch
from ranks import on_ranks
from torch.distributed.tensor import Shard

pytest.importorskip("triton")

from sharded_kernels import compare, compare_on_gpu

from specscale import MatrixView, grouped
from specscale.constraints import Normalize

CASES = [("frobenius", None), ("spectral", 2), ("cap", 3), (Normalize(one_sided=True), 2)]
"""Norms, and the iterations of a step."""


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(("norm", "count"), CASES, ids=str)
def test_steps_of_shards_by_kernels_are_those_of_torch(norm, count, num_ranks, tmp_path):
    check(on_ranks(compare, num_ranks, tmp_path, norm, count, 2), norm, count)


def check(results, norm, count):
    """That the kernels did what torch does, and left equal buffers on all ranks."""
    found, num_reduced, buffers = results[0]
    for name, (weights, norms) in found.items():
        assert weights < 2e-5, name
        assert norms < 3e-6, name
    assert num_reduced == (1 if count is None else 2 * count)
    for _, _, others in results[1:]:
        assert torch.equal(others, buffers)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_steps_of_shards_on_a_gpu_are_those_of_torch(num_ranks, tmp_path):
    results = on_ranks(compare_on_gpu, num_ranks, tmp_path, CASES, 5)
    for number, (norm, count) in enumerate(CASES):
        check([own[number] for own in results], norm, count)


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
