"""Views of weights as matrices: there and back, in every memory format."""

import pytest
import torch

from specscale.matrices import MatrixView

CASES = [
    (MatrixView("(k o) i"), (6, 4)),
    (MatrixView("(k o) i", 3), (6, 4)),
    (MatrixView("(k o) i w", 2), (6, 4, 3)),
    (MatrixView("(k o) i h w"), (6, 4, 3, 2)),
    (MatrixView("(k o) i h w", 3), (6, 4, 3, 2)),
    (MatrixView("(k i) o h w", 2), (6, 4, 3, 2)),
    (MatrixView("(k o) i d h w", 2), (6, 4, 2, 3, 2)),
]


def formats(shape):
    yield torch.contiguous_format
    if len(shape) == 4:
        yield torch.channels_last
    if len(shape) == 5:
        yield torch.channels_last_3d


@pytest.mark.parametrize(("view", "shape"), CASES, ids=str)
def test_split_is_always_a_view_and_the_way_back_is_exact(view, shape):
    for memory_format in formats(shape):
        weight = torch.randn(shape).contiguous(memory_format=memory_format)
        matrices = view.matrices(weight).clone()
        assert view.split(weight).untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        view.split(weight).mul_(2)
        torch.testing.assert_close(view.matrices(weight), 2 * matrices, rtol=0, atol=0)
        view.write_(weight, matrices)
        torch.testing.assert_close(view.matrices(weight), matrices, rtol=0, atol=0)


def test_a_grouped_convolution_is_its_groups_matrices():
    weight = torch.randn(6, 4, 3, 2)
    matrices = MatrixView("(k o) i h w", 3).matrices(weight)
    assert torch.equal(matrices[1], weight[2:4].flatten(1))


def test_a_transposed_convolutions_rows_are_its_outputs():
    weight = torch.randn(6, 4, 3, 2)
    matrices = MatrixView("(k i) o h w", 2).matrices(weight)
    assert torch.equal(matrices[1], weight[3:].transpose(0, 1).flatten(1))
