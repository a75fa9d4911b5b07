"""Many simulated processes in this one: each is a thread, and a sum over processes waits for all of them."""

import threading

import torch


class Ranks:
    """Runs a function at every coordinate of a mesh of these sizes, together, each in a thread of its own.

    `all_reduce` stands in for `torch.distributed.all_reduce`; a group is what `Mesh.get_group` of test_shards returns.
    """

    def __init__(self, sizes, dims_of):
        self.sizes, self.dims_of = sizes, dims_of
        self._own = threading.local()
        self._lock = threading.Lock()
        self._meetings = {}
        self.lengths = []
        """The lengths of the buffers that one of the ranks has reduced."""

    def all_reduce(self, tensor, op=torch.distributed.ReduceOp.SUM, group=None):
        at, dims = self._own.at, self.dims_of((group,))
        key = tuple(sorted(dims)), tuple(-1 if dim in dims else index for dim, index in enumerate(at))
        count = 1
        for dim in dims:
            count *= self.sizes[dim]
        with self._lock:
            slots, barrier = self._meetings.setdefault(key, ({}, threading.Barrier(count, timeout=60)))
        slots[at] = tensor.clone()
        barrier.wait()
        if not any(at):
            self.lengths.append(tensor.numel())
        total = torch.stack([slots[other] for other in sorted(slots)])
        tensor.copy_(total.sum(0) if op == torch.distributed.ReduceOp.SUM else total.amax(0))
        # No one writes before all have read.
        barrier.wait()

    def run(self, function, coordinates):
        """What the function returns at each coordinate."""
        found, errors = {}, []

        def work(at):
            self._own.at = at
            try:
                with torch.no_grad():
                    found[at] = function(at)
            except BaseException as error:
                errors.append(error)
                for _, barrier in self._meetings.values():
                    barrier.abort()

        threads = [threading.Thread(target=work, args=(at,)) for at in coordinates]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return found
