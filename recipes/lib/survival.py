"""How a training ends early: on a signal or on an error of one process, on all processes after the same step.

A process that leaves a training alone makes the others wait for it in their next collective. So it says that it wants
to stop, and takes part until all have heard it.
"""

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from lib.distributed import Processes, destroy_process_group
from lib.files import write_atomically
from specscale import NonFiniteWeightError
from specscale.errors import ADVICE, some_of

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """All processes stop here. The text says why, and `state`, if it is known, what is on the disk."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code
        self.state = ""


class Stop:
    """Whether a process wants to stop, and what all of them have agreed on."""

    def __init__(self, processes: Processes) -> None:
        self._reason: str | signal.Signals | None = None
        """The text of an error, or a signal."""
        self._noted = self._num_checks = self._num_interrupts = 0
        # Of its own, so that on GPUs too the host learns it without waiting for the device.
        self._group = dist.new_group(backend="gloo") if processes.world_size > 1 else None
        self._said: tuple[dist.Work, torch.Tensor] | None = None

    def receive(self, number: int, _: FrameType | None) -> None:
        """Note a signal: the step goes on. A second Ctrl-C ends it."""
        if number == signal.SIGINT:
            self._num_interrupts += 1
            if self._num_interrupts > 1:
                raise KeyboardInterrupt
        if self._reason is None:
            self._note(signal.Signals(number))

    def _note(self, reason: str | signal.Signals) -> None:
        self._reason, self._noted = reason, self._num_checks

    @contextmanager
    def share(self, *errors: type[Exception]) -> Iterator[None]:
        """Make these errors of the block a reason to stop, for all processes."""
        try:
            yield
        except errors as error:
            # What follows from the first error is no news.
            if not isinstance(self._reason, str):
                self._note(str(error))

    def check(self, wait: bool = True) -> None:
        """Stop all processes, if one wants to; all of them must call this at the same place.

        With `wait`, what counts is what each says now. Without, it is what each said in its last call: then a step does
        not wait for messages, and a process that wants to stop takes part in one more.

        Raises:
            Stopped: on all processes.
        """
        self._num_checks += 1
        if self._group is None:
            agreed = self._reason is not None
        else:
            agreed = self._heard()
            if not agreed:
                said = torch.tensor([self._reason is not None], dtype=torch.int32)
                self._said = dist.all_reduce(said, dist.ReduceOp.MAX, self._group, async_op=True), said
                agreed = wait and self._heard()
        if agreed:
            raise self._stopped()

    def _heard(self) -> bool:
        """Whether one process wanted to stop when all last said."""
        if self._said is None:
            return False
        (work, said), self._said = self._said, None
        work.wait()
        return bool(said)

    def _stopped(self) -> Stopped:
        """The reasons of all processes in one text: the first errors if there are any, else the signal."""
        own = self._reason, self._noted
        all_reasons = [own]
        if self._group is not None:
            all_reasons = [own] * dist.get_world_size()
            dist.all_gather_object(all_reasons, own, self._group)
        errors = {rank: own for rank, own in enumerate(all_reasons) if isinstance(own[0], str)}
        if not errors:
            number = next(reason for reason, _ in all_reasons if reason is not None)
            # As a shell reports a program that the signal has ended.
            return Stopped(f"stopped by {number.name}", 128 + number)
        # Gradients carry NaN to the other processes in the step that they take together after it.
        first = min(noted for _, noted in errors.values())
        texts = {rank: text for rank, (text, noted) in errors.items() if noted == first}
        if len(texts) == len(all_reasons) and len(set(texts.values())) == 1:
            return Stopped(texts[0], 1)
        return Stopped("; ".join(f"rank {rank}: {text}" for rank, text in texts.items()), 1)

    def barrier(self) -> None:
        """Wait for the process that saves: torchrun ends it soon after the first of the others is gone."""
        if self._group is not None:
            dist.barrier(self._group)


@contextmanager
def stopping(processes: Processes) -> Iterator[Stop]:
    """Take SIGTERM, Ctrl-C and shared errors as reasons to stop; then exit in one line, printed by the main process."""
    stop = Stop(processes)
    handlers = {number: signal.signal(number, stop.receive) for number in SIGNALS}
    try:
        yield stop
    except Stopped as stopped:
        stop.barrier()
        if processes.is_main:
            state = f"{stopped.state}; " if stopped.state else ""
            # After a signal at once; an error comes again as long as its cause is there.
            when = "once that is mended, " if stopped.exit_code == 1 else ""
            _say(f"{stopped}; {state}{when}the same command with --resume goes on")
        destroy_process_group()
        raise SystemExit(stopped.exit_code) from None
    except KeyboardInterrupt:
        if processes.is_main:
            _say(
                "interrupted before the step had ended; the same command with --resume goes on from the last checkpoint"
            )
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(f"\ntrain: {text}", file=sys.stderr, flush=True)


@torch.no_grad()
def require_finite(model: nn.Module, when: str) -> None:
    """Refuse a model with parameters that are not finite.

    Raises:
        NonFiniteWeightError: naming the layers.
    """
    named = list(model.named_parameters())
    # Of a sharded one, what this process holds: the others look at theirs.
    values = (parameter.to_local() if isinstance(parameter, DTensor) else parameter for _, parameter in named)
    finite = torch.stack([value.isfinite().all() for value in values]).tolist()
    # A scaled weight's own name is inside of its layer's.
    bad = [name.split(".parametrizations.")[0] for (name, _), fine in zip(named, finite, strict=True) if not fine]
    bad = [name.removesuffix(".weight").removesuffix(".bias") for name in bad]
    if bad:
        names = some_of(list(dict.fromkeys(bad)))
        raise NonFiniteWeightError(f"{when}: a parameter of {names} holds NaN or infinity. {ADVICE}")


LAUNCH = "launch"
"""The file in a run's folder that says which launch of torchrun has begun it."""


def sign(folder: Path) -> None:
    """Note in a run's folder that this launch has begun it."""
    if launch := _launch():
        write_atomically(folder / LAUNCH, launch)


def is_signed(folder: Path) -> bool:
    """Whether this launch has begun the run, and torchrun has restarted its processes since."""
    path = folder / LAUNCH
    return path.exists() and path.read_text() == _launch()


def _launch() -> str | None:
    """What stays the same when torchrun restarts its workers, and is another when torchrun is started again.

    In a container, torchrun may have the same process id at every start, and so the time of its start is in it.

    The count of restarts that it gives them does not count new nodes, and the id of a run may be given twice.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return None
    stat = Path(f"/proc/{os.getppid()}/stat")
    started = stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else ""
    return f"{run_id} {socket.gethostname()} {os.getppid()} {started}"
