"""Views of weights as matrices: there and back, in every memory format."""

import math

import numpy as np
import pytest
import torch
from einops import EinopsError
from hypothesis import given, settings
from hypothesis import strategies as st

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
    (MatrixView("(o1 k o2) i", 3, {"o1": 4}), (24, 5)),
    (MatrixView("(o1 k o2) i h w", 3, {"o2": 2}), (24, 5, 1, 2)),
    (MatrixView("i (o1 k o2)", 3, {"o1": 1}), (5, 6)),
    (MatrixView("(k1 i) (k2 o) h w", 6, {"k1": 2}), (4, 6, 3, 2)),
    (MatrixView("k1 (o1 k2 o2) o3 i", 6, {"k1": 2, "o1": 2}), (2, 12, 3, 4)),
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
        split = view.split(weight)
        assert split.tensor.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        assert (len(split), split.shape) == (view.count, tuple(matrices.shape))
        split.tensor.mul_(2)
        torch.testing.assert_close(view.matrices(weight), 2 * matrices, rtol=0, atol=0)
        view.write_(weight, matrices)
        torch.testing.assert_close(view.matrices(weight), matrices, rtol=0, atol=0)
        # Numbers for matrices, rows, columns and elements fall where the matrices have them.
        k, m, n = split.shape
        a, b, c, d = torch.randn(k), torch.randn(k, m), torch.randn(k, n), torch.randn(k, m, n)
        split.tensor.copy_(split.per_matrix(a) + split.per_row(b) * split.per_column(c) + split.per_element(d))
        expected = a[:, None, None] + b[:, :, None] * c[:, None] + d
        torch.testing.assert_close(view.matrices(weight), expected, rtol=0, atol=0)


@st.composite
def views_and_shapes(draw):
    """A view of any number of axes for matrices, rows and columns, in any order and grouping, and a shape for it."""
    sizes = st.integers(1, 4)
    lengths = {f"k{number}": draw(sizes) for number in range(draw(st.integers(0, 2)))}
    lengths |= {f"o{number}": draw(sizes) for number in range(draw(st.integers(1, 3)))}
    lengths |= {name: draw(sizes) for name in "ihw"[: draw(st.integers(0, 3))]}
    names = draw(st.permutations(list(lengths)))
    groups = [[names[0]]]
    for name in names[1:]:
        if draw(st.booleans()):
            groups[-1].append(name)
        else:
            groups.append([name])
    axes = " ".join(f"({' '.join(group)})" for group in groups)
    shape = tuple(math.prod(lengths[name] for name in group) for group in groups)
    count = math.prod(length for name, length in lengths.items() if name[0] == "k")
    order = draw(st.permutations(range(len(shape))))
    return MatrixView(axes, count, lengths), shape, order, lengths, names


@given(views_and_shapes())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_matrices_are_those_of_an_index_and_the_way_back_is_exact(drawn):
    view, shape, order, lengths, names = drawn
    # With the axes in any order in memory.
    weight = torch.randn(shape).permute(order).contiguous().permute([order.index(axis) for axis in range(len(shape))])
    of_kind = [[name for name in names if name[0] in kind] for kind in ("k", "o", "ihw")]
    expected = np.zeros([math.prod(lengths[name] for name in own) for own in of_kind], dtype=np.float32)
    values = weight.reshape([lengths[name] for name in names]).numpy()
    for index, value in np.ndenumerate(values):
        at = dict(zip(names, index, strict=True))
        place = [np.ravel_multi_index([at[n] for n in own], [lengths[n] for n in own]) if own else 0 for own in of_kind]
        expected[tuple(place)] = value
    assert torch.equal(view.matrices(weight), torch.from_numpy(expected))
    new = torch.randn(expected.shape)
    view.write_(weight, new)
    assert torch.equal(view.matrices(weight), new)
    assert view.split(weight).tensor.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


@given(views_and_shapes())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_each_row_and_each_column_become_matrices(drawn):
    view, shape, _, _, names = drawn
    weight = torch.randn(shape)
    matrices = view.matrices(weight)
    k, m, n = matrices.shape
    views = [(view.each_row(weight), matrices.norm(dim=2))]
    # A column has the columns of one input channel, which is the outermost axis of the columns or the only one here.
    if [name for name in names if name in "ihw"][:1] in (["i"], []):
        d_in = view.channels(weight)[1]
        views.append((view.each_column(weight), matrices.reshape(k, m, d_in, n // d_in).norm(dim=(1, 3))))
    for each, expected in views:
        split = each.split(weight)
        assert split.tensor.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        assert each.count == expected.numel()
        norms = split.matrices().norm(dim=(1, 2))
        torch.testing.assert_close(norms.sort().values, expected.flatten().sort().values)


def test_a_view_of_rows_does_not_fit_another_weight():
    view = MatrixView("o i").each_row(torch.zeros(6, 4))
    with pytest.raises(EinopsError):
        view.split(torch.zeros(12, 4))
    assert MatrixView("i o h w").each_column(torch.zeros(6, 4, 2, 2)).matrix_shape(torch.zeros(6, 4, 2, 2)) == (4, 4)


def test_a_fused_qkv_with_its_heads_outermost():
    weight = torch.randn(4 * 3 * 2, 5)
    view = MatrixView("(o1 k o2) i", count=3, lengths={"o1": 4})
    rows = [torch.arange(head * 6 + 2, head * 6 + 4) for head in range(4)]
    assert torch.equal(view.matrices(weight)[1], weight[torch.cat(rows)])
    assert view.matrix_shape(weight) == view.channels(weight) == (8, 5)
    same, other = (MatrixView("(o1 k o2) i", 3, lengths) for lengths in ((("o1", 4),), {"o1": 2}))
    assert len({view, same, other}) == 2


@pytest.mark.parametrize(
    ("axes", "count", "lengths", "error", "text"),
    [
        ("(o1 k o2) i", 3, {}, ValueError, "lengths must say how long all but one of o1, o2 are"),
        ("(k1 k2 o) i", 6, {"o": 2}, ValueError, "lengths must say how long all but one of k1, k2 are"),
        ("k1 k2 o", 6, {}, ValueError, "lengths must say how long all but one of k1, k2 are"),
        ("(k1 k2 o) i", 6, {"k1": 4}, ValueError, "the lengths of k1, k2 must multiply to count"),
        ("(k o) i", 6, {"k": 3}, ValueError, "the lengths of k must multiply to count"),
        ("(k o) i", 6, {"heads": 3}, ValueError, "lengths must be 1 or more, of axes that are named in axes"),
        ("(o1 k o2) i", 6, {"o1": 0}, ValueError, "lengths must be 1 or more"),
        ("(o1 k o2) i", 6, {"o1": 1.5}, TypeError, "lengths must map names of axes to numbers"),
        ("(o1 k o2) i", 6, 4, TypeError, "lengths must map names of axes to numbers"),
    ],
)
def test_lengths_that_cannot_be_read_are_refused(axes, count, lengths, error, text):
    with pytest.raises(error, match=text):
        MatrixView(axes, count, lengths)


def test_names_that_only_begin_like_those_of_matrices_and_outputs_are_columns():
    assert MatrixView("o i kh kw").matrix_shape(torch.zeros(6, 4, 3, 2)) == (6, 24)


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
