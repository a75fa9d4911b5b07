"""Where the parts of a sharded weight's matrices lie: all processes of a mesh, one after another in this one."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from test_views import views_and_shapes
from threads import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor import _utils as torch_places
from torch.distributed.tensor.placement_types import Partial, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from specscale import Block, MatrixView, shards
from specscale.constraints import CONSTRAINTS
from specscale.errors import Refusal
from specscale.linalg import gram
from specscale.norms import Measurement
from specscale.shards import Part, ShardedMatrices
from specscale.solvers import Triple


class Mesh:
    """What the layout asks of a device mesh, as the process at a coordinate sees it; a group is the dimensions."""

    def __init__(self, sizes, coordinate):
        self.sizes, self.coordinate, self.ndim = sizes, coordinate, len(sizes)
        self.mesh_dim_names = tuple("abc"[: self.ndim])

    def get_coordinate(self):
        return self.coordinate

    def size(self, dim):
        return self.sizes[dim]

    def get_group(self, dim=None):
        return (self.mesh_dim_names if dim is None else self.mesh_dim_names[dim],)

    def __getitem__(self, names):
        found = Mesh(self.sizes, self.coordinate)
        found.mesh_dim_names = names
        return found

    def _flatten(self):
        return self


def dims_of(group):
    """The dimensions of the mesh that a sum over these processes is taken over."""
    return {
        "abc".index(name) for own in group for part in own for name in (part if isinstance(part, tuple) else [part])
    }


class Simulated:
    """A weight in the shards of all processes of a mesh."""

    def __init__(self, weight, view, sizes, placements):
        self.weight, self.view = weight, view
        self.coordinates = list(itertools.product(*map(range, sizes)))
        self.is_replicated = [one.is_replicate() for one in placements]
        self.layouts = {
            at: shards._layout(tuple(weight.shape), Mesh(sizes, at), placements, view) for at in self.coordinates
        }
        self.locals = {at: weight[layout.place].clone() for at, layout in self.layouts.items()}
        self.matrices = {at: ShardedMatrices(layout, self.locals[at]) for at, layout in self.layouts.items()}
        self.first = self.coordinates[0]

    def summed(self, numbers, dims):
        """What each process has after a sum over dimensions of the mesh."""
        found = {}
        for at in self.coordinates:
            others = [to for to in self.coordinates if all(d in dims or to[d] == at[d] for d in range(len(at)))]
            found[at] = sum(numbers[to] for to in others)
        return found


VIEWS = [
    (MatrixView("o i"), [(7, 5), (1, 9), (9, 1), (4, 4), (13, 6)]),
    (MatrixView("(k o) i", 3), [(12, 5), (15, 4), (3, 4)]),
    (MatrixView("(o1 k o2) i", 3, {"o1": 2}), [(12, 5), (30, 4)]),
    (MatrixView("i o h w"), [(5, 4, 2, 3), (4, 7, 1, 1)]),
    (MatrixView("(k o) i h w", 2), [(8, 3, 2, 2), (6, 2, 1, 3)]),
    (MatrixView("k i o", 3), [(3, 5, 4), (3, 2, 7)]),
    (MatrixView("k o i", 5), [(5, 3, 4)]),
]


@st.composite
def cases(draw):
    if draw(st.booleans()):
        view, shape, *_ = draw(views_and_shapes())
    else:
        view, shapes = draw(st.sampled_from(VIEWS))
        shape = draw(st.sampled_from(shapes))
    part = draw(st.sampled_from(["matrix", "matrix", "row", "column"]))
    if part != "matrix":
        view = getattr(view, f"each_{part}")(torch.empty(shape))
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    dims = [draw(st.integers(0, len(shape) - 1)) for _ in sizes]
    placements = [Shard(dim) for dim in dims]
    if len(sizes) == 2:
        kind = draw(st.sampled_from(["both", "strided", "first", "second"]))
        if kind == "strided":
            placements[0] = _StridedShard(dims[1], split_factor=sizes[1])
        elif kind != "both":
            placements[kind == "first"] = Replicate()
    # An axis that is rows and columns must not be split.
    split = [set(view.groups[one.dim]) for one in placements if not one.is_replicate()]
    assume(not any(own & set(view.row_names) and own & set(view.column_names) for own in split))
    return view, shape, sizes, tuple(placements)


def simulated(case, seed=0):
    view, shape, sizes, placements = case
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Simulated(weight, view, sizes, placements)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(cases())
@example((MatrixView("o i"), (10, 64), (4,), (Shard(0),)))
@example((MatrixView("o i"), (1, 9), (4,), (Shard(0),)))
@example((MatrixView("(k o) i", 3), (15, 4), (2, 4), (_StridedShard(0, split_factor=4), Shard(0))))
def test_the_local_parts_cover_every_element_once(case):
    every = simulated(case)
    seen = torch.zeros_like(every.weight)
    for at, layout in every.layouts.items():
        if not any(own and index for own, index in zip(every.is_replicated, at, strict=True)):
            seen[layout.place] += 1
    assert torch.equal(seen, torch.ones_like(seen))
    dense = every.view.matrices(every.weight)
    total = every.summed({at: one.in_place() for at, one in every.matrices.items()}, dims_of(layout.sums))
    assert all(torch.equal(own, dense) for own in total.values())


@settings(deadline=None, max_examples=60, derandomize=True)
@given(cases())
def test_a_process_has_the_part_that_torch_gives_it(case):
    _, shape, sizes, placements = case
    for at, layout in simulated(case).layouts.items():
        lengths, offsets = torch_places._compute_local_shape_and_global_offset(shape, sizes, list(at), placements)
        assert [one.stop - one.start for one in layout.place] == list(lengths)
        if all(lengths):
            assert [one.start for one in layout.place] == list(offsets)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(cases())
@example((MatrixView("o i"), (10, 64), (4,), (Shard(0),)))
@example((MatrixView("o i"), (12, 64), (2, 2), (Shard(0), Shard(1))))
@example((MatrixView("(k o) i", 3), (12, 5), (4, 2), (Shard(0), Shard(1))))
@example((MatrixView("i o h w"), (5, 4, 2, 3), (2, 3), (Shard(0), Shard(1))))
def test_the_sums_over_all_processes_are_those_of_the_whole(case):
    every = simulated(case)
    layout = every.layouts[every.first]
    sharded = {at: one.mT if one.block_on_rows else one for at, one in every.matrices.items()}
    dense = every.view.matrices(every.weight)
    dense = dense.mT if layout.block_on_rows else dense
    k, _, n = dense.shape
    assert {one.shape for one in sharded.values()} == {tuple(dense.shape)}
    assert n == (layout.other_side or min(layout.shape))
    V = torch.randn(k, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sums, image_sums = dims_of(layout.sums), dims_of(layout.image_sums)
    Y = every.summed({at: one.matmat(V) for at, one in sharded.items()}, image_sums)
    for at, one in sharded.items():
        # Where processes add up their images, one without columns has those of the others.
        is_own = one.rows_of(torch.ones_like(dense @ V)) if image_sums else 1
        assert torch.allclose(Y[at] * is_own, one.rows_of(dense @ V))
    products = every.summed({at: one.rmatmat(Y[at]) for at, one in sharded.items()}, sums)
    squares = every.summed({at: one.once(gram(Y[at])) for at, one in sharded.items()}, sums)
    norms = every.summed({at: one.square_sums(torch.float64) for at, one in sharded.items()}, sums)
    for at in every.coordinates:
        assert torch.allclose(products[at], dense.mT @ dense @ V)
        assert torch.allclose(squares[at], gram(dense @ V))
        assert torch.allclose(norms[at], dense.square().sum((-2, -1)))
    if not image_sums:
        grams = every.summed({at: gram(one.dense()) for at, one in sharded.items()}, sums)
        assert all(torch.allclose(own, gram(dense)) for own in grams.values())
        largest = torch.stack([one._largest() for one in sharded.values()]).amax(0)
        assert torch.equal(largest, dense.abs().amax((-2, -1)))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(cases(), st.sampled_from(["frobenius", "spectral", "normalize"]))
def test_what_is_written_to_the_parts_is_what_is_written_to_the_whole(case, name):
    every = simulated(case)
    layout = every.layouts[every.first]
    matrices = every.view.matrices(every.weight)
    k = len(matrices)
    U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
    zero = torch.zeros(k, dtype=torch.float64)
    triple = Triple(S[:, 0], U[:, :, 0], Vh[:, 0], zero, zero, zero, zero, None)
    target, skip = torch.linspace(1, 2, k, dtype=torch.float64), torch.arange(k) % 3 == 1
    constraint = CONSTRAINTS[name]()
    whole = every.weight.clone()

    def write(parts, own):
        factors = [own if name == "spectral" else None]
        constraint.project_(parts, Measurement(S[:, 0], zero, zero, zero, factors, []), target, skip)

    write([shards.WeightParts(k, [Part(every.view.split(whole), *3 * [slice(None)])])], triple)
    for at, one in every.matrices.items():
        own = one.mT if one.block_on_rows else one
        lies = triple.transposed() if layout.block_on_rows else triple
        lies = lies.with_left(own.rows_of)
        lies = lies.transposed() if layout.block_on_rows else lies
        parts = []
        for piece in every.layouts[at].pieces:
            sides = (piece.rows, piece.slot) if layout.block_on_rows else (piece.slot, piece.columns)
            split = every.view.split(every.locals[at][piece.place], dict(piece.lengths))
            parts.append(Part(split, piece.matrices, *sides))
        write([shards.WeightParts(k, parts, is_sharded=True)], lies)
        assert torch.allclose(every.locals[at], whole[every.layouts[at].place])


@pytest.mark.parametrize(
    ("placements", "coordinate", "text"),
    [
        ((Partial(),), (0,), r"is a sum that is still to be taken \(P.*\); redistribute it first"),
        ((Shard(0),), None, "is sharded over processes that this one is not among"),
    ],
)
def test_what_has_no_place_is_refused(placements, coordinate, text):
    with pytest.raises(Refusal, match=text):
        shards._place((4, 4), Mesh((2,), coordinate), placements)


def test_an_axis_of_rows_and_columns_is_refused():
    with pytest.raises(Refusal, match=r"along an axis that MatrixView.* reads as rows and as columns"):
        shards._layout((12, 5), Mesh((2,), (0,)), (Shard(0),), MatrixView("(o h) i", lengths={"h": 3}))


def solved(every, sizes, monkeypatch, steps=1):
    """What each of the processes finds in its weight by `steps` solves with the default solver, and the reductions."""
    ranks = Ranks(sizes, dims_of)
    monkeypatch.setattr("torch.distributed.all_reduce", ranks.all_reduce)
    solver = Block()
    keys = torch.arange(every.view.count)

    def solve(at):
        one = every.matrices[at].with_scale(None)
        m, n = every.layouts[at].shape
        state = solver.init_state(keys, (m, n), torch.float64, every.layouts[at].other_side)
        for _ in range(steps):
            (solution,) = solver.solve([one], [state])
            state = solution.state
        return solution

    return ranks.run(solve, every.coordinates), ranks


MANY = [
    ((64, 48), (8,), (Shard(0),)),
    ((48, 100), (8,), (Shard(0),)),
    ((33, 40), (8,), (Shard(0),)),
    ((20, 90), (8,), (Shard(0),)),
    ((96, 80), (2, 4), (Shard(1), Shard(0))),
    ((90, 80), (4, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ((130, 40), (64,), (Shard(0),)),
            ((20, 90), (64,), (Shard(0),)),
            ((96, 80), (8, 8), (Shard(1), Shard(0))),
            ((96, 80), (8, 8), (_StridedShard(0, split_factor=8), Shard(0))),
            ((80, 96), (4, 16), (Replicate(), Shard(0))),
        )
    ),
]


@pytest.mark.parametrize(("shape", "sizes", "placements"), MANY)
def test_many_processes_find_the_singular_triple_of_the_whole(shape, sizes, placements, monkeypatch):
    every = simulated((MatrixView("o i"), shape, sizes, placements))
    found, _ = solved(every, sizes, monkeypatch)
    U, S, Vh = torch.linalg.svd(every.weight)
    first = found[every.first]
    assert first.triple.value.item() == pytest.approx(S[0].item(), rel=1e-4)
    rows = torch.zeros(shape[0], dtype=torch.float64)
    columns = torch.zeros(shape[1], dtype=torch.float64)
    for at, solution in found.items():
        layout = every.layouts[at]
        assert torch.equal(solution.triple.value, first.triple.value)
        assert all(torch.equal(one, first.state[name]) for name, one in solution.state.items())
        for piece in layout.pieces:
            left, right = solution.triple.left[0], solution.triple.right[0]
            rows[piece.rows] = left[piece.rows] if layout.block_on_rows else left[piece.slot]
            columns[piece.columns] = right[piece.slot] if layout.block_on_rows else right[piece.columns]
    assert abs(rows @ U[:, 0]) > 1 - 1e-3
    assert abs(columns @ Vh[0]) > 1 - 1e-3
    assert rows @ every.weight @ columns == pytest.approx(S[0].item(), rel=1e-3)


def test_a_value_that_is_not_finite_is_known_to_all_processes(monkeypatch):
    for placements, sizes in (((Shard(0),), (8,)), ((Shard(1), Shard(0)), (4, 2))):
        every = simulated((MatrixView("o i"), (64, 48), sizes, placements))
        last = every.coordinates[-1]
        every.locals[last][-1, -1] = torch.nan
        found, _ = solved(every, sizes, monkeypatch)
        for solution in found.values():
            assert solution.triple.value.isnan().all()
            assert solution.triple.left.isfinite().all()
            assert all(one.isfinite().all() for one in solution.state.values())


def test_a_group_that_has_been_destroyed_is_forgotten():
    found = []
    for _ in range(2):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        weight = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)], src_data_rank=None)
        found.append(shards.layout_of(weight, MatrixView("o i")))
        assert found[-1].sums == (mesh.get_group(),)
        dist.destroy_process_group()
    assert found[0].sums != found[1].sums


@pytest.mark.slow
@pytest.mark.parametrize(("world", "rows"), [(8, 80), (64, 128)])
def test_many_processes_by_torchs_own_simulation(world, rows):
    """Where all shards are of one shape: torch runs one piece of code on the tensors of all processes."""
    local_tensor = pytest.importorskip("torch.distributed._local_tensor")
    weight = torch.randn(rows, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        layout = shards._layout((rows, 40), Mesh((world,), (0,)), (Shard(0),), MatrixView("o i"))
        layout = replace(layout, sums=(dist.group.WORLD,))
        solver = Block()
        state = solver.init_state(torch.zeros(1, dtype=torch.int64), (rows, 40), torch.float64)
        norm = torch.linalg.matrix_norm(weight).reshape(1)
        with local_tensor.LocalTensorMode(world):
            own = local_tensor.LocalTensor({rank: part.clone() for rank, part in enumerate(weight.chunk(world))})
            matrices = ShardedMatrices(layout, own).with_scale(norm)
            (solution,) = solver.solve([matrices], [state], num_iterations=3)
            values = [solution.triple.value._local_tensors[rank] for rank in range(world)]
            left = torch.cat([solution.triple.left._local_tensors[rank] for rank in range(world)], dim=1)
    finally:
        dist.destroy_process_group()
    U, S, _ = torch.linalg.svd(weight)
    assert all(torch.equal(value, values[0]) for value in values)
    assert values[0].item() == pytest.approx(S[0].item(), rel=1e-4)
    assert abs(left[0] @ U[:, 0]) > 1 - 1e-3
