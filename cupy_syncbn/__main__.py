"""``python -m cupy_syncbn``: what is installed, each rank's GPU and transport, and whether they work."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys

from cupy_syncbn import config
from cupy_syncbn.device import bind_device


def main() -> int:
    """Bind the GPUs as a training program does, write the report on rank 0; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cupy_syncbn",
        description="Show what is installed, the GPU and the transport of each rank, and test them. "
        "On 4 ranks: mpirun -n 4 python -m mpi4py -m cupy_syncbn",
        epilog="Exit status: 0 if all is well, 1 if the self-test failed, or what was asked for is missing.",
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object: see show_config()")
    arguments = parser.parse_args()
    comm, _ = config.world()
    with contextlib.suppress(Exception):  # the report tells what the GPU lacks
        bind_device(comm)
    facts = config.survey(functools.partial(print, flush=True), as_json=arguments.json)
    return 0 if facts["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
