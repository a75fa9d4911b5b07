"""Every solver against torch.linalg in float64, where the answer is exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specscale.block import Block, dominant_subspace, second_value
from specscale.linalg import unit
from specscale.random import normal
from specscale.solvers import SVD, DenseMatrices, Power

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 3), (60, 49), (49, 60), (80, 65), (65, 80), (200, 80), (80, 200), (64, 576)]


def random_matrices(m, n, seed, dtype=torch.float64):
    return torch.randn(2, m, n, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def solve(solver, matrices):
    state = solver.init_state(torch.arange(len(matrices)), matrices.shape[1:], matrices.dtype)
    return solve_on(solver, matrices, state, to_convergence=True)


def solve_on(solver, matrices, state, **options):
    matrices = DenseMatrices(matrices) if isinstance(matrices, torch.Tensor) else matrices
    (solution,) = solver.solve([matrices], [state], **options)
    return solution


def with_spike(weight, sizes, generator):
    """The matrices with others of rank one and of these norms added."""
    left, right = (unit(torch.randn(len(weight), side, generator=generator)) for side in weight.shape[1:])
    return weight + sizes[:, None, None] * left[..., None] * right[:, None]


def put_back(weight, triple, target):
    """The matrices after a spectral step."""
    return weight + (target - triple.value)[:, None, None] * triple.left[..., None] * triple.right[:, None]


@pytest.mark.parametrize("solver", [Block(), Block(width=4), SVD()], ids=repr)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_exact_svd(solver, shape):
    matrices = random_matrices(*shape, seed=0)
    exact = torch.linalg.svdvals(matrices)
    triple, _ = solve(solver, matrices)
    torch.testing.assert_close(triple.value, exact[:, 0], rtol=1e-8, atol=0)
    if min(shape) > 1:
        torch.testing.assert_close(triple.next_value, exact[:, 1], rtol=1e-4, atol=0)
    image = (matrices @ triple.right[..., None])[..., 0]
    residual = (image - triple.value[:, None] * triple.left).norm(dim=-1)
    assert (residual <= 2e-5 * triple.value).all()


class RowShards:
    """Matrices whose rows are in several places: products with the transpose are sums, and nothing is gathered."""

    scale, sums, image_sums = None, (), ()

    def __init__(self, tensor, is_transposed=False):
        self.tensor, self.is_transposed = tensor, is_transposed
        self.shards = tensor.split(tensor.shape[1] // 3, dim=1)
        self.dtype = tensor.dtype
        self.shape = tensor.mT.shape if is_transposed else tensor.shape

    @property
    def mT(self):
        return RowShards(self.tensor, not self.is_transposed)

    @property
    def block_on_rows(self):
        return self.shape[1] < self.shape[2]

    def once(self, numbers):
        return numbers

    def matmat(self, columns):
        return self.reduce(columns) if self.is_transposed else self.map(columns)

    def rmatmat(self, columns):
        return self.map(columns) if self.is_transposed else self.reduce(columns)

    def map(self, columns):
        return torch.cat([shard @ columns for shard in self.shards], dim=1)

    def reduce(self, columns):
        parts = columns.split([shard.shape[1] for shard in self.shards], dim=1)
        return sum(shard.mT @ part for shard, part in zip(self.shards, parts, strict=True))


@pytest.mark.parametrize("shape", [(200, 80), (80, 200)], ids=str)
def test_the_block_needs_nothing_of_a_large_matrix_but_its_products(shape):
    matrices = random_matrices(*shape, seed=0)
    state = Block().init_state(torch.arange(2), shape, matrices.dtype)
    expected, _ = solve(Block(), matrices)
    triple, after = solve_on(Block(), RowShards(matrices), state, to_convergence=True)
    torch.testing.assert_close(triple.value, expected.value, rtol=1e-8, atol=0)
    drift = matrices + 1e-3 * random_matrices(*shape, seed=1)
    triple, _ = solve_on(Block(), RowShards(drift), after)
    torch.testing.assert_close(triple.value, torch.linalg.svdvals(drift)[:, 0], rtol=1e-6, atol=0)


def test_power_iteration_agrees_where_there_is_a_gap():
    matrices = random_matrices(30, 40, seed=1)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values[:, 0], values[:, 1] = 20.0, 15.0
    triple, state = solve(Power(), left @ torch.diag_embed(values) @ right)
    torch.testing.assert_close(triple.value, values[:, 0], rtol=1e-10, atol=0)
    torch.testing.assert_close(triple.next_value, values[:, 1], rtol=1e-6, atol=0)
    assert state["age"].tolist() == [1, 1]


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 90), n=st.integers(1, 90), rank=st.integers(1, 90), exponent=st.integers(-20, 20))
def test_block_survives_any_rank_and_scale(m, n, rank, exponent):
    generator = torch.Generator().manual_seed(m * 100 + n)
    a, b = torch.randn(1, m, rank, generator=generator), torch.randn(1, rank, n, generator=generator)
    matrices = (a @ b) / rank * 10.0**exponent
    exact = torch.linalg.svdvals(matrices.double())[:, 0]
    triple, _ = solve(Block(width=4), matrices)
    torch.testing.assert_close(triple.value.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("solver", [Block(), Power(50), SVD()], ids=repr)
@pytest.mark.parametrize("shape", [(8, 5), (70, 60), (90, 80)], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_matrix_says_so_and_leaves_its_neighbour_alone(solver, shape, bad):
    matrices = random_matrices(*shape, seed=2)
    expected = solve(solver, matrices)[0].value[1]
    state = solver.init_state(torch.arange(2), matrices.shape[1:], matrices.dtype)
    matrices[0, 1, 2] = bad
    triple, after = solve_on(solver, matrices, state, to_convergence=True)
    assert not triple.value[0].isfinite()
    assert triple.num_iterations.max() < 100, "there is nothing to wait for"
    torch.testing.assert_close(triple.value[1], expected, rtol=1e-6, atol=0)
    assert all(value.isfinite().all() for value in after.values())


def test_a_cold_block_converges_in_float32_without_running_to_its_limit():
    matrices = random_matrices(300, 200, seed=7, dtype=torch.float32)
    triple, _ = solve(Block(), matrices)
    assert triple.num_iterations.max() < 60
    torch.testing.assert_close(triple.value, torch.linalg.svdvals(matrices)[:, 0], rtol=1e-5, atol=0)


def test_equal_singular_values_are_no_breakdown():
    q = torch.linalg.qr(random_matrices(120, 100, seed=3, dtype=torch.float32)).Q
    triple, _ = solve(Block(), 3 * q)
    torch.testing.assert_close(triple.value, torch.tensor([3.0, 3.0]), rtol=1e-5, atol=0)


def test_the_noise_is_normal_and_a_function_of_its_key():
    draws = normal(torch.tensor([7, 8]), (100_000,), torch.float64)
    assert torch.equal(draws, normal(torch.tensor([7, 8]), (100_000,), torch.float64))
    assert draws.mean(dim=1).abs().max() < 0.02
    assert (draws.std(dim=1) - 1).abs().max() < 0.02
    assert torch.corrcoef(draws)[0, 1].abs() < 0.02


def orthonormal(rows, columns, generator):
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def test_a_converged_block_finds_the_value_that_overtakes_it_from_outside():
    generator = torch.Generator().manual_seed(4)
    left, right = orthonormal(120, 90, generator), orthonormal(90, 90, generator)
    values = torch.linspace(1, 0.1, 90, dtype=torch.float64)
    matrices = ((left * values) @ right.T)[None]
    solver = Block(width=8)
    triple, state = solve(solver, matrices)
    # Blind the block to one singular vector entirely: no product with it will ever show that direction.
    hidden = right[:, 40]
    state["basis"] = state["basis"] - hidden[:, None] * (hidden @ state["basis"])
    values[40] = 1.5
    matrices = ((left * values) @ right.T)[None]
    found = []
    for _ in range(40):
        triple, state = solve_on(solver, matrices, state)
        found.append(triple.value.item())
    assert found[0] < 1.01, "the case is what it says"
    assert found[-1] == pytest.approx(1.5, rel=1e-6)


def test_a_jump_of_the_weight_is_solved_as_from_a_cold_start():
    generator = torch.Generator().manual_seed(5)
    solver = Block(max_iterations=2)
    before, after = (torch.randn(1, 300, 200, generator=generator, dtype=torch.float64) for _ in range(2))
    _, state = solve(solver, before)
    # A first solve is thorough in any case: here it is over.
    _, state = solve_on(solver, before, state)
    triple, _ = solve_on(solver, after, state)
    assert triple.num_iterations.max() > solver.max_iterations
    torch.testing.assert_close(triple.value, torch.linalg.svdvals(after)[:, 0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("solver", [Block(), Power(50, warm=True), Power(50), SVD()], ids=repr)
def test_a_matrix_that_was_zero_is_found_once_it_is_not(solver):
    generator = torch.Generator().manual_seed(0)
    _, state = solve(solver, torch.zeros(1, 90, 80))
    left, right = (torch.randn(1, side, generator=generator) for side in (90, 80))
    # First of rank one, which leaves no second vector either.
    for matrices in (left[..., None] * right[:, None], torch.randn(1, 90, 80, generator=generator)):
        for _ in range(3):
            triple, state = solve_on(solver, matrices, state)
        exact = torch.linalg.svdvals(matrices.double())[0]
        assert triple.value.item() == pytest.approx(exact[0].item(), rel=1e-2)
        assert triple.next_value.item() == pytest.approx(exact[1].item(), rel=0.1, abs=1e-4)


@pytest.mark.parametrize("size", [1.2, 3.0, *(pytest.param(size, marks=pytest.mark.slow) for size in (1.5, 30.0))])
def test_a_step_after_a_spike_ends_on_the_target(size):
    # The spike stands out by far, so that its value is soon exact, and its direction is not yet: put back among the
    # other values, which are close to the target, it would leave the norm off by what is missing of the direction.
    generator = torch.Generator().manual_seed(0)
    solver = Block()
    weight = torch.randn(4, 400, 300, generator=generator)
    triple, state = solve(solver, weight)
    target = triple.value
    _, state = solve_on(solver, weight, state)
    for _ in range(3):
        weight = with_spike(weight, size * target, generator)
        triple, state = solve_on(solver, weight, state)
        weight = put_back(weight, triple, target)
        norm = torch.linalg.matrix_norm(weight.double(), 2)
        # float32 has rounded the weight where the spike stood.
        torch.testing.assert_close(norm.float(), target, rtol=2e-6 * (1 + size), atol=0)


@pytest.mark.parametrize("size", [0.7, 1.5, 5.0])
def test_steps_that_do_not_look_catch_up_with_a_spike(size):
    generator = torch.Generator().manual_seed(0)
    solver = Block()
    weight = torch.randn(4, 400, 300, generator=generator)
    triple, state = solve(solver, weight)
    target = triple.value
    weight = with_spike(weight, size * target, generator)
    num_iterations = 1
    for bound in (0.04, 4e-3, 4e-4):
        triple, state = solve_on(solver, weight, state, num_iterations=num_iterations)
        weight = put_back(weight, triple, target)
        norm = torch.linalg.matrix_norm(weight.double(), 2)
        assert (norm / target - 1).abs().max() <= bound
        num_iterations = solver.next_num_iterations(num_iterations, triple.error.max().item())


@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(65, 130), n=st.integers(65, 130), seed=st.integers(0, 99), drift=st.sampled_from([1e-3, 1e-2, 0.1])
)
def test_block_follows_a_drifting_weight_that_is_scaled_at_every_step(m, n, seed, drift):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.linalg.qr(torch.randn(1, max(m, n), min(m, n), generator=generator)).Q
    weight = weight if m >= n else weight.mT
    solver = Block()
    _, state = solve(solver, weight)
    for _ in range(10):
        weight = weight + drift * torch.randn(1, m, n, generator=generator) / max(m, n) ** 0.5
        exact = torch.linalg.svdvals(weight.double())[:, 0]
        triple, state = solve_on(solver, weight, state)
        # Noise on equal singular values is the hardest drift: what a gradient does to a weight has far lower rank.
        assert ((triple.value / exact - 1).abs() <= max(drift / 2, 1e-3)).all()
        assert (triple.value <= exact * (1 + 1e-5)).all()
        weight = put_back(weight, triple, 1)
        held = triple.left.double()[:, None] @ weight.double() @ triple.right.double()[..., None]
        assert (held - 1).abs().item() <= 1e-5


@pytest.mark.parametrize("rank", [2, 8, 120])
@pytest.mark.parametrize("drift", [3e-3, 3e-2])
def test_the_estimated_error_is_of_the_size_of_the_true_one(drift, rank):
    generator = torch.Generator().manual_seed(0)
    weight = torch.linalg.qr(torch.randn(1, 200, 120, generator=generator)).Q
    solver = Block()
    _, state = solve(solver, weight)
    ratios = []
    for _ in range(40):
        a, b = torch.randn(1, 200, rank, generator=generator), torch.randn(1, rank, 120, generator=generator)
        weight = weight + drift * (a @ b) / (200 * rank) ** 0.5
        exact = torch.linalg.svdvals(weight.double())[:, 0]
        triple, state = solve_on(solver, weight, state, num_iterations=1)
        ratios.append(((1 - triple.value / exact) / triple.error).item())
        weight = put_back(weight, triple, 1)
    assert 0.2 < torch.tensor(ratios).median() < 5


@pytest.mark.parametrize("spread", [1e-6, 1e-2, 1.0])
def test_the_dominant_subspace_has_the_first_eigenvector_in_front(spread):
    generator = torch.Generator().manual_seed(6)
    basis = orthonormal(32, 32, generator)
    values = 1 - spread * torch.linspace(0, 1, 32, dtype=torch.float64) ** 0.5
    square = ((basis * values) @ basis.T)[None]
    identity = torch.eye(32, dtype=torch.float64)
    X, squares, lengths = dominant_subspace(square, identity[None], 16)
    torch.testing.assert_close(X.mT @ X, identity[None, :16, :16], rtol=0, atol=1e-6)
    torch.testing.assert_close(squares, X.mT @ square @ X, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lengths, torch.ones(1, 16, dtype=torch.float64), rtol=0, atol=1e-6)
    assert squares[0, 0, 0] == pytest.approx(1.0, rel=1e-6)
    assert second_value(squares)[0] ** 2 == pytest.approx(values[1].item(), rel=5e-3)
    assert second_value(squares)[0] ** 2 <= values[0] * (1 + 1e-12)


@pytest.mark.parametrize(
    ("needed", "error", "planned"),
    [(None, None, 2), (0, 0.0, 1), (1, 1e-4, 2), (2, 1e-2, 5), (2, float("inf"), 7), (8, 1.0, 8), (1, float("nan"), 2)],
)
def test_the_next_step_has_one_iteration_more_than_was_needed(needed, error, planned):
    assert Block().next_num_iterations(needed, error) == planned


@pytest.mark.parametrize("bad", [{"width": 1}, {"tolerance": 0.0}, {"max_iterations": 0}])
def test_a_block_that_cannot_work_is_refused(bad):
    with pytest.raises(ValueError, match="width must be at least 2"):
        Block(**bad)


@pytest.mark.parametrize("shape", [(64, 64), (300, 200)], ids=str)
@pytest.mark.parametrize("excess", [1e-4, 1e-3])
def test_residuals_in_one_direction_are_no_breakdown(shape, excess):
    # Equal singular values and one above them, as one step from the orthogonal init leaves: beside that direction, the
    # residuals hold rounding alone.
    generator = torch.Generator().manual_seed(0)
    m, n = shape
    values = torch.ones(n, dtype=torch.float64)
    values[0] += excess
    matrices = torch.stack([(orthonormal(m, n, generator) * values) @ orthonormal(n, n, generator) for _ in range(4)])
    solver = Block()
    state = solver.init_state(torch.arange(4), shape, torch.float32)
    for num_iterations in (1, 3, None):
        options = {"num_iterations": num_iterations} if num_iterations else {"to_convergence": True}
        triple, after = solve_on(solver, matrices.float(), state, **options)
        torch.testing.assert_close(triple.value, torch.full((4,), 1 + excess), rtol=1e-4, atol=0)
        basis = after["basis"].double()[..., :-1]
        expected = torch.eye(15, dtype=torch.float64).expand(4, -1, -1)
        torch.testing.assert_close(basis.mT @ basis, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("drift", "rank"), [(1e-4, 1), (1e-4, 4), (0.1, 4)])
@pytest.mark.parametrize("num_iterations", [None, 1])
def test_steps_after_the_orthogonal_init_follow_a_drift_of_low_rank(drift, rank, num_iterations):
    generator = torch.Generator().manual_seed(0)
    weight = torch.stack([orthonormal(300, 200, generator) for _ in range(2)]).float()
    solver = Block()
    _, state = solve(solver, weight)
    for _ in range(8):
        a, b = torch.randn(2, 300, rank, generator=generator), torch.randn(2, rank, 200, generator=generator)
        change = a @ b
        weight = weight + drift * change / torch.linalg.matrix_norm(change, 2)[:, None, None]
        exact = torch.linalg.svdvals(weight.double())[:, 0]
        triple, state = solve_on(solver, weight, state, num_iterations=num_iterations)
        assert ((triple.value / exact - 1).abs() <= max(2e-4, drift / 5)).all()
        weight = put_back(weight, triple, 1)


@pytest.mark.parametrize("shape", [(300, 20), (20, 300), (1, 7), (90, 80)], ids=str)
def test_a_matrix_of_rank_one_has_a_second_value_of_rounding(shape):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(20, side, generator=generator) for side in shape)
    triple, _ = solve(Block(), left[..., None] * right[:, None])
    torch.testing.assert_close(triple.value, left.norm(dim=-1) * right.norm(dim=-1))
    assert (triple.next_value <= 1e-3 * triple.value).all()
