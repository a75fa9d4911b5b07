"""The errors of every solver's first singular value, on the weights of one training run."""

import statistics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from lib.step_times import COLD_POWER, TORCH
from specscale import SVD, Block, NormScaler, Power
from specscale.solvers import DenseMatrices


class TorchSpectralNorm:
    """The estimate of `torch.nn.utils.parametrizations.spectral_norm`: one warm power iteration at every step."""

    def init_state(self, key: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
        layers = [nn.Linear(*reversed(shape), bias=False, dtype=dtype, device=key.device) for _ in key]
        return {"layers": [spectral_norm(layer) for layer in layers]}

    def value(self, matrices: Tensor, state: dict[str, Any]) -> tuple[Tensor, int]:
        estimates = []
        for matrix, layer in zip(matrices, state["layers"], strict=True):
            layer.parametrizations.weight.original.copy_(matrix)
            estimates.append(matrix.norm() / layer.weight.norm())
        return torch.stack(estimates), 1


CANDIDATES: dict[str, Any] = {
    "block": Block(),
    "power, 1 warm": Power(1, warm=True),
    "power, 20 warm": Power(20, warm=True),
    COLD_POWER: Power(),
    TORCH: TorchSpectralNorm(),
    "svd": SVD(),
}
"""The solvers to compare, by their name in the results."""


def solve_(candidate: Any, matrices: Tensor, state: dict[str, Any]) -> tuple[Tensor, int]:
    """The largest singular values and the number of iterations; updates `state` in place."""
    if isinstance(candidate, TorchSpectralNorm):
        return candidate.value(matrices, state)
    ((triple, new_state),) = candidate.solve([DenseMatrices(matrices)], [state])
    state.update(new_state)
    return triple.value, int(triple.num_iterations.max())


def weight_reads(candidate: Any, num_iterations: float) -> float | None:
    """How often a step reads W: once, and twice in each iteration. None for SVD and cold power iteration."""
    if isinstance(candidate, SVD) or candidate == Power():
        return None
    return 1 + 2 * num_iterations


MEASURED = ("step", "errors", "iterations", "worst_target_error")
"""The attributes of `SolverErrors` that hold what has been measured."""


class SolverErrors:
    """Runs every candidate on the weights of a model, and collects its errors and iterations."""

    def __init__(self, scaling: NormScaler, every: int) -> None:
        self.scaling, self.every = scaling, every
        self.step = 0
        self.states: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in CANDIDATES}
        self.errors: dict[str, list[float]] = {name: [] for name in CANDIDATES}
        self.iterations: dict[str, list[tuple[int, int]]] = {name: [] for name in CANDIDATES}
        """The step and the number of iterations."""
        self.worst_target_error = 0.0
        """The largest relative distance of `u^T W' v` from the target, over the steps and the weights with a block."""

    def state_dict(self) -> dict[str, Any]:
        """What has been measured, and what the candidates carry from step to step."""
        states = {name: dict(by_weight) for name, by_weight in self.states.items()}
        for name, state in states[TORCH].items():
            states[TORCH][name] = {"layers": nn.ModuleList(state["layers"]).state_dict()}
        return {"states": states} | {name: getattr(self, name) for name in MEASURED}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self.states = values["states"]
        for weight in self.scaling.weights:
            matrices = weight.scaling.matrices(weight.parameter)
            layers = self._init_state(TORCH, matrices)["layers"]
            nn.ModuleList(layers).load_state_dict(self.states[TORCH][weight.name]["layers"])
            self.states[TORCH][weight.name] = {"layers": layers}
        for name in MEASURED:
            setattr(self, name, values[name])

    def _init_state(self, name: str, matrices: Tensor) -> dict[str, Any]:
        key = torch.arange(len(matrices), device=matrices.device)
        return CANDIDATES[name].init_state(key, matrices.shape[1:], matrices.dtype)

    @torch.no_grad()
    def measure(self, *_: Any) -> None:
        """Run the candidates on the weights before they are scaled; every `every` steps, against an exact SVD."""
        self.step += 1
        compare = self.step % self.every == 0
        for weight in self.scaling.weights:
            matrices = weight.scaling.matrices(weight.parameter)
            exact = torch.linalg.svdvals(matrices.double())[..., 0] if compare else None
            for name, candidate in CANDIDATES.items():
                state = self.states[name].setdefault(weight.name, {})
                if not state:
                    state.update(self._init_state(name, matrices))
                # A warm candidate must see every step.
                is_warm = not {"basis", "columns", "layers"}.isdisjoint(state)
                if compare or is_warm:
                    value, num_iterations = solve_(candidate, matrices, state)
                    # Exact solvers report no iterations.
                    if num_iterations:
                        self.iterations[name].append((self.step, num_iterations))
                if exact is not None:
                    self.errors[name] += (value.double() / exact - 1).abs().tolist()

    @torch.no_grad()
    def measure_targets(self) -> None:
        """Keep how far the weights that have just been scaled are from their targets."""
        for weight in self.scaling.weights:
            state = weight.scaling.solver_state()
            if "basis" in state:
                matrices = weight.scaling.matrices(weight.parameter).double()
                matrices = matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mT
                vector = state["basis"][..., :1].double()
                norm = (matrices @ (vector / vector.norm(dim=-2, keepdim=True))).norm(dim=(-2, -1))
                error = (norm / weight.scaling.target - 1).abs().max().item()
                self.worst_target_error = max(self.worst_target_error, error)

    def table(self, num_steps: int) -> list[dict[str, Any]]:
        phases = ((0, 10), (10, num_steps // 2), (num_steps // 2, num_steps))
        rows = []
        for name, candidate in CANDIDATES.items():
            mean = statistics.mean([n for _, n in self.iterations[name]] or [0.0])
            by_phase = [
                statistics.mean([n for step, n in self.iterations[name] if first < step <= last] or [0])
                for first, last in phases
            ]
            rows.append(
                {
                    "solver": name,
                    "mean error": statistics.mean(self.errors[name]),
                    "max error": max(self.errors[name]),
                    "iterations": mean,
                    "iterations, first 10 / to half / rest": by_phase,
                    "reads of W": weight_reads(candidate, mean),
                }
            )
        return rows
