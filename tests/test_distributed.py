"""A model that is wrapped or sharded for several processes: in what order, and what is refused."""

from pathlib import Path

import pytest
import torch
from held import off_target
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from specscale import apply_norm_scaling, is_norm_scaled, orthogonal_init_, spectral_norms
from specscale.constraints import Cap

TEXT = " ".join((Path(__file__).parent.parent / "docs" / "errors_processes.md").read_text().split())


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


def scaled(norm="spectral", **options):
    return (model := net()), apply_norm_scaling(model, norm, **options)


def fully_sharded(norm="spectral", **options):
    model, scaling = scaled(norm, **options)
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,))), scaling


def parallel():
    return parallelize_module(net(), init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})


def flat(use_orig_params):
    model, scaling = scaled()
    cpu = torch.device("cpu")
    wrapped = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=cpu)
    scaling.attach(torch.optim.Adam(wrapped.parameters()))


def attach_fully_sharded(*args, **options):
    model, scaling = fully_sharded(*args, **options)
    scaling.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    return model, scaling


def step_while_gathered():
    model, scaling = attach_fully_sharded()
    model(torch.ones(2, 8))
    scaling.step()


def report_before_attach():
    with torch.device("meta"):
        model, scaling = fully_sharded(target="channels")
    orthogonal_init_(model.to_empty(device="cpu"))
    scaling.metrics()


REFUSED = {
    "scaled under DistributedDataParallel": lambda: apply_norm_scaling(DistributedDataParallel(net())),
    "scaled under FullyShardedDataParallel": lambda: apply_norm_scaling(
        FullyShardedDataParallel(net(), use_orig_params=True, device_id=torch.device("cpu"))
    ),
    "within FullyShardedDataParallel": lambda: apply_norm_scaling(
        nn.Sequential(FullyShardedDataParallel(net(), use_orig_params=True, device_id=torch.device("cpu")))
    ),
    "attached to flat shards": lambda: flat(True),
    "attached to a flat parameter": lambda: flat(False),
    "scaled under fully_shard": lambda: apply_norm_scaling(fully_shard(net(), mesh=init_device_mesh("cpu", (1,)))),
    "parallelized after scaling": lambda: parallelize_module(
        scaled()[0], init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()}
    ),
    "clipped under tensor parallelism": lambda: apply_norm_scaling(parallel(), "clipped"),
    "orthogonal under fully_shard": lambda: attach_fully_sharded("orthogonal"),
    "an exact cap under fully_shard": lambda: attach_fully_sharded(Cap(exact=True)),
    "svd under fully_shard": lambda: attach_fully_sharded(solver="svd"),
    "power under fully_shard": lambda: attach_fully_sharded(solver="power"),
    "plain under fully_shard": lambda: attach_fully_sharded()[1].plain().__enter__(),
    "removed under fully_shard": lambda: attach_fully_sharded()[1].remove(),
    "a step while gathered": step_while_gathered,
    "a report before attach": report_before_attach,
}


SAME = {
    "attach: the weight of '0' is sharded, and 'orthogonal' needs": (
        "attach: the weight of '0' is sharded, and 'spectral' with SVD needs"
    ),
    "attach: the weight of '0' is sharded, and 'cap' needs": (
        "attach: the weight of '0' is sharded, and 'spectral' with SVD needs"
    ),
    "with Power": "with SVD",
    "remove: the model": "plain: the model",
}


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_says_so_as_the_docs_quote_it(call):
    with pytest.raises((ValueError, KeyError)) as found:
        call()
    text = " ".join(f"{type(found.value).__name__}: {found.value}".split())
    # One text is quoted for all that it is said of.
    for own, quoted in SAME.items():
        text = text.replace(own, quoted)
    assert text in TEXT, text


def test_a_refused_model_is_as_it_was():
    for model in (DistributedDataParallel(net()), fully_shard(net(), mesh=init_device_mesh("cpu", (1,)))):
        before = list(model.state_dict())
        with pytest.raises(ValueError, match="apply_norm_scaling: the model is under"):
            apply_norm_scaling(model)
        assert not is_norm_scaled(model)
        assert list(model.state_dict()) == before


def test_a_compiled_step_of_sharded_weights_is_refused():
    _, scaling = attach_fully_sharded()
    before = [weight.parameter.to_local().clone() for weight in scaling.weights]
    with pytest.raises(Exception, match="step: a step over sharded weights cannot be compiled; take it outside"):
        torch.compile(scaling.step, backend="eager", fullgraph=True)()
    for one, weight in zip(before, scaling.weights, strict=True):
        assert torch.equal(one, weight.parameter.to_local())


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_one_process_can_shard_too(norm):
    model, scaling = fully_sharded(norm)
    scaling.attach(optimizer := torch.optim.Adam(model.parameters(), lr=1e-2))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        for weight in scaling.weights:
            matrix = weight.parameter.to_local().detach().double()
            found = torch.linalg.matrix_norm(matrix) if norm == "frobenius" else torch.linalg.svdvals(matrix)
            assert (found / weight.scaling.target.double() - 1).abs().min() < 1e-5


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
