#!/usr/bin/env bash
# Install the project with an MPI library, as wheels, into .venv, and run the main job on 4 ranks.
#
# RANKS is their number; arguments go to scripts/train_digits.py (try --help).
# Needs Python 3.11 or newer (PYTHON names another than python3) and a network for the wheels.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "installing the project, mpich and what the main job needs into .venv: 2 to 5 minutes the first time, then seconds"
export PIP_DISABLE_PIP_VERSION_CHECK=1
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --editable '.[demo]' mpich

echo "training on ${RANKS:-4} ranks"

# One thread a rank: the ranks are the parallelism. mpi4py's runner ends all ranks when one fails.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/mpirun -n "${RANKS:-4}" .venv/bin/python -m mpi4py scripts/train_digits.py "$@"
