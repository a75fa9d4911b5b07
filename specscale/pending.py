"""Numbers of a device on their way to the host, which waits for them only when it reads them."""

from collections.abc import Sequence

import torch
from torch import Tensor


class PendingCopies:
    """Copies of tensors that the host will read."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # A copy that does not block goes to pinned memory, which `to` allocates.
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._copied = []
        for device in {tensor.device for tensor in tensors if not tensor.is_cpu}:
            event = torch.Event(device=device)
            # Without a stream, it would be the one of the current device, which may be another.
            event.record(torch.accelerator.current_stream(device))
            self._copied.append(event)

    def read(self) -> list[Tensor]:
        """The copies, once they are there."""
        for event in self._copied:
            event.synchronize()
        return self._copies

    def number(self, which: int) -> int:
        """The one number of a copy."""
        return int(self.read()[which])
