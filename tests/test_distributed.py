"""A model that is wrapped or sharded for several processes: in what order, and what is refused."""

import pytest
import torch
from held import off_target
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
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
    with pytest.raises(ValueError, match=r"apply_norm_scaling: the weight of '2' is sharded \(a DTensor,"):
        apply_norm_scaling(model)
    scaling = apply_norm_scaling(model := net())
    shard(model[0].parametrizations.weight, "original")
    with pytest.raises(ValueError, match=r"attach: the weight of '0' is sharded \(a DTensor, as of fully_shard\)"):
        scaling.attach(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_flat_shards_are_refused_before_an_optimizer_has_stepped():
    for use_orig_params, kind in ((True, "a part"), (False, "a view")):
        scaling = apply_norm_scaling(model := net())
        sharded = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match=rf"the weight of '0' is sharded \({kind} of a flat.*Distributed"):
            scaling.attach(torch.optim.Adam(sharded.parameters()))
    inner = FullyShardedDataParallel(net(), use_orig_params=True, device_id=torch.device("cpu"))
    for model in (inner, nn.Sequential(inner)):
        with pytest.raises(ValueError, match=r"the model is under FullyShardedDataParallel.*DistributedDataParallel"):
            apply_norm_scaling(model)


def test_a_weight_that_is_flattened_after_attach_says_so():
    scaling = apply_norm_scaling(model := net())
    model[0].parametrizations.weight.original = nn.Parameter(torch.ones(48))
    with pytest.raises(ValueError, match=r"step: the weight of '0' has the shape \(48,\) now.*FullySharded"):
        scaling.step()


class Averager:
    """Averages with another model at every step, in place of a process that has it."""

    def __init__(self, other):
        self.other = list(other.parameters())
        self.step = 0

    def average_parameters(self, params):
        with torch.no_grad():
            for group in params:
                for mine, theirs in zip(group["params"], self.other, strict=True):
                    mine.lerp_(theirs, 0.5)


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_what_averages_models_behind_the_step_is_told_how_to_be_held(norm):
    scaling = apply_norm_scaling(model := net(), norm, init="orthogonal")
    apply_norm_scaling(other := net(), norm, init="orthogonal")
    inner = torch.optim.SGD(model.parameters(), lr=1e-2)
    optimizer = PostLocalSGDOptimizer(inner, Averager(other))
    with pytest.raises(ValueError, match=r"PostLocalSGDOptimizer never calls step hooks; call scaling.step\(\) after"):
        scaling.attach(optimizer)
    scaling.attach(inner)
    for _ in range(2):
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        with pytest.warns(UserWarning, match=r"call scaling.step\(\) after each of its steps, and after .* averaging"):
            scaling.metrics()
        scaling.step()
        scaling.metrics()
        assert max(map(off_target, scaling.weights)) < 1e-5


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_an_optimizer_whose_state_is_sharded_over_processes_is_attached_as_any(norm):
    scaling = apply_norm_scaling(model := net(), norm, init="orthogonal")
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=1e-2)
    scaling.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        assert max(map(off_target, scaling.weights)) < 1e-5
