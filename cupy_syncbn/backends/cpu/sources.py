"""The sources of the compiled core: scripts/build_core.py compiles them, and `loading` compares their hash.

It imports nothing of the package, which cannot be imported yet when it is built.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

BACKENDS = Path(__file__).resolve().parents[1]
CORE = BACKENDS / "cpu" / "core"

SUFFIXES = (".h", ".hpp", ".cpp")
"""The suffixes of sources: editors leave other files there."""


def sources() -> list[Path]:
    """Return the files that the core is made of, in the order of their names; empty without a core."""
    found = [path for path in CORE.glob("*") if path.suffix in SUFFIXES and not path.name.startswith(".")]
    return sorted([*found, BACKENDS / "formulas.h"]) if found else []


def sources_hash() -> str:
    """Return the SHA-256 of the names and contents of the sources."""
    digest = hashlib.sha256()
    for path in sources():
        content = path.read_bytes()
        digest.update(f"{path.relative_to(BACKENDS).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
