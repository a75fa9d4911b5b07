"""Checkpoints of sharded models: saved on some ranks, loaded on others, by torch's own calls."""

import pytest
import sharded_checkpoints as runs
from ranks import on_ranks
from torch.distributed.checkpoint import DefaultLoadPlanner


@pytest.fixture
def ranks(tmp_path):
    """Calls a function on so many ranks, each time with a group of its own."""

    def call(function, num_ranks, *args):
        folder = tmp_path / f"group{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return on_ranks(function, num_ranks, folder, *args)

    return call


@pytest.fixture
def saved(tmp_path):
    """The folder of a checkpoint."""
    folder = tmp_path / "saved"
    folder.mkdir()
    return folder


def assert_as_uninterrupted(found, expected, tolerance):
    """The same losses, within a relative tolerance, and norms that are held."""
    for (norm, attached), one in found.items():
        apart = [abs(a / b - 1) for a, b in zip(one["losses"], expected[norm], strict=True)]
        assert max(apart) <= tolerance, (norm, attached, apart)
        assert one["off"] < 1e-3, (norm, attached)


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_comes_back_bit_for_bit(ranks, saved):
    for found in ranks(runs.short, 2, saved):
        assert found["losses"][0] == found["losses"][1]
        assert found["off"] < 1e-3


@pytest.mark.slow
def test_what_four_ranks_have_saved_goes_on_on_others(ranks, saved):
    expected, *others = ranks(runs.save_and_go_on, 4, saved, "fsdp")
    assert all(one == expected for one in others)
    for num_ranks, kind in ((4, "fsdp"), (2, "fsdp"), (1, "fsdp"), (1, "whole")):
        for found in ranks(runs.load_and_go_on, num_ranks, saved, kind):
            # A wide weight of a whole model has its block on the other side, and is known to the solver's tolerance.
            tolerance = 0 if num_ranks == 4 else 1e-3 if kind == "whole" else 1e-4
            assert_as_uninterrupted(found, expected, tolerance)


@pytest.mark.slow
def test_what_one_process_has_saved_goes_on_on_several(ranks, saved):
    (expected,) = ranks(runs.save_and_go_on, 1, saved, "whole")
    # A wide weight has another block under fully_shard, which the checkpoint lacks.
    ranks(runs.lacks_a_block, 2, saved)
    for num_ranks in (1, 2):
        for found in ranks(runs.load_and_go_on, num_ranks, saved, "fsdp", DefaultLoadPlanner(allow_partial_load=True)):
            assert_as_uninterrupted(found, expected, 1e-3)


@pytest.mark.slow
def test_no_order_of_torchs_calls_moves_a_weight(ranks):
    assert ranks(runs.orders, 2) == [54, 54]


@pytest.mark.slow
def test_whole_flat_and_asynchronous_states_come_back_bit_for_bit(ranks, saved):
    ranks(runs.options, 2, saved)


@pytest.mark.slow
def test_plain_states_come_out_and_go_in(ranks, saved):
    for found in ranks(runs.plain, 2, saved):
        assert max(found.values()) < 1e-3


@pytest.mark.slow
def test_the_full_state_of_a_whole_model_goes_into_a_sharded_one(ranks):
    ranks(runs.of_a_whole_model, 2)


@pytest.mark.slow
def test_a_model_from_the_meta_device_is_loaded_on_shards(ranks, saved):
    ranks(runs.from_meta, 2, saved)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hsdp", "tp"])
def test_a_mesh_of_two_dimensions_comes_back_bit_for_bit(ranks, saved, kind):
    ranks(runs.meshes, 4, saved, kind)
