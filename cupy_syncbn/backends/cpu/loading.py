"""Finds the compiled core, checks that it belongs to this package, and chooses its instruction set: once."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from types import ModuleType
from typing import NamedTuple

from cupy_syncbn._version import __version__
from cupy_syncbn.backends.cpu.sources import CORE, sources, sources_hash

LEVELS = {"baseline": "baseline", "v3": "x86-64-v3", "v4": "x86-64-v4"}
"""The instruction sets that CUPY_SYNCBN_ISA can name, the smallest first, and what they are."""
TAKEN_UNASKED = ("baseline", "v3")

REMEDY = (
    "to get it, install a C++ compiler (Debian: g++, Conda: cxx-compiler), then this package once more: "
    "`pip install -v .` in its folder builds the core, or says why not"
)

_NAME = "cupy_syncbn.backends.cpu._core"


class Choice(NamedTuple):
    """What computes on NumPy arrays."""

    core: ModuleType | None
    """The core that was found, also if it is not to compute."""
    why_none: str
    """Why there is no core, in words that follow its name; empty if there is one."""
    isa: str
    """The level of the core that computes, or "numpy"."""
    asked: str
    """The value of CUPY_SYNCBN_ISA."""
    error: str = ""
    """The message about a wrong setting: the first call raises it, so that all ranks hear of it."""


def choice() -> Choice:
    """Return what computes on NumPy arrays, whatever is wrong."""
    return _choice


def core() -> ModuleType | None:
    """Return the core that computes on NumPy arrays, or None if NumPy itself does."""
    return None if _choice.isa == "numpy" else _choice.core


@functools.cache  # an error is raised each time, the warning logged once
def check() -> None:
    """Raise ValueError if CUPY_SYNCBN_ISA is wrong; log a warning if NumPy computes for lack of a core."""
    if _choice.error:
        raise ValueError(_choice.error)
    if _choice.core is None and _choice.asked != "numpy":
        logging.getLogger("cupy_syncbn").warning(
            "NumPy computes on CPUs, which is slow, since the compiled core %s; %s", _choice.why_none, REMEDY
        )


def status() -> str:
    """Tell in a sentence what computes on NumPy arrays; if that is not the core, why, and the remedy."""
    if _choice.error:
        return _choice.error
    if _choice.isa != "numpy":
        return f"compiled core, {LEVELS[_choice.isa]}"
    if _choice.asked == "numpy":
        return "NumPy, as CUPY_SYNCBN_ISA says"
    return f"NumPy, since the compiled core {_choice.why_none}; {REMEDY}"


def facts() -> dict[str, str | list[str]]:
    """Return what `show_config` tells."""
    compiled = [] if _choice.core is None else [level for level in LEVELS if level in _choice.core.levels()]
    return {
        "isa": _choice.isa,
        "compiled": compiled,
        "runnable": [] if _choice.core is None else _runnable(_choice.core),
        "status": status(),
    }


def _find() -> tuple[ModuleType | None, str]:
    """Return the core, or None and what is the matter with it."""
    try:
        found = importlib.import_module(_NAME)
        version, built_from = found.VERSION, found.SOURCES
    except Exception as error:  # one of another machine may fail in any way
        if isinstance(error, ModuleNotFoundError) and error.name == _NAME:
            return None, "was not built with this installation"
        return None, f"cannot be loaded: {' '.join(str(error).split())}"
    if version != __version__:
        return None, f"is of version {version}, and the package of {__version__}"
    if sources() and built_from != sources_hash():
        return None, f"was built from other sources than those in {CORE}"
    return found, ""


def _runnable(core: ModuleType) -> list[str]:
    """Return the levels that were compiled and that this processor can run, the smallest first."""
    levels = core.levels()
    return [level for level in LEVELS if levels.get(level)]


def _choose() -> Choice:
    """Return the core and its level, by CUPY_SYNCBN_ISA and CUPY_SYNCBN_REQUIRE_CORE."""
    asked = os.environ.get("CUPY_SYNCBN_ISA", "")
    found, why_none = _find()
    by_numpy = functools.partial(Choice, found, why_none, "numpy", asked)
    if asked not in ("", "numpy", *LEVELS):
        return by_numpy(f"expected CUPY_SYNCBN_ISA to be {', '.join(LEVELS)} or numpy (got {asked!r})")
    if asked == "numpy":
        return by_numpy()
    if found is None:
        if os.environ.get("CUPY_SYNCBN_REQUIRE_CORE") == "1":
            raise ImportError(
                f"CUPY_SYNCBN_REQUIRE_CORE is set, and the compiled core {why_none}; {REMEDY}", name=_NAME
            )
        return by_numpy(
            asked and f"CUPY_SYNCBN_ISA={asked} cannot be: the compiled core {why_none}; {REMEDY}"
        )
    runnable = _runnable(found)
    if asked and asked not in runnable:
        return by_numpy(
            f"CUPY_SYNCBN_ISA={asked} cannot be: of the compiled core, this processor can run "
            f"{', '.join(runnable)} (or let it be numpy)"
        )
    isa = asked or [level for level in runnable if level in TAKEN_UNASKED][-1]
    found.use(isa)
    return Choice(found, "", isa, asked)


_choice = _choose()
