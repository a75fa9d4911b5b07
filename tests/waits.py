"""A guard against what a step on an accelerator must not do: a CPU can run such a step too.

In a file of its own, since tests of the kernels use it where the recipes' packages may be missing.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
DECOMPOSING = {"_linalg_svd", "_linalg_eigh", "linalg_eig", "linalg_qr", "linalg_lu_factor_ex", "_linalg_solve_ex"}
FACTORING = {"linalg_cholesky_ex", "linalg_solve_triangular"}


class Refuse(TorchDispatchMode):
    """Raises where the host would wait for the device, or something large would be factorized."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITING | DECOMPOSING:
            raise AssertionError(f"{name} waits for the device")
        if name in FACTORING and args[0].shape[-1] > 48:
            raise AssertionError(f"{name} of {tuple(args[0].shape)} is large")
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise AssertionError("the result's shape depends on the data")
        return func(*args, **(kwargs or {}))
