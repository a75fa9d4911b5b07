"""A second copy of the grouped step, whose kernels Triton's interpreter runs on CPU tensors."""

import contextlib
import importlib
import sys
from types import SimpleNamespace

import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

COPIED = ("specscale.kernels", "specscale.grouped")
PATCHED = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base, interpreter)
"""What the interpreter changes while it runs, and does not wholly put back."""


def interpreted_launch(kernel, num_programs, args, constants):
    """`grouped._prepare`: there is nothing to compile."""
    placeholder = sys.modules["specscale.grouped"].SKIP
    return lambda skip: kernel[(num_programs,)](*(skip if arg is placeholder else arg for arg in args), **constants)


@contextlib.contextmanager
def interpreted_grouped():
    """`specscale.grouped` for CPU tensors; afterwards, Triton compiles as before."""
    # It imports, at its first call, what asserts that Triton's own functions are as they were.
    triton.runtime.jit.mangle_type(0)
    before = [dict(vars(holder)) for holder in PATCHED]
    originals = {name: importlib.import_module(name) for name in COPIED}
    try:
        for module in (tl, tl.standard):
            # Triton's own functions were decorated when it was imported.
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    setattr(module, name, InterpretedFunction(value.fn))
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True
            for name in COPIED:
                del sys.modules[name]
            copies = {name: importlib.import_module(name) for name in COPIED}
        # Once, in place of at every call of every function, which takes most of the time.
        for function in (tl.standard.sum, copies["specscale.kernels"].images):
            interpreter._patch_lang(function.fn)
        # What Triton 3.5, that of torch 2.9, does here is refused by NumPy 2.4.
        tl.tensor.__index__ = lambda self: self.handle.data.item()
        interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
        copies["specscale.grouped"]._prepare = interpreted_launch
        yield copies["specscale.grouped"]
    finally:
        sys.modules.update(originals)
        for name, module in originals.items():
            package, _, own = name.rpartition(".")
            setattr(sys.modules[package], own, module)
        for holder, attributes in zip(PATCHED, before, strict=True):
            for name in ("__bool__", "__index__", "__repr__") if isinstance(holder, type) else ():
                if name in vars(holder) and name not in attributes:
                    delattr(holder, name)
            for name, value in attributes.items():
                if vars(holder)[name] is not value:
                    setattr(holder, name, value)
