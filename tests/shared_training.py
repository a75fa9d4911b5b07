"""What ranks do that share the scaling step: each function runs on every one of them, and returns what it saw."""

from contextlib import contextmanager
from unittest import mock

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from specscale import Cap, NonFiniteWeightError, apply_norm_scaling
from specscale.sharing import Sharing

NORMS = {
    "spectral": "spectral",
    "cap": "cap",
    "exact cap": Cap(exact=True),
    "clipped": "clipped",
    "normalize": "normalize",
    "orthogonal": "orthogonal",
    "mixed": {
        "conv": "frobenius",
        "wide": "rows",
        "attention": "spectral",
        "mix": "cap",
        "narrow": "clipped",
        "*": "normalize",
    },
}


class Net(nn.Module):
    """Convolutions, a fused weight of three matrices, and layers that a solver takes as small ones."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 40, 3)
        self.mix = nn.Conv2d(40, 48, 3)
        self.attention = nn.MultiheadAttention(48, 4, batch_first=True)
        self.wide = nn.Linear(48, 64)
        self.narrow = nn.Linear(64, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        x = self.mix(self.conv(x).relu()).flatten(2).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.narrow(self.wide(x.mean(1)).relu()).relu())


@contextmanager
def as_on_an_accelerator(is_one=True):
    """Steps as where the host may not wait."""
    if not is_one:
        yield
        return
    with mock.patch("specscale.linalg.can_sync", return_value=False):
        yield


def train(scaling, model, forward, steps, seed):
    """Train on data of an own seed, attached; the state after every step that may differ, as bytes."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scaling.attach(optimizer)
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    states = []
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator, dtype=dtype)
        optimizer.zero_grad()
        forward(x).square().mean().backward()
        optimizer.step()
        named = [*model.named_parameters(), *model.named_buffers()]
        states.append({name: bytes_of(tensor) for name, tensor in named})
    return {"states": states, "metrics": scaling.metrics(), "num_iterations": scaling.num_iterations}


def bytes_of(tensor):
    """A copy of the bits, so that signs of zeros and NaN compare too."""
    return tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8)


class Collectives(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded():
    """The names of the weights that this rank measures where work is shared, by step."""
    steps = []
    measure = Sharing.measure

    def record(self, batches, measure_one):
        steps.append([])

        def one(batch):
            steps[-1] += [weight.name for weight in batch]
            return measure_one(batch)

        return measure(self, batches, one)

    with mock.patch.object(Sharing, "measure", record):
        yield steps


def trained(norm, dtype, is_accelerator, steps):
    """Both ways of training: without and with sharing; what this rank measured, and how often ranks communicated."""
    rank = distributed.get_rank()
    found = {}
    with as_on_an_accelerator(is_accelerator):
        for name in ("alone", "shared"):
            torch.manual_seed(0)
            model = Net().to(dtype)
            scaling = apply_norm_scaling(model, NORMS[norm], init="orthogonal")
            wrapped = DistributedDataParallel(model)
            if name == "shared":
                assert scaling.share() is scaling
            with recorded() as measured:
                found[name] = train(scaling, model, wrapped, steps, seed=rank)
            if name == "shared":
                with Collectives() as collectives:
                    scaling.step()
                    found["in a step"] = collectives.count
                    scaling.project()
                    found["with project"] = collectives.count
                    distributed.barrier()
                    found["with a barrier"] = collectives.count
        found["measured"] = measured
    return found


def all_trained(cases, steps):
    return {case: trained(*case, steps) for case in cases}


def not_finite(is_accelerator):
    """What is said, and what is written, where a weight is not finite."""
    said = []
    with as_on_an_accelerator(is_accelerator):
        torch.manual_seed(0)
        scaling = apply_norm_scaling(model := Net(), "spectral").share()
        scaling.step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
            model.narrow.weight[0, 0] = torch.nan
        before = {name: bytes_of(one) for name, one in model.named_parameters()}
        for _ in range(2):
            try:
                scaling.step()
                said.append(None)
            except NonFiniteWeightError as error:
                said.append(str(error))
    after = {name: bytes_of(one) for name, one in model.named_parameters()}
    return said, [name for name in before if not torch.equal(before[name], after[name])]


def refused(how):
    """What `share` says where the ranks do not hold the same."""
    rank = distributed.get_rank()
    torch.manual_seed(rank if how == "seed" else 0)
    model = Net()
    exclude = "head" if how == "weights" and rank else None
    scaling = apply_norm_scaling(model, target=1.0 + rank if how == "target" else 1.0, exclude=exclude)
    try:
        scaling.share()
    except ValueError as error:
        return str(error)
    return None


def everything(cases, steps):
    """All of the above in one start of the processes, which takes longer than they do."""
    return {
        "trained": all_trained(cases, steps),
        "not finite": {is_one: not_finite(is_one) for is_one in (False, True)},
        "refused": {how: refused(how) for how in ("seed", "target", "weights", "nothing")},
    }
