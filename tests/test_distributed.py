"""A model that is wrapped or sharded for several processes: in what order, and what is refused."""

import pytest
import torch
from held import off_target
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from specscale import apply_norm_scaling, is_norm_scaled, spectral_norms


@pytest.fixture(autouse=True)
def _group(tmp_path):
    """One process is a group too."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def net():
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_a_model_is_scaled_then_wrapped_then_unwrapped_then_removed(norm):
    scaling = apply_norm_scaling(model := net(), norm, init="orthogonal")
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=1e-2)
    scaling.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        assert max(map(off_target, scaling.weights)) < 1e-5
    trained = model(torch.ones(1, 8))
    del wrapped
    assert torch.equal(scaling.remove()(torch.ones(1, 8)), trained)


def test_a_wrapped_model_is_refused():
    wrapped = DistributedDataParallel(net())
    with pytest.raises(ValueError, match=r"the model is under DistributedDataParallel already.*scale the model first"):
        apply_norm_scaling(wrapped)
    assert not is_norm_scaled(wrapped)
    assert list(spectral_norms(wrapped)) == ["module.0", "module.2"]


def test_sharded_weights_are_refused():
    def shard(module, name):
        mesh = init_device_mesh("cpu", (1,))
        setattr(module, name, nn.Parameter(distribute_tensor(getattr(module, name), mesh)))

    model = net()
    shard(model[2], "weight")
    with pytest.raises(ValueError, match=r"apply_norm_scaling: the weight of '2' is sharded \(a DTensor\)"):
        apply_norm_scaling(model)
    scaling = apply_norm_scaling(model := net())
    shard(model[0].parametrizations.weight, "original")
    with pytest.raises(ValueError, match=r"attach: the weight of '0' is sharded \(a DTensor\)"):
        scaling.attach(torch.optim.SGD(model.parameters(), lr=0.1))
