"""``python -m cupy_syncbn``: the report of `show_config` in the shell."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from cupy_syncbn import __version__
from cupy_syncbn.diagnosis.survey import survey


def main() -> int:
    """Bind the GPUs as a training program does, and write the report on rank 0; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cupy_syncbn",
        description="Show what is installed, the GPU and the transport of each rank, and test them. "
        "On 4 ranks: mpirun -n 4 python -m mpi4py -m cupy_syncbn",
        epilog="Exit status: 0 if all is well, 1 if the self-test failed, or what was asked for is missing.",
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object: see show_config()")
    parser.add_argument("--version", action="version", version=f"cupy_syncbn {__version__}")
    arguments = parser.parse_args()
    logging.getLogger("cupy_syncbn").setLevel(logging.ERROR)  # the report says all
    facts = survey(_print, as_json=arguments.json, bind=True)
    return 0 if facts["ok"] else 1


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # by a reader that has seen enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python flushes at the end


if __name__ == "__main__":
    sys.exit(main())
