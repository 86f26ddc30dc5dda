#!/usr/bin/env bash
# A Slurm job on GPUs, one per rank, on one node or many. Submit it from the root of the clone:
#
#   sbatch scripts/slurm/gpu.sh                                        4 ranks with a GPU each, on one node
#   sbatch --nodes=8 scripts/slurm/gpu.sh                              32 ranks on eight
#   sbatch --ntasks-per-node=8 --gpus-per-node=8 scripts/slurm/gpu.sh my_train.py --epochs 3
#
# Options of sbatch win over the directives below. A site that asks for an account and a partition takes them there
# too, or as SBATCH_ACCOUNT and SBATCH_PARTITION. The environment must be on a file system that all nodes see:
#
#   python3 -m venv --system-site-packages .venv && .venv/bin/python -m pip install -e '.[demo,cuda13]'
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
# As many ranks as GPUs on each node: NCCL wants one GPU per rank.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
# Not --gpus-per-task, which shows each rank its own GPU only. That works too, as bind_device() counts the GPUs that a
# rank sees; but GPUs that do not see each other may have to copy through memory of the host, not over NVLink.
#SBATCH --gpus-per-node=4
# Ranks that follow each other are neighbours: on one node, where they add up before anything leaves it, and on one
# socket next to the GPUs of their numbers, as most nodes number them.
#SBATCH --distribution=block:block
# For the threads that read the data; take the cores of a node divided by its GPUs.
#SBATCH --cpus-per-task=8
# Physical cores only: the thread that launches kernels shares its core with no other.
# srun binds ranks to cores by this: --cpu-bind excludes it, but for --cpu-bind=verbose, which shows the binding.
#SBATCH --hint=nomultithread
# Many sites give a job next to nothing, or a whole node, unless it says what it needs.
#SBATCH --mem-per-cpu=4G
# The shorter the limit, the sooner a job fits into a gap of the schedule.
#SBATCH --time=00:20:00

# The cluster's own MPI library knows its network; the wheels of MPICH and Open MPI may have no more than TCP between
# nodes. With NCCL, MPI starts the ranks and carries little else. To use the cluster's, load its modules here as for the
# installation:
# module load openmpi    # before set -u, which the functions of some module systems do not stand

set -euo pipefail

# How ranks find each other must be a way that their MPI library knows: pmi2 for MPICH, Intel MPI and MVAPICH, pmix
# for Open MPI, cray_shasta for Cray MPICH. `srun --mpi=list` shows what the cluster has. srun reads this variable.
export SLURM_MPI_TYPE="${SLURM_MPI_TYPE:-pmi2}"

# Not from $0: Slurm runs a copy of this file from a folder of its own. The job starts where sbatch was called.
PYTHON="${PYTHON:-$SLURM_SUBMIT_DIR/.venv/bin/python}"
[ $# -gt 0 ] || set -- scripts/train_digits.py --device cuda
# The wheel of MPICH would tell its UCX addresses in longer lines than Slurm's pmi2 takes, and ranks on several nodes
# would hang or end as they start; those of libfabric (ofi) are short.
[ ! -x "${PYTHON%/*}/mpichversion" ] || export MPIR_CVAR_CH4_NETMOD="${MPIR_CVAR_CH4_NETMOD:-ofi}"

export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
# Each rank has its GPU: if NCCL is missing nonetheless, that is an error here, not a slower run by way of the host.
export CUPY_SYNCBN_TRANSPORT="${CUPY_SYNCBN_TRANSPORT:-nccl}"
# NCCL then says what is wrong when it fails; INFO shows which network it took. If that is the wrong one, name the
# right one in NCCL_SOCKET_IFNAME or NCCL_IB_HCA.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# A rank that waits this long for another says in which layer, while --time would kill the job without a word.
export CUPY_SYNCBN_TIMEOUT="${CUPY_SYNCBN_TIMEOUT:-300}"
# CuPy keeps compiled kernels in ~/.cupy: where that is slow or read-only, export CUPY_CACHE_DIR, another folder.
# The log shows lines when they are printed, and no progress bars.
export PYTHONUNBUFFERED=1 TQDM_DISABLE="${TQDM_DISABLE:-1}"

# mpi4py's runner ends all ranks when one has an error that is not caught; --kill-on-bad-exit does when one is killed,
# as for want of memory. --export=ALL: a job submitted with --export=NONE would keep the variables above from the
# ranks. --cpus-per-task: from Slurm 22.05 on, srun does not take it from the job. Each rank sees all GPUs that the job
# has on its node, and bind_device() takes one by the rank's number there. --gpu-bind=none would not do the same: Slurm
# then leaves CUDA_VISIBLE_DEVICES unset, and where no cgroup confines them ranks see the GPUs of other jobs.
ranks() {
    srun --export=ALL --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 "$PYTHON" -m mpi4py "$@"
}

# With the wrong SLURM_MPI_TYPE each rank would be a world of its own, and train alone without a word.
ranks -c "from cupy_syncbn import default_group
if default_group().size != $SLURM_NTASKS:
    raise SystemExit(f'expected $SLURM_NTASKS ranks of one MPI world (got {default_group().size}): '
        'SLURM_MPI_TYPE=$SLURM_MPI_TYPE does not suit the MPI library of this Python')"

ranks "$@"
