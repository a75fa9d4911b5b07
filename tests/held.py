"""What every test of the constraint asks, by torch.linalg."""

import torch


def off_target(weight):
    """How far, relative, the weight's norm is from its target; the worst of its matrices."""
    matrices = weight.scaling.view.matrices(weight.parameter.detach()).double()
    target = weight.scaling.target.double()[:, None]
    if weight.scaling.constraint.name == "frobenius":
        held = torch.linalg.matrix_norm(matrices)[:, None]
    else:
        # The first singular value is put on the target: where it then is the second, another one is the norm.
        held = torch.linalg.svdvals(matrices)
    return (held / target - 1).abs().min(dim=1).values.max().item()


def saved(metrics):
    """The metrics that a checkpoint brings back: all but those of the last step."""
    return {name: value for name, value in metrics.items() if not name.startswith("drift/")}
