"""The audit against torch.linalg in float64, and the theory behind its larger matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from specscale import NonFiniteWeightError, apply_norm_scaling, bounds
from specscale.bounds import lanczos, lanczos_steps, spectral_bounds


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 60),
    n=st.integers(1, 60),
    rank=st.integers(1, 60),
    exponent=st.integers(-100, 100),
    steps=st.integers(1, 60),
)
def test_lanczos_stays_below_and_ends_at_the_norm(m, n, rank, exponent, steps):
    generator = torch.Generator().manual_seed(m * 100 + n)
    a, b = (torch.randn(2, *size, generator=generator, dtype=torch.float64) for size in ((m, rank), (rank, n)))
    matrices, start = a @ b * 10.0**exponent, torch.randn(2, n, generator=generator, dtype=torch.float64)
    exact = torch.linalg.svdvals(matrices)[:, 0]
    assert (lanczos(matrices, start, min(steps, n)) <= exact * (1 + 1e-12)).all()
    # One step more than there are values, for the part of the start that `W` maps to zero.
    whole = min(min(m, rank) + 1, n)
    torch.testing.assert_close(lanczos(matrices, start, whole), exact, rtol=1e-9, atol=0)


def test_a_large_matrix_lies_within_its_bounds_whatever_its_spectrum(monkeypatch):
    monkeypatch.setattr(bounds, "EXACT_SIDE", 64)
    left, _, right = torch.linalg.svd(torch.randn(1, 400, 300, dtype=torch.float64), full_matrices=False)
    # Crowded, graded, equal, and one value alone above a crowd.
    spectra = [torch.linspace(1, 0.99, 300), torch.logspace(0, -8, 300), torch.ones(300), torch.ones(300)]
    spectra[3][0] = 1.001
    for values in spectra:
        matrices = left @ torch.diag(values.double()) @ right
        for tall in (matrices, matrices.mT):
            found = spectral_bounds(tall, torch.tensor([5]), tolerance=1e-2, miss=1e-6)
            assert (found.method, found.miss) == ("lanczos", 1e-6)
            assert found.lower * (1 - 1e-12) <= values[0].double() <= found.upper


def test_the_steps_are_those_of_the_theorem():
    steps = lanczos_steps(2000, tolerance=1e-3, miss=1e-6)
    relative = 1 - 0.999**2

    def miss(num_steps):
        return 1.648 * math.sqrt(2000) * math.exp(-math.sqrt(relative) * (2 * num_steps - 1))

    assert miss(steps) <= 1e-6 < miss(steps - 1)


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_the_audit_tells_the_excess_and_what_the_solver_missed(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, 3, groups=2), nn.Flatten(), nn.Linear(48, 100))
    scaling = apply_norm_scaling(model, norm, target=0.5)
    scaling.step()
    audit = scaling.audit()
    kind = "fro" if norm == "frobenius" else 2
    for one, weight in zip(audit.certificates, scaling.weights, strict=True):
        matrices = weight.scaling.view.matrices(weight.parameter.detach()).double()
        exact = torch.linalg.matrix_norm(matrices, kind)
        assert one.norm == pytest.approx(exact.max().item(), rel=1e-12)
        assert one.excess == pytest.approx((exact / 0.5 - 1).max().item(), abs=1e-12)
        assert abs(one.error) <= (1e-5 if norm == "frobenius" else 1e-2)
        assert (one.miss, one.method) == (0, "sum" if norm == "frobenius" else "svd")
    assert [one.count for one in audit.certificates] == [2, 1]
    assert "every norm is exact in float64" in str(audit)

    # A weight that is written behind the scaling's back is what an audit is for.
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.warns(UserWarning, match="the weight of '2' has changed since it was last scaled"):
        assert scaling.audit().worst_error == pytest.approx(0.5, abs=1e-2)
    with pytest.warns(UserWarning, match="the weight of '2' has changed since it was last scaled"):
        metrics = scaling.metrics()
    assert metrics["norm/2"] == pytest.approx(audit.certificates[1].norm, rel=1e-2)


def test_the_audit_states_its_probability_of_a_miss(monkeypatch):
    monkeypatch.setattr(bounds, "EXACT_SIDE", 64)
    scaling = apply_norm_scaling(nn.Sequential(nn.Linear(150, 120), nn.Linear(120, 40)))
    audit = scaling.audit(tolerance=0.05, miss=1e-3)
    assert [one.method for one in audit.certificates] == ["lanczos", "svd"]
    assert audit.miss == 1e-3
    assert "a norm by lanczos may be larger by 5e-02, and by more with probability 1e-03" in str(audit)


def test_what_cannot_be_audited_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    scaling = apply_norm_scaling(model)
    with pytest.raises(ValueError, match=r"audit: tolerance and miss must lie between 0 and 1, found 0 and 1e-06"):
        scaling.audit(tolerance=0)
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteWeightError, match="audit: the weight of '0' holds NaN or infinity"):
        scaling.audit()
