"""Steps of sharded weights by kernels, on a GPU or in Triton's interpreter, beside those of torch operations.

What one rank does of it.
"""

import contextlib

import torch
import torch.distributed as dist
from interpreted import interpreted_grouped
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from specscale import LayerRule, MatrixView, apply_norm_scaling, step
from specscale import grouped as compiled
from specscale.block import Block
from specscale.plans import Plan
from specscale.shards import layout_of, local, whole


class Fused(nn.Module):
    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * outputs, inputs))


RULES = [LayerRule(Fused, {"weight": MatrixView("(k o) i", count=3)})]


def scaled(norm, device="cpu"):
    """Layers with separated singular values, sharded over all ranks: tall, wide, narrow, uneven, and of few rows."""
    sizes = ((150, 64), (64, 150), (90, 20), (33, 90), (1, 24))
    model = nn.ModuleList([nn.Linear(n, m) for m, n in sizes] + [nn.Conv2d(8, 48, 3), Fused(40, 70)])
    model.to(device)
    handle = apply_norm_scaling(model, norm, target=1.0, rules=RULES, solver=Block(tolerance=1e-30))
    generator = torch.Generator().manual_seed(0)
    for weight in handle.weights:
        m, n = weight.view.matrix_shape(weight.parameter)
        u, v = (torch.randn(weight.view.count, side, min(m, n), generator=generator) for side in (m, n))
        values = 0.94 ** torch.arange(min(m, n))
        with torch.no_grad():
            matrices = (torch.linalg.qr(u).Q * values) @ torch.linalg.qr(v).Q.mT
            weight.view.write_(weight.parameter, matrices.to(device))
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    handle.project()
    return handle


@torch.no_grad()
def drift_(handle, seed):
    for number, weight in enumerate(handle.weights):
        shape = tuple(weight.parameter.shape)
        change = torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + number))
        place = layout_of(weight.parameter, weight.view).place
        own = local(weight.parameter)
        own.add_((0.1 * change[place] / max(shape) ** 0.5).to(own.device))


@torch.no_grad()
def compare(norm, count, num_steps, device="cpu"):
    """For each weight: the largest difference of the weights and of the norms."""
    by_torch, by_kernels = scaled(norm, device), scaled(norm, device)
    counts = {weight.scaling.constraint: count for weight in by_torch.weights}
    found = {}
    with interpreted_grouped() if device == "cpu" else contextlib.nullcontext(compiled) as grouped:
        assert all(map(grouped.fits, by_kernels.weights))
        taken = grouped.GroupedStep(by_kernels.weights)
        num_reduced = sum(isinstance(launch, grouped.AllReduce) for launch in taken.launches(count))
        for number in range(num_steps):
            for handle in (by_torch, by_kernels):
                drift_(handle, number)
            step.scale(Plan(by_torch.weights, by_kernels=False), counts, None)
            # What is read before it is written reaches a result.
            taken._scratch.fill_(float("nan"))
            taken.take(count, None)
    for one, other in zip(by_torch.weights, by_kernels.weights, strict=True):
        expected, own = whole(one.parameter.detach()), whole(other.parameter.detach())
        difference = ((own - expected).abs().max() / expected.abs().max()).item()
        norms = ((other.scaling.norm - one.scaling.norm) / one.scaling.norm).abs().max().item()
        found[one.name] = difference, norms
    buffers = [buffer for weight in by_kernels.weights for buffer in weight.scaling.buffers()]
    return found, num_reduced, torch.cat([buffer.flatten() for buffer in buffers]).cpu()


def compare_on_gpu(cases, num_steps):
    """Several comparisons by one start of the ranks, which have the GPU in common: gloo allows that."""
    return [compare(*case, num_steps, "cuda") for case in cases]
