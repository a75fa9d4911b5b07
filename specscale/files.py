"""A checkpoint file of any trainer: read without running code, and made plain, every scaled state dict in it."""

import argparse
import copy
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch

from specscale.errors import Refusal
from specscale.saved_names import in_plain_order, is_parametrized, parametrizations_in, plain_name, saved_scalings
from specscale.state_dicts import plain_from_saved

TORCH = (".pt", ".pth", ".pth.tar", ".ckpt", ".bin")
SAFETENSORS = ".safetensors"
ENDINGS = (*TORCH, SAFETENSORS)

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_checkpoint_wrapped_module)\.")
_DROPPED = object()


def make_file_plain(source: Path, target: Path, *, trust_pickle: bool = False) -> list[str]:
    """Write the file again with plain state dicts, and return what was done, a line for each thing.

    `target` is written whole or not at all, and may be `source`. Without `trust_pickle`, nothing is read that could
    run code.

    Raises:
        Refusal: the file is not there, of no known format or not to be read, or holds no scaled weight, or the target
            cannot be written.
    """
    if not source.is_file():
        raise Refusal(f"there is no file {str(source)!r}")
    if _kind(source) != _kind(target):
        raise Refusal(f"{str(target)!r} is not of the format of {str(source)!r}, which is written as it is read")
    found, metadata = _read(source, trust_pickle)
    content, report = make_plain(found, source)
    if _kind(source) == SAFETENSORS:
        from safetensors.torch import save_file

        _write(target, lambda path: save_file(content, path, metadata))
    else:
        _write(target, lambda path: torch.save(content, path))
    return report


def read(source: Path, *, trust_pickle: bool = False) -> Any:
    """What the file holds. Without `trust_pickle`, nothing is read that could run code.

    Raises:
        Refusal: the file is not there, of no known format or not to be read.
    """
    if not source.is_file():
        raise Refusal(f"there is no file {str(source)!r}")
    return _read(source, trust_pickle)[0]


def _read(source: Path, trust_pickle: bool) -> tuple[Any, Any]:
    """The file's content, and the metadata of one of safetensors."""
    return _load_safetensors(source) if _kind(source) == SAFETENSORS else (_load(source, trust_pickle), None)


def _kind(path: Path) -> str:
    if not path.name.endswith(ENDINGS):
        raise Refusal(f"{str(path)!r} is of no known format; its name must end in {', '.join(ENDINGS)}")
    return SAFETENSORS if path.name.endswith(SAFETENSORS) else "torch"


def _load_safetensors(source: Path) -> tuple[dict[str, Any], Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise Refusal(f"{str(source)!r} needs the package safetensors: pip install safetensors") from error
    try:
        with safe_open(source, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except SafetensorError as error:
        raise _failed("read", source, error) from error


def _load(path: Path, trust_pickle: bool) -> Any:
    # Mapped, the tensors are read as they are written again, and never are in memory together.
    options: dict[str, Any] = {"map_location": "cpu", "mmap": zipfile.is_zipfile(path)}
    try:
        # timm's checkpoints hold the command's options; a Namespace is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            if trust_pickle:
                return torch.load(path, weights_only=False, **options)
            try:
                return torch.load(path, weights_only=True, **options)
            except pickle.UnpicklingError as error:
                if not (found := _unsafe_globals(path, error)):
                    raise
                raise Refusal(
                    f"{str(path)!r} holds {', '.join(found)}, which only Python's pickle can load, and pickle runs "
                    "whatever code a file asks for; if you trust the file, say --trust-pickle"
                ) from error
    except Refusal:
        raise
    except Exception as error:  # A damaged file raises anything.
        raise _failed("read", path, error) from error


def _unsafe_globals(path: Path, error: pickle.UnpicklingError) -> list[str]:
    """What the file asks for that is no plain data, by name."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except ValueError:  # It is of the format before torch 1.6.
        return re.findall(r"GLOBAL (\S+)", str(error))[:1]


def _failed(what: str, path: Path, error: Exception) -> Refusal:
    lines = str(error).strip().splitlines() or [""]
    return Refusal(f"{str(path)!r} cannot be {what}: {type(error).__name__}: {lines[0]}")


def _write(target: Path, save: Callable[[Path], None]) -> None:
    """Save beside the target, then put it in the target's place, so that no half-written file is ever there."""
    # What a link points to is replaced, not the link.
    target = target.resolve()
    if not target.parent.is_dir():
        raise Refusal(f"there is no folder {str(target.parent)!r}")
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        save(beside)
        beside.replace(target)
    except Exception as error:  # Those who save have errors of their own for a full disk.
        raise _failed("written", target, error) from error
    finally:
        beside.unlink(missing_ok=True)


def make_plain(content: Any, source: Path) -> tuple[Any, list[str]]:
    """A file's content with plain state dicts wherever it is nested, and a line for each thing that was done."""
    scaled = {one.parameter for mapping in _mappings(content) for one in saved_scalings(mapping)}
    if not scaled:
        raise Refusal(f"{str(source)!r} holds no scaled weight")
    walk = _Walk(scaled)
    return walk.plain(content, ""), walk.report


def _mappings(value: Any) -> Iterator[Mapping[Any, Any]]:
    if isinstance(value, dict):
        yield value
    for _, child in children(value):
        yield from _mappings(child)


def children(value: Any) -> list[tuple[Any, Any]]:
    """The keys and values of a container, those that are containers themselves."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if type(value) in (list, tuple) else ()
    return [(key, child) for key, child in pairs if isinstance(child, dict) or type(child) in (list, tuple)]


class _Walk:
    """A walk through a file's content that makes it plain and reports what was done."""

    def __init__(self, scaled: set[str]) -> None:
        self._scaled = scaled
        self.report: list[str] = []

    def plain(self, value: Any, path: str) -> Any:
        """The value made plain; `_DROPPED` where it cannot be, and must not be in the file."""
        if is_of_an_optimizer(value):
            return self._optimizer(value, path)
        if isinstance(value, dict) and (weights := self._weights_in(value)):
            value = plain_from_saved(value, weights)
            self._say(path, f"{count_of(weights, 'weight')} made plain")
        made = {key: self.plain(child, inner_path(path, value, key)) for key, child in children(value)}
        return value if all(made[key] is child for key, child in children(value)) else _with(value, made)

    def _say(self, path: str, what: str) -> None:
        self.report.append(f"{path or 'the whole file'}: {what}")

    def _weights_in(self, names: Any) -> list[str]:
        """The scaled weights' names among them. An average of parameters has no buffers by which to know them."""
        if scalings := saved_scalings(names):
            return [name for name in names if name in {one.parameter for one in scalings}]
        of_others = {one.parameter for name in names for one in parametrizations_in(name)}
        return [name for name in names if is_parametrized(name) and name not in of_others and self._is_scaled(name)]

    def _is_scaled(self, name: str) -> bool:
        """Whether the name is a scaled weight's in one of the file's state dicts, a wrapper's prefix apart."""
        return name in self._scaled or any(_is_same(name, known) for known in self._scaled)

    def _optimizer(self, saved: dict[str, Any], path: str) -> Any:
        groups = saved["param_groups"]
        names = [_names(group) for group in groups]
        if not saved["state"]:
            self._say(path, "kept: it holds no state of a parameter")
            return saved
        if any(own is None for own in names):
            self._say(path, "dropped: without param_names in its groups, it cannot be known whose state is whose")
            return _DROPPED
        weights = {name for own in names for name in self._weights_in(own)}
        if not weights:
            self._say(path, "kept: its parameters have their plain names")
            return saved
        # torch numbers the parameters through all groups, and finds the state by the number.
        renamed: dict[Any, Any] = {}
        plain_groups = []
        for group, own in zip(groups, names, strict=True):
            saved_as = dict(zip(own or (), group["params"], strict=True))
            plain = {name: plain_name(name) if name in weights else name for name in in_plain_order(own or (), weights)}
            for name in plain:
                is_number = isinstance(saved_as[name], int)
                renamed[saved_as[name]] = len(renamed) if is_number else plain[name]
            new = {"params": [renamed[saved_as[name]] for name in plain]}
            if "param_names" in group:
                new["param_names"] = list(plain.values())
            plain_groups.append({**group, **new})
        self._say(path, f"{count_of(renamed, 'parameter')} put into the plain order, with their state")
        state = {new: saved["state"][old] for old, new in renamed.items() if old in saved["state"]}
        return {**saved, "state": state, "param_groups": plain_groups}


def is_of_an_optimizer(value: Any) -> bool:
    """Whether it is the state dict of a torch optimizer."""
    groups = value.get("param_groups") if isinstance(value, dict) and isinstance(value.get("state"), dict) else None
    return isinstance(groups, list) and all(isinstance(group, dict) and "params" in group for group in groups)


def _names(group: Mapping[str, Any]) -> list[str] | None:
    """The names of an optimizer's parameters, if each has one: torch's `param_names`, or names in place of numbers."""
    params = group["params"]
    names = group.get("param_names") or params
    is_complete = len(set(names)) == len(params) and all(isinstance(name, str) for name in names)
    return list(names) if is_complete else None


def _is_same(name: str, known: str) -> bool:
    """Whether two names can be the same parameter's, one in a module that holds the other or in a wrapper."""
    short, long = sorted((_WRAPPERS.sub("", name), _WRAPPERS.sub("", known)), key=len)
    return short == long or (not short.startswith("parametrizations.") and long.endswith(f".{short}"))


def count_of(things: Sized, name: str) -> str:
    """So many things of that name."""
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def inner_path(path: str, value: Any, key: Any) -> str:
    """The path of what a container has at a key."""
    return f"{path}.{key}".lstrip(".") if isinstance(value, dict) else f"{path}[{key}]"


def _with(value: Any, made: Mapping[Any, Any]) -> Any:
    """The container with these values in it, without those that were dropped."""
    if isinstance(value, dict):
        new = copy.copy(value)
        for key, one in made.items():
            if one is _DROPPED:
                del new[key]
            else:
                new[key] = one
        return new
    if len(made) == len(value) and all(one is _DROPPED for one in made.values()):
        return _DROPPED
    # The others keep their places.
    return type(value)(None if (one := made.get(at, old)) is _DROPPED else one for at, old in enumerate(value))
