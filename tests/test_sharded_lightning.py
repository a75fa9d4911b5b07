"""Lightning's strategy for sharded models: its own loop, with the callback."""

import pytest
from lightning_shards import STEPS, train
from ranks import on_ranks


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_lightning_trains_and_resumes_a_sharded_model(norm, tmp_path):
    """The parameters are DTensors, of which each rank has a half, and the norms are held after every step."""
    group = tmp_path / "group"
    group.mkdir()
    for found in on_ranks(train, 2, group, tmp_path, norm):
        assert found["local shapes"] == {"net.0": (75, 40), "net.2": (20, 150), "net.4": (5, 40)}
        assert len(found["off"]) == (2 + 1 + 1) * STEPS
        assert max(found["off"]) < 1e-3
