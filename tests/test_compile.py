"""The scaling step under torch.compile: one graph, which holds the norms."""

import pytest
import torch
from test_constraint import matrices
from torch import nn

from specscale import apply_norm_scaling

TWO = [(90, 80), (80, 10)]
"""One that the block solves, and one that is solved exactly."""
# The lowering of aot_eager is that of every compiling backend, and takes longer than the tracing.
SLOW = [
    pytest.param(norm, "aot_eager", TWO, marks=pytest.mark.slow) for norm in ("spectral", "normalize", "orthogonal")
]


@pytest.mark.parametrize(
    ("norm", "backend", "sizes"), [("frobenius", "aot_eager", TWO), ("spectral", "eager", TWO[:1]), *SLOW]
)
def test_the_step_is_one_graph_that_is_compiled_once_and_holds(norm, backend, sizes):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*size) for size in sizes))
    scaling = apply_norm_scaling(model, norm, init="orthogonal")
    # A machine's C++ compiler is not what is tested here.
    step = torch.compile(scaling.step, fullgraph=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    for count in range(4):
        with torch.no_grad():
            for weight in scaling.weights:
                drift = torch.randn(weight.parameter.shape, generator=generator)
                weight.parameter.add_(drift, alpha=0.02 * weight.parameter.shape[0] ** -0.5)
        # The second step finds a state that has been solved before: no graph may depend on that.
        with torch.compiler.set_stance("fail_on_recompile" if count else "default"):
            step()
        for weight in scaling.weights:
            target = weight.scaling.target.double()
            if norm == "frobenius":
                held = torch.linalg.matrix_norm(matrices(weight))
            else:
                values = torch.linalg.svdvals(matrices(weight))
                # The first value is on the target, or one that the step has not touched is above it.
                held = values.sub(target[:, None]).abs().amin(-1) + target
                assert (values[:, 0] >= target * (1 - 1e-5)).all(), weight.name
                assert abs(scaling.metrics()[f"norm/{weight.name}"] / values[:, 0].max() - 1) < 0.05
            # Spectral: as near as the solver's triple is to a singular one.
            torch.testing.assert_close(held, target, rtol=1e-5 if norm == "frobenius" else 1e-3, atol=0)


@pytest.mark.slow
def test_a_compiled_cap_is_one_graph_too():
    torch.compiler.reset()
    torch.manual_seed(0)
    scaling = apply_norm_scaling(nn.Sequential(nn.Linear(90, 80), nn.Linear(80, 10)), "cap", target=0.5)
    step = torch.compile(scaling.step, fullgraph=True, backend="aot_eager")
    for count in range(3):
        with torch.no_grad():
            for weight in scaling.weights:
                weight.parameter.mul_(1.2)
        with torch.compiler.set_stance("fail_on_recompile" if count else "default"):
            step()
        norms = [torch.linalg.svdvals(matrices(weight)).max().item() for weight in scaling.weights]
        assert max(norms) <= 0.5 * (1 + 1e-3)
        assert min(norms) > 0.4
