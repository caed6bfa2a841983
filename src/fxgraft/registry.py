"""Finds passes by name: the built-in ones, and those of installed plug-ins.

A built-in pass is a ``Pass`` class that a subpackage of ``fxgraft.passes`` exports. A plug-in is a
distribution with entry points in the group ``fxgraft.passes``, each ``name = "module:Class"``
with the pass's own name. A plug-in is imported only when its pass is asked for, so a broken one
does not harm the others.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from fxgraft.errors import InputError, PassError
from fxgraft.transform import Pass
from fxgraft.validation import suggestion

GROUP = "fxgraft.passes"


@dataclass(frozen=True)
class _Found:
    """Where one pass comes from.

    Attributes:
        origin: a module or distribution, for messages.
        source: the class, or the entry point that gives it.
    """

    origin: str
    source: type[Pass] | EntryPoint


def names() -> list[str]:
    """Names of all passes, broken plug-ins included.

    Raises:
        PassError: two passes have one name.
    """
    return sorted(_discover())


def find(name: str) -> type[Pass]:
    """The pass class of that name.

    Raises:
        InputError: there is none; suggests a close name and lists all.
        PassError: it is a plug-in's and cannot be imported; names the distribution.
    """
    found = _discover()
    if name not in found:
        raise InputError(
            f"there is no pass {name!r}{suggestion(name, found)}",
            f"the passes are: {', '.join(sorted(found)) or 'none'}",
        )
    return _load(name)


def passes() -> dict[str, type[Pass]]:
    """All pass classes by name; warns of each plug-in that cannot be imported."""
    loaded: dict[str, type[Pass]] = {}
    for name in names():
        try:
            loaded[name] = _load(name)
        except PassError as error:
            warnings.warn(str(error), stacklevel=2)
    return loaded


def refresh() -> None:
    """Look again: forget what was found, after plug-ins were installed."""
    _discover.cache_clear()
    _load.cache_clear()


@cache
def _discover() -> dict[str, _Found]:
    found: dict[str, _Found] = {}
    for name, entry in [*_built_in(), *_plug_ins()]:
        if name in found:
            raise PassError(
                f"pass {name!r} is defined twice: by {found[name].origin} and by {entry.origin}",
                "rename one of them, or uninstall one of the distributions",
            )
        found[name] = entry
    return found


def _built_in() -> Iterator[tuple[str, _Found]]:
    package = importlib.import_module(GROUP)
    for info in pkgutil.iter_modules(package.__path__, f"{GROUP}."):
        if info.ispkg:
            module = importlib.import_module(info.name)
            for value in vars(module).values():
                if _is_pass(value) and value.__module__.startswith(info.name):
                    yield value.name, _Found(value.__module__, value)


def _is_pass(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, Pass) and not inspect.isabstract(value)


def _plug_ins() -> Iterator[tuple[str, _Found]]:
    for entry in entry_points(group=GROUP):
        yield entry.name, _Found(_distribution(entry), entry)


def _distribution(entry: EntryPoint) -> str:
    if entry.dist is None:
        return f"the entry point {entry.value!r}"
    return f"the distribution {entry.dist.name} {entry.dist.version}"


@cache
def _load(name: str) -> type[Pass]:
    found = _discover()[name]
    if not isinstance(found.source, EntryPoint):
        return found.source
    try:
        value: object = found.source.load()
    except Exception as error:
        raise PassError(
            f"pass {name!r} of {found.origin} cannot be imported: {type(error).__name__}: {error}",
            "update, repair or uninstall that distribution",
        ) from error
    if not _is_pass(value) or cast("type[Pass]", value).name != name:
        raise PassError(
            f"the entry point {name!r} of {found.origin} gives {value!r}, which is no pass of "
            "that name",
            "point it to a Pass class and give it that class's name",
        )
    return cast("type[Pass]", value)
