#!/usr/bin/env bash
# A job of PBS Professional or OpenPBS, on CPUs or GPUs, on one node or many. Submit it from the root of the clone:
#
#   qsub scripts/pbs/job.sh                                             4 ranks on one node
#   qsub -l select=4:ncpus=32:mpiprocs=32:mem=64gb scripts/pbs/job.sh   128 ranks on four
#   qsub -v PROGRAM="my_train.py --epochs 3" scripts/pbs/job.sh         another program, with its arguments
#
#   qsub -l select=2:ncpus=32:mpiprocs=4:ngpus=4:mem=128gb \
#        -v PROGRAM="scripts/train_digits.py --device cuda",CUPY_SYNCBN_TRANSPORT=nccl \
#        scripts/pbs/job.sh                                             8 ranks with a GPU each, on two nodes
#
# qsub hands no arguments to a script, so the program comes in a variable. Options of qsub win over the directives
# below. A site that asks for a project and a queue takes them there too: -P or -A, and -q. The environment must be on
# a file system that all nodes see:
#
#   python3 -m venv --system-site-packages .venv && .venv/bin/python -m pip install -e '.[demo]'  # or '.[demo,cuda13]'
#
# after the modules of the site's MPI and mpi4py are loaded: pip keeps them. Add mpich where the site has neither.
#
# PYTHON, by -v, names that of another environment, MPIEXEC the launcher of the MPI library that it uses.

# What qstat shows, and the log is called; its errors go to the same file, in order.
#PBS -N cupy_syncbn
#PBS -j oe
# A chunk is what one node gives: cores, ranks, memory. Without mpiprocs it would be one rank, whatever ncpus is.
#PBS -l select=1:ncpus=4:mpiprocs=4:mem=8gb
# Each chunk on a node of its own, so that the number of chunks is that of nodes.
#PBS -l place=scatter
# The shorter the limit, the sooner a job fits into a gap of the schedule.
#PBS -l walltime=00:20:00

# The cluster's own MPI library knows its network and PBS; launchers from the wheels of MPICH and Open MPI need to reach
# the other nodes by ssh. To use it, load its modules here as for the installation:
# module load openmpi    # before set -u, which the functions of some module systems do not stand

set -euo pipefail
cd "$PBS_O_WORKDIR" # where qsub was called; PBS starts jobs in the home folder

PYTHON="${PYTHON:-$PWD/.venv/bin/python}"
# The launcher must belong to the MPI library of that Python: that of the wheel is beside it.
MPIEXEC="${MPIEXEC:-$(PATH="$(dirname "$PYTHON"):$PATH" command -v mpiexec)}"
read -ra program <<<"${PROGRAM:-scripts/train_digits.py}"
ranks=$(wc -l <"$PBS_NODEFILE") # it has a line for each rank: the name of its node

# By env, since not all launchers take the variables of this script to other nodes.
variables=(
    # Ranks are the parallelism. PBS sets it to all cores of the chunk, which would be as many threads in every rank.
    OMP_NUM_THREADS=1
    # A rank that waits this long for another says in which layer, while walltime would kill the job without a word.
    CUPY_SYNCBN_TIMEOUT="${CUPY_SYNCBN_TIMEOUT:-300}"
    # With one GPU per rank, nccl makes it an error if NCCL is missing: auto would go by the host without a word.
    CUPY_SYNCBN_TRANSPORT="${CUPY_SYNCBN_TRANSPORT:-auto}"
    # The log shows lines when they are printed, and no progress bars.
    PYTHONUNBUFFERED=1 TQDM_DISABLE="${TQDM_DISABLE:-1}"
)

# Each rank sees all GPUs of its node, and bind_device() takes one by the rank's number there. mpi4py's runner ends all
# ranks when one has an error that is not caught; mpiexec does when one is killed. MPICH, Intel MPI and Open MPI know
# -machinefile.
on_ranks() {
    "$MPIEXEC" -n "$ranks" -machinefile "$PBS_NODEFILE" env "${variables[@]}" "$PYTHON" -m mpi4py "$@"
}

# With the launcher of another MPI library each rank would be a world of its own, and train alone without a word.
on_ranks -c "from cupy_syncbn import default_group
if default_group().size != $ranks:
    raise SystemExit(f'expected $ranks ranks of one MPI world (got {default_group().size}): '
        '$MPIEXEC does not belong to the MPI library of this Python')"

on_ranks "${program[@]}"
