"""What ranks do that share the scaling step: each function runs on every one of them, and returns what it saw."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

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


def train(scaling, model, steps, *, is_quick=False):
    """Train, each rank on data of its own; weights and buffers after every step, as bytes.

    As a user does, or quickly: an optimizer and what wraps a model import a compiler, for seconds in every process.
    """
    if not is_quick:
        forward = DistributedDataParallel(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        scaling.attach(optimizer)
    generator = torch.Generator().manual_seed(distributed.get_rank())
    dtype = next(model.parameters()).dtype
    states = []
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator, dtype=dtype)
        if is_quick:
            loss = model(x).square().mean()
            for parameter, gradient in zip(
                model.parameters(), torch.autograd.grad(loss, model.parameters()), strict=True
            ):
                distributed.all_reduce(gradient)
                with torch.no_grad():
                    parameter.sub_(gradient, alpha=0.1)
            scaling.step()
        else:
            optimizer.zero_grad()
            forward(x).square().mean().backward()
            optimizer.step()
        named = [*model.named_parameters(), *model.named_buffers()]
        states.append({name: bytes_of(tensor) for name, tensor in named})
    return {"states": states, "metrics": scaling.metrics(), "num_iterations": scaling.num_iterations}


def bytes_of(tensor):
    """A copy of the bits, so that signs of zeros and NaN compare too."""
    return tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8)


@contextmanager
def collectives():
    """A list of the names of what is called that communicates. A dispatch mode would import a compiler."""
    called = []
    names = ["all_gather", "all_gather_object", "all_reduce", "all_to_all", "barrier", "broadcast", "gather", "reduce"]
    names += [name for name in dir(distributed) if name.endswith(("_tensor", "_single", "_list"))]
    with ExitStack() as stack:
        for name in names:
            real = getattr(distributed, name)

            def call(*args, name=name, real=real, **kwargs):
                called.append(name)
                return real(*args, **kwargs)

            stack.enter_context(mock.patch.object(distributed, name, call))
        yield called


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


def trained(norm, dtype, is_accelerator, steps, is_quick):
    """Both ways of training: without and with sharing; what this rank measured, and how often ranks communicated."""
    found = {}
    with as_on_an_accelerator(is_accelerator):
        for name in ("alone", "shared"):
            torch.manual_seed(0)
            model = Net().to(dtype)
            scaling = apply_norm_scaling(model, NORMS[norm], init="orthogonal")
            if name == "shared":
                assert scaling.share() is scaling
            with recorded() as measured:
                found[name] = train(scaling, model, steps, is_quick=is_quick)
            if name == "shared":
                with collectives() as called:
                    scaling.step()
                found["collectives"] = called
        found["measured"] = measured
    return found


def in_small_batches():
    """A small model is measured in several batches, as a large one is: only so is there something to share."""
    return mock.patch("specscale.step.FREE_SCRATCH", 0)


@in_small_batches()
def all_trained(cases, steps, is_quick):
    return {case: trained(*case, steps, is_quick) for case in cases}


def not_finite(is_accelerator):
    """What is said, and what is written, where a weight is not finite."""
    said = []
    with as_on_an_accelerator(is_accelerator):
        torch.manual_seed(0)
        scaling = apply_norm_scaling(model := Net(), "spectral", init="orthogonal").share()
        scaling.step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
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
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 5))
    exclude = "1" if how == "weights" and rank else None
    target = 1.0 + rank if how == "target" else 1.0
    scaling = apply_norm_scaling(model, init="orthogonal", target=target, exclude=exclude)
    try:
        scaling.share()
    except ValueError as error:
        return str(error)
    return None


@in_small_batches()
def everything(cases, steps):
    """All of the above in one start of the processes, which takes longer than they do."""
    return {
        "trained": all_trained(cases, steps, is_quick=True),
        "not finite": {is_one: not_finite(is_one) for is_one in (False, True)},
        "refused": {how: refused(how) for how in ("seed", "target", "weights", "nothing")},
    }
