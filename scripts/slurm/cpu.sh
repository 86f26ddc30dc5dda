#!/usr/bin/env bash
# A Slurm job on CPUs, on one node or many. Submit it from the root of the clone:
#
#   sbatch scripts/slurm/cpu.sh                                        4 ranks on one node
#   sbatch --nodes=4 --ntasks-per-node=32 scripts/slurm/cpu.sh         128 ranks on four
#   sbatch scripts/slurm/cpu.sh my_train.py --epochs 3                 another program, with its arguments
#
# Options of sbatch win over the directives below. A site that asks for an account and a partition takes them there
# too, or as SBATCH_ACCOUNT and SBATCH_PARTITION. The environment must be on a file system that all nodes see:
#
#   python3 -m venv --system-site-packages .venv && .venv/bin/python -m pip install -e '.[demo]'
#
# after the modules of the site's MPI and mpi4py are loaded: pip keeps them. Add mpich where the site has neither.
#
# PYTHON names that of another environment; SLURM_MPI_TYPE is explained below.

# What squeue shows, and the log is called; %j is the number of the job.
#SBATCH --job-name=cupy_syncbn
#SBATCH --output=%x-%j.out
# A job that Slurm ends and starts again, since a node failed or another job came first, goes on in that log. The program
# has to save what it has and take it up, as scripts/examples/training_loop.py does with --checkpoint.
#SBATCH --requeue
#SBATCH --open-mode=append
# Nodes times ranks per node, rather than --ntasks: Slurm may spread --ntasks unevenly over more nodes than needed.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
# Ranks that follow each other are neighbours: on one node, where they add up before anything leaves it, and on one
# socket.
#SBATCH --distribution=block:block
# Ranks are the parallelism. More cores per rank serve the BLAS of a program with large matrices.
#SBATCH --cpus-per-task=1
# Physical cores only: two ranks on the hardware threads of one core would share its floating-point units.
# srun binds ranks to cores by this: --cpu-bind excludes it, but for --cpu-bind=verbose, which shows the binding.
#SBATCH --hint=nomultithread
# Many sites give a job next to nothing, or a whole node, unless it says what it needs.
#SBATCH --mem-per-cpu=2G
# The shorter the limit, the sooner a job fits into a gap of the schedule.
#SBATCH --time=00:20:00

# The cluster's own MPI library knows its network; the wheels of MPICH and Open MPI may have no more than TCP between
# nodes. To use it, load its modules here as for the installation:
# module load openmpi    # before set -u, which the functions of some module systems do not stand

set -euo pipefail

# How ranks find each other must be a way that their MPI library knows: pmi2 for MPICH, Intel MPI and MVAPICH, pmix
# for Open MPI, cray_shasta for Cray MPICH. `srun --mpi=list` shows what the cluster has. srun reads this variable.
export SLURM_MPI_TYPE="${SLURM_MPI_TYPE:-pmi2}"

# Not from $0: Slurm runs a copy of this file from a folder of its own. The job starts where sbatch was called.
PYTHON="${PYTHON:-$SLURM_SUBMIT_DIR/.venv/bin/python}"
[ $# -gt 0 ] || set -- scripts/train_digits.py
# The wheel of MPICH would tell its UCX addresses in longer lines than Slurm's pmi2 takes, and ranks on several nodes
# would hang or end as they start; those of libfabric (ofi) are short.
[ ! -x "${PYTHON%/*}/mpichversion" ] || export MPIR_CVAR_CH4_NETMOD="${MPIR_CVAR_CH4_NETMOD:-ofi}"

export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
# A rank that waits this long for another says in which layer, while --time would kill the job without a word.
export CUPY_SYNCBN_TIMEOUT="${CUPY_SYNCBN_TIMEOUT:-300}"
# The log shows lines when they are printed, and no progress bars.
export PYTHONUNBUFFERED=1 TQDM_DISABLE="${TQDM_DISABLE:-1}"

# mpi4py's runner ends all ranks when one has an error that is not caught; --kill-on-bad-exit does when one is killed,
# as for want of memory. --export=ALL: a job submitted with --export=NONE would keep the variables above from the
# ranks. --cpus-per-task: from Slurm 22.05 on, srun does not take it from the job.
ranks() {
    srun --export=ALL --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 "$PYTHON" -m mpi4py "$@"
}

# With the wrong SLURM_MPI_TYPE each rank would be a world of its own, and train alone without a word.
ranks -c "from cupy_syncbn import default_group
if default_group().size != $SLURM_NTASKS:
    raise SystemExit(f'expected $SLURM_NTASKS ranks of one MPI world (got {default_group().size}): '
        'SLURM_MPI_TYPE=$SLURM_MPI_TYPE does not suit the MPI library of this Python')"

ranks "$@"
