"""Steps that are replayed from CUDA graphs, and what is said where there is none."""

import copy

import pytest
import torch
from test_constraint import matrices, net, train

from lib.scaling_checks import refuse_to_wait
from specscale import apply_norm_scaling


def test_without_cuda_a_warning_says_why_and_steps_hold():
    model = net()
    scaling = apply_norm_scaling(model, "frobenius", target=0.5)
    with pytest.warns(
        UserWarning, match="capture: no CUDA graph, since weights are on cpu; steps run as they are"
    ) as found:
        scaling.capture()
    assert found[0].filename == __file__
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaling.attach(optimizer)
    for _ in train(model, optimizer, 2):
        for weight in scaling.weights:
            norm = torch.linalg.matrix_norm(matrices(weight))
            torch.testing.assert_close(norm, torch.full_like(norm, 0.5), rtol=1e-6, atol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_a_replayed_step_is_the_step(norm):
    plain = net().cuda()
    scaling = apply_norm_scaling(plain, norm, init="orthogonal")
    model = copy.deepcopy(plain)
    replayed = type(scaling).of(model).capture()
    generator = torch.Generator("cuda").manual_seed(2)
    for _ in range(8):
        for mine, other in zip(scaling.weights, replayed.weights, strict=True):
            drift = torch.randn(mine.parameter.shape, generator=generator, device="cuda")
            with torch.no_grad():
                for parameter in (mine.parameter, other.parameter):
                    parameter.add_(drift, alpha=0.02 * len(drift) ** -0.5)
        scaling.step()
        with refuse_to_wait(torch.device("cuda")):
            replayed.step()
        torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)
    graphs = [graph for _, plan in replayed._step._plans._plans for graph in plan.graphs.values()]
    assert any(graph is not None for graph in graphs), "something was replayed"
