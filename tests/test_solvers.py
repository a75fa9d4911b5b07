"""Every solver against torch.linalg in float64, where the answer is exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specscale.algebra import normal
from specscale.solvers import SVD, Block, Power

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 3), (60, 49), (49, 60), (200, 80), (80, 200), (64, 576)]


def random_matrices(m, n, seed, dtype=torch.float64):
    return torch.randn(2, m, n, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def solve(solver, matrices):
    state = solver.cold(matrices, torch.arange(len(matrices)))
    return solver.solve(matrices, state, to_convergence=True)


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


def test_power_iteration_agrees_where_there_is_a_gap():
    matrices = random_matrices(30, 40, seed=1)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values[:, 0], values[:, 1] = 20.0, 15.0
    triple, state = solve(Power(), left @ torch.diag_embed(values) @ right)
    torch.testing.assert_close(triple.value, values[:, 0], rtol=1e-10, atol=0)
    torch.testing.assert_close(triple.next_value, values[:, 1], rtol=1e-6, atol=0)
    assert state["key"].tolist() == [1, 2]


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
@pytest.mark.parametrize("shape", [(8, 5), (70, 60)], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_matrix_says_so_and_leaves_its_neighbour_alone(solver, shape, bad):
    matrices = random_matrices(*shape, seed=2)
    expected = solve(solver, matrices)[0].value[1]
    state = solver.cold(matrices, torch.arange(2))
    matrices[0, 1, 2] = bad
    triple, after = solver.solve(matrices, state, to_convergence=True)
    assert not triple.value[0].isfinite()
    torch.testing.assert_close(triple.value[1], expected, rtol=1e-6, atol=0)
    assert all(value.isfinite().all() for value in after.values())


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


@pytest.mark.parametrize("bad", [{"width": 1}, {"tolerance": 0.0}, {"max_iterations": 0}])
def test_a_block_that_cannot_work_is_refused(bad):
    with pytest.raises(ValueError, match="width must be at least 2"):
        Block(**bad)
