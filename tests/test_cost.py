"""What scaling costs beside the model: persistent state, and memory that a step borrows."""

from itertools import accumulate

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lib.models import build_model
from lib.presets import mlp_5x2000, mlp_7x4000, resnet50
from specscale import Block, apply_norm_scaling
from specscale.weights import find_weights


@pytest.mark.parametrize(("preset", "most"), [(mlp_5x2000, 0.03), (mlp_7x4000, 0.03), (resnet50, 0.10)])
def test_the_state_is_a_small_part_of_the_weights(preset, most):
    with torch.device("meta"):
        model = build_model(preset(), (3, 32, 32), 100)
    weights = [weight.view.matrices(weight.parameter) for weight in find_weights(model)]
    states = [
        Block().init_state(torch.zeros(len(w), dtype=torch.int64, device="meta"), w.shape[1:], w.dtype) for w in weights
    ]
    state = sum(value.nbytes for one in states for value in one.values())
    assert 0 < state / sum(weight.nbytes for weight in weights) < most


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_a_step_borrows_less_than_the_largest_weight_and_the_state(norm):
    # Three of one shape, which could be copied together, and many small ones, which are.
    sizes = [(800, 800)] * 3 + [(800, 300)] + [(150, 150)] * 20
    model = nn.ModuleList(nn.Linear(*size, bias=False) for size in sizes)
    scaling = apply_norm_scaling(model, norm, init="orthogonal")
    scaling.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        scaling.step()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = list(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    state = sum(buffer.nbytes for buffer in model.buffers())
    assert 0 < max(live) < 800 * 800 * 4 + state
