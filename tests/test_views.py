"""Views of weights as matrices: there and back, in every memory format."""

import pytest
import torch

from specscale.views import MatrixView

CASES = [
    (MatrixView("o i"), (6, 4)),
    (MatrixView("i o"), (6, 4)),
    (MatrixView("i (k o)", 3), (4, 6)),
    (MatrixView("k o i", 5), (5, 6, 4)),
    (MatrixView("k i o", 5), (5, 6, 4)),
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


def test_stacked_experts_and_transposed_projections():
    weight = torch.randn(3, 4, 6)
    assert torch.equal(MatrixView("k i o", 3).matrices(weight), weight.mT)
    fused = MatrixView("i (k o)", 3).matrices(weight[0])
    assert torch.equal(fused[1], weight[0, :, 2:4].T)
    assert MatrixView("i o").matrix_shape(weight[0]) == (6, 4)


@pytest.mark.parametrize(
    ("axes", "count", "text"),
    [
        ("k i", 2, "axes must name the outputs o"),
        ("o i", 2, "count must be 1, or axes must say by k"),
        ("(k o) i", 0, "count must be 1"),
        ("(k h i o", 2, "axes must name each axis once"),
        ("k o i o", 2, "axes must name each axis once"),
        ("k i ... o", 2, "axes must name each axis once"),
        ("((k o) i)", 2, "axes must name each axis once"),
    ],
)
def test_a_view_that_cannot_be_read_is_refused(axes, count, text):
    with pytest.raises(ValueError, match=text):
        MatrixView(axes, count)


def test_channels_go_by_the_axes_names():
    weight = torch.zeros(3, 2, 16, 32)
    assert MatrixView("h w i o").channels(weight) == (32, 16)
    assert MatrixView("h w c o").channels(weight) == (32, 3 * 2 * 16)
    assert MatrixView("(k i) o h w", 3).channels(weight) == (2, 1)
