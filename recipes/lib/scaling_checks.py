"""Whether scaling steps are right on a device: their errors, syncs, graphs and repeats."""

import copy
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lib.workloads import Workload
from specscale import NormScaler, apply_norm_scaling

Rows = list[dict[str, Any]]


class Setting(NamedTuple):
    """Where the checks run, and on what."""

    device: torch.device
    workload: Callable[[str], Workload]
    """A workload by its name."""
    tiny: bool
    deadline: float
    """On `time.monotonic`: no further run begins after it."""

    @property
    def num_steps(self) -> int:
        return 3 if self.tiny else 10

    def subjects(self) -> Iterator[tuple[str, str]]:
        """The norms, and the names of the models that are checked under them."""
        for norm in ("frobenius", "spectral"):
            for name in ("mlp-5x2000", "odd shapes") if self.tiny else ("mlp-5x2000", "resnet50", "odd shapes"):
                yield norm, name

    def build(self, norm: str, name: str) -> tuple[nn.Module, NormScaler]:
        """Such a model, under the norm constraint."""
        if name == "odd shapes":
            model = odd_shapes(self.device)
            return model, apply_norm_scaling(model, norm)
        model = self.workload(name).build(self.device)
        return model, self.workload(name).scale(model, norm)

    def drifted_steps(self, scaling: NormScaler) -> None:
        """Scaling steps, each after a drift; the same ones on every call."""
        generator = torch.Generator(self.device).manual_seed(2)
        for _ in range(self.num_steps):
            drift_(scaling, generator)
            scaling.step()


def odd_shapes(device: torch.device) -> nn.Module:
    """Layers of sizes, dtypes and memory formats that a kernel may get wrong."""
    torch.manual_seed(0)
    layers = [
        *(nn.Linear(300, 200), nn.Linear(300, 200), nn.Linear(131, 517), nn.Linear(1000, 1), nn.Linear(7, 3)),
        *(nn.Conv2d(3, 64, 3), nn.Conv2d(3, 64, 7), nn.Conv2d(12, 20, 3, groups=4), nn.ConvTranspose2d(8, 6, 2)),
        nn.Conv2d(64, 96, 3).to(memory_format=torch.channels_last),
        *(nn.MultiheadAttention(96, 4), nn.GRU(80, 70)),
        *(nn.Linear(256, 320, dtype=torch.bfloat16), nn.Linear(320, 160, dtype=torch.float16)),
    ]
    return nn.ModuleList(layers).to(device)


@contextmanager
def recorded(tracebacks: list[str]) -> Iterator[None]:
    """Append the traceback if the block raises, so that the other models are still checked."""
    try:
        yield
    except Exception:
        tracebacks.append(traceback.format_exc())


@torch.no_grad()
def drift_(scaling: NormScaler, generator: torch.Generator) -> None:
    """Move every weight at random, the same on every call with an equal generator, as no training step is sure to."""
    for weight in scaling.weights:
        parameter = weight.parameter
        # Of a sharded weight, what this process holds.
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        noise = torch.randn(own.shape, generator=generator, device=own.device)
        own.add_(0.02 * own.float().std(correction=0) * noise)


@contextmanager
def refuse_to_wait(device: torch.device) -> Iterator[None]:
    """On CUDA, raise where the host would wait for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def syncs(setting: Setting) -> dict[str, Any]:
    """The steps in which the host waited for the device."""
    rows: Rows = []
    tracebacks: list[str] = []
    for norm, name in setting.subjects():
        with recorded(tracebacks):
            model, scaling = setting.build(norm, name)
            for is_captured, handle in ((False, scaling), (True, NormScaler.of(model).capture())):
                waits = steps_that_wait(handle, setting)
                row = {"model": name, "norm": norm, "captured": is_captured, "steps": setting.num_steps}
                row["waited in steps"] = ", ".join(map(str, waits)) or "none"
                row["met"] = None if setting.device.type == "cpu" else not waits
                row["where"] = "; ".join(dict.fromkeys(waits.values())) or None
                rows.append(row)
    notes = ["Steps run under `torch.cuda.set_sync_debug_mode('error')`."]
    if setting.device.type == "cpu":
        notes = ["On a CPU, no step can wait: the steps ran unguarded."]
    return {"tables": {"Host syncs in the scaling step": rows}, "notes": notes, "traceback": "\n".join(tracebacks)}


def steps_that_wait(scaling: NormScaler, setting: Setting) -> dict[int, str]:
    """The steps in which the host waited, counted from 1, and where it did."""
    generator, waits = torch.Generator(setting.device).manual_seed(2), {}
    for step in range(1, setting.num_steps + 1):
        drift_(scaling, generator)
        try:
            with refuse_to_wait(setting.device):
                scaling.step()
        except RuntimeError as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            waits[step] = f"{Path(frame.filename).name}:{frame.lineno}: {str(error).splitlines()[0][:120]}"
    return waits


@torch.no_grad()
def largest_difference(model: nn.Module, other: nn.Module) -> float:
    """The largest difference of two models' weights, relative to the largest entry of its tensor."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    differences = [(a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30) for a, b in pairs]
    return torch.stack(differences).max().item()


def replay(setting: Setting) -> dict[str, Any]:
    """Steps that are replayed from CUDA graphs against the same steps without."""
    rows: Rows = []
    tracebacks: list[str] = []
    for norm, name in setting.subjects():
        with recorded(tracebacks):
            model, scaling = setting.build(norm, name)
            other = copy.deepcopy(model)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                setting.drifted_steps(NormScaler.of(other).capture())
            setting.drifted_steps(scaling)
            difference = largest_difference(other, model)
            row = {"model": name, "norm": norm, "steps": setting.num_steps, "largest difference": difference}
            row["met"] = difference <= 1e-5
            row["no graph, since"] = "; ".join(dict.fromkeys(str(one.message) for one in caught)) or None
            rows.append(row)
    tables = {"Replayed steps against eager ones, relative to each tensor's largest entry; at most 1e-5": rows}
    return {"tables": tables, "traceback": "\n".join(tracebacks)}


def repeats(setting: Setting) -> dict[str, Any]:
    """Whether the same steps from the same weights end on the same bits, in weights and buffers."""
    rows: Rows = []
    tracebacks: list[str] = []
    for norm, name in setting.subjects():
        with recorded(tracebacks):
            model, _ = setting.build(norm, name)
            for is_captured in (False, True):
                copies = [copy.deepcopy(model) for _ in range(2)]
                for one in copies:
                    handle = NormScaler.of(one)
                    setting.drifted_steps(handle.capture() if is_captured else handle)
                states = [one.state_dict() for one in copies]
                different = [key for key, value in states[0].items() if not torch.equal(value, states[1][key])]
                row = {"model": name, "norm": norm, "captured": is_captured, "steps": setting.num_steps}
                row |= {"tensors": len(states[0]), "different": len(different), "met": not different}
                row["such as"] = different[0] if different else None
                rows.append(row)
    return {"tables": {"Two runs of the same steps, bit by bit": rows}, "traceback": "\n".join(tracebacks)}


def backends() -> dict[str, Any]:
    """What has a switch `fp32_precision`, by name."""
    one = torch.backends
    return {
        "global": one,
        "cuda.matmul": one.cuda.matmul,
        "cudnn": one.cudnn,
        "cudnn.conv": one.cudnn.conv,
        "mkldnn": one.mkldnn,
        "mkldnn.matmul": one.mkldnn.matmul,
    }


def precision_switches() -> dict[str, str]:
    """All switches, as they are now; the older one cannot be read once a newer one has been used."""
    values = {name: backend.fp32_precision for name, backend in backends().items()}
    try:
        return values | {"float32_matmul_precision": torch.get_float32_matmul_precision()}
    except RuntimeError:
        return values | {"float32_matmul_precision": "not readable"}


@contextmanager
def switched(switch: Callable[[], Any]) -> Iterator[None]:
    """Turn a precision switch within the block, and all of them back after it."""
    before = {name: backend.fp32_precision for name, backend in backends().items()}
    try:
        switch()
        yield
    finally:
        # The setter of the older switch writes some of the newer ones.
        torch.set_float32_matmul_precision("highest")
        for name, backend in backends().items():
            backend.fp32_precision = before[name]


def switches(device: torch.device) -> dict[str, AbstractContextManager[Any]]:
    """Every way to ask for products of less than float32 precision, by name; each can be entered once."""

    def newer(name: str) -> AbstractContextManager[None]:
        return switched(lambda: setattr(backends()[name], "fp32_precision", "tf32"))

    older = {
        f"matmul precision {value}": switched(lambda value=value: torch.set_float32_matmul_precision(value))
        for value in ("highest", "high", "medium")
    }
    return {
        "none": nullcontext(),
        **older,
        "cuda.matmul.fp32_precision tf32": newer("cuda.matmul"),
        "backends.fp32_precision tf32": newer("global"),
        "autocast bfloat16": torch.autocast(device.type, torch.bfloat16),
    }


@torch.no_grad()
def exact_norms(matrices: Tensor) -> Tensor:
    """The spectral norms of `(k, m, n)` in float64, from the eigenvalues of the smaller Gram matrix."""
    matrices = matrices.double()
    tall = matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mT
    return torch.linalg.eigvalsh(tall.mT @ tall)[..., -1].clamp_min(0).sqrt()


@torch.no_grad()
def applied_values(before: Tensor, after: Tensor, target: Tensor) -> Tensor:
    """The first singular values that a spectral step has used, from the weights around it, `(k, m, n)` in float64.

    The step adds `(t - s) u v^T`: its norm is `|t - s|`, and its product with the weight has the sign of `t - s`.
    """
    change = after - before
    sign = torch.sign((change * before).sum((-2, -1)))
    return target.double() - sign * torch.linalg.matrix_norm(change)


def trajectory_errors(workload: Workload, device: torch.device, num_steps: int, every: int) -> dict[str, Any]:
    """The relative errors of the first singular values along one training run, from its init on."""
    model = workload.build(device)
    scaling, optimizer = workload.scale(model, "spectral"), workload.make_optimizer(model)

    def matrices() -> list[Tensor]:
        return [weight.scaling.matrices(weight.parameter).double() for weight in scaling.weights]

    targets = [weight.scaling.target for weight in scaling.weights]
    init_errors = [(t.double() / exact_norms(w) - 1).abs().max() for t, w in zip(targets, matrices(), strict=True)]
    errors: list[Tensor] = []
    iterations: list[int] = []
    are_kept = True
    for step, batch in zip(range(1, num_steps + 1), workload.batches(device), strict=False):
        workload.train_step(model, optimizer, batch)
        is_compared = step % every == 0
        before = matrices() if is_compared else []
        switches_before = precision_switches()
        scaling.step()
        are_kept = are_kept and precision_switches() == switches_before
        iterations += [count for count in scaling.num_iterations.values() if count]
        if is_compared:
            for old, new, target in zip(before, matrices(), targets, strict=True):
                errors.append((applied_values(old, new, target) / exact_norms(old) - 1).abs())
    every_error = torch.cat(errors)
    return {
        "mean error": every_error.mean().item(),
        "max error": every_error.max().item(),
        "iterations": sum(iterations) / max(len(iterations), 1),
        "error of the target": torch.stack(init_errors).max().item(),
        "switches kept": are_kept,
    }


def errors(setting: Setting) -> dict[str, Any]:
    """Errors of `s` against float64 on short training runs, under every precision switch."""
    num_steps, every = (2, 1) if setting.tiny else (60, 10)

    def of(name: str, lr: float = 1e-3) -> Workload:
        one = setting.workload(name)
        # 1024 wide: eigenvalues in float64 take long.
        return replace(one, config=replace(one.config, lr=lr, width=min(one.config.width, 1024)))

    mlp = "mlp-5x2000"
    runs = [(of(mlp), name, switch) for name, switch in switches(setting.device).items()]
    runs += [(of("resnet34"), name, switches(setting.device)[name]) for name in ("none", "matmul precision high")]
    runs += [(of(mlp, lr), "none", nullcontext()) for lr in (1e-4, 1e-5)]
    rows: Rows = []
    tracebacks: list[str] = []
    notes = [f"Adam, {num_steps} steps, compared every {every}. Aims: mean 1e-4, max 1e-3, target 1e-4."]
    for number, (one, name, switch) in enumerate(runs):
        if number > 0 and time.monotonic() > setting.deadline:
            notes.append(f"{len(runs) - number} further runs were skipped for want of time.")
            break
        model = f"{one.name}, width {one.config.width}" if one.config.model == "mlp" else one.name
        row: dict[str, Any] = {"model": model, "lr": f"{one.config.lr:g}", "switch": name}
        with recorded(tracebacks):
            with switch:
                row |= trajectory_errors(one, setting.device, num_steps, every)
            is_right = row["mean error"] <= 1e-4 and row["max error"] <= 1e-3 and row["error of the target"] <= 1e-4
            row["met"] = None if setting.tiny else is_right and row["switches kept"]
            rows.append(row)
    tables = {"Relative errors of the first singular value against float64": rows}
    return {"tables": tables, "notes": notes, "traceback": "\n".join(tracebacks)}
