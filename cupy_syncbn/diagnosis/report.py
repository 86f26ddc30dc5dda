"""The facts as text."""

from __future__ import annotations

import textwrap
from typing import Any

from cupy_syncbn.comm.transports import TRANSPORTS

MODULES = {"numpy": "NumPy", "mpi4py": "mpi4py", "cupy": "CuPy", "ml_dtypes": "ml_dtypes"}
"""The modules whose versions are told, and the names of their packages."""

REASON = 200
"""Characters of a reason: the facts of a rank must fit into a message of `gather_objects`, of 1024 bytes."""


def report(facts: dict[str, Any]) -> str:
    """Return the facts but for the self-test; see `show_config`."""
    cpus_alone = is_about_cpus(facts)
    versions, mpi, launch, cuda = (facts[key] for key in ("versions", "mpi", "launch", "cuda"))
    packages = [
        f"{shown} {versions[name] or 'not installed'}"
        for name, shown in MODULES.items()
        if not (cpus_alone and name == "cupy")
    ]
    library = f"{mpi['library']} {mpi['version']}" if mpi["library"] else f"none ({mpi['error']})"
    started = f"started by a launcher: {launch['launcher']} is set" if launch["launcher"] else "by itself"
    jobs = "".join(f", {name} {value}" for name, value in launch["jobs"].items())
    if cpus_alone:
        gpus = "GPUs:  none here, and none needed: arrays are NumPy's, and go by MPI from rank to rank"
        columns = slice(3)
    else:
        driver = f"driver for {cuda['driver']}" if cuda["driver"] else "no driver"
        gpus = f"CUDA:  {driver}, runtime {cuda['runtime'] or 'none'}, NCCL {cuda['nccl'] or 'none'}"
        columns = slice(None)
    lines = [
        f"cupy_syncbn {versions['cupy_syncbn']}, Python {versions['python']}, {', '.join(packages)}",
        f"MPI:   {library}",
        f"start: {_ranks(launch['size'])} ({started}{jobs})",
        _wrapped("CPU:   ", _cpu(facts["cpu"])),
        gpus,
        "",
    ]
    table: list[tuple[str, ...]] = [("rank", "host", "local rank", "transport", "GPU")]
    for row in facts["ranks"]:
        gpu = f"{row['gpu']}, {row['pci']}" if row["gpu"] else f"none: {row['why_no_gpu']}"
        table.append((str(row["rank"]), row["host"], str(row["local_rank"]), row["transport"] or "-", gpu))
    table = [row[columns] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    if not cpus_alone:
        lines += ["", *_transports(facts["transport"])]
    return "\n".join(lines)


def is_about_cpus(facts: dict[str, Any]) -> bool:
    """Tell whether there is neither a driver nor CuPy, and nothing was asked for that needs them."""
    found = facts["cuda"]["driver"] or facts["versions"]["cupy"]
    asked = facts["transport"]["by"] != "default" or any(row["device"] != "cpu" for row in facts["ranks"])
    return not found and not asked


def _cpu(cpu: dict[str, Any]) -> str:
    if not cpu["compiled"]:
        return str(cpu["status"])
    names = ", ".join(cpu["compiled"]), ", ".join(cpu["runnable"])
    return f"{cpu['status']} (compiled: {names[0]}; this processor runs: {names[1]})"


def _transports(transport: dict[str, Any]) -> list[str]:
    requested, chosen, lacks = transport["requested"], transport["chosen"], transport["lacks"]
    by = "the default" if transport["by"] == "default" else "from CUPY_SYNCBN_TRANSPORT"
    if requested not in TRANSPORTS:
        result = "is unknown"
    elif lacks.get(requested):
        result = "is not here"
    elif not chosen:
        result = "has nothing to do for one rank"
    elif requested != "auto":
        result = "is taken"
    else:
        reason = "as nccl is not here" if chosen == "mpi" else "which all ranks have"
        result = f"takes {chosen}, {reason}"
    lines = [f"CuPy arrays: {requested}, {by}, {result}. NumPy arrays go by MPI."]
    for name, note in transport["notes"].items():
        mark = "->" if name == chosen else "  "
        lack = f" Not here: {lacks[name]}." if lacks[name] else ""
        lines.append(_wrapped(f"{mark} {name:14}  ", note + lack))
    if chosen == "cuda-aware-mpi":
        lines += ["", "The self-test tries it: a segmentation fault now means that MPI does not know GPUs."]
    return lines


def verdict(facts: dict[str, Any]) -> str:
    """Return the outcome of the self-test, the problems and the next steps."""
    test = facts["self_test"]
    found = test["error"] or f"worst deviation {test['deviation']:.1e}, at most {test['tolerance']:g} allowed"
    result = "passed" if test["passed"] else "FAILED"
    head = f"self-test on {_ranks(facts['launch']['size'])}, device {test['device']}: {result} ({found})"
    problems = [_wrapped("problem: ", problem) for problem in facts["problems"]]
    steps = [_wrapped("next: ", step) for step in facts["next_steps"]]
    return "\n".join(["", head, *problems, *steps])


def one_line(text: object, length: int = REASON) -> str:
    """Return a text or an error as one line of ASCII, of at most `length` characters."""
    line = " ".join(str(text).split())
    if isinstance(text, Exception):
        line = line or type(text).__name__
    line = line.encode("ascii", "replace").decode()
    return line if len(line) <= length else line[: length - 3] + "..."


def _ranks(size: int) -> str:
    return f"{size} rank{'s' * (size > 1)}"


def _wrapped(head: str, text: str) -> str:
    return textwrap.fill(
        head + text, 110, subsequent_indent=" " * len(head), break_long_words=False, break_on_hyphens=False
    )
