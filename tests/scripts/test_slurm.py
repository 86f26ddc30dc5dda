"""The batch scripts, run: those of Slurm in a cluster of two nodes that the tests start on this machine.

The cluster has its own configuration, key and ports, and ends with the tests. It needs Debian's packages
slurm-wlm and munge, and libpmix-dev for Open MPI: Slurm's plugin loads the library by the name that this
package gives it. The GPUs are device files that every machine has: what Slurm shows a rank is tested, and not
what it would compute.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from support.launcher import REPOSITORY, clean_environment, other_python, run, vendor_of
from support.missing import skip_without

pytestmark = [pytest.mark.launch, pytest.mark.mpi_skip]
slurm = pytest.mark.slurm

DEADLINE = 90
SLURM_SCRIPTS = sorted((REPOSITORY / "scripts" / "slurm").glob("*.sh"))
PBS_SCRIPT = REPOSITORY / "scripts" / "pbs" / "job.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "scancel")
NODES = ("first", "second")

# A job that was requeued waits until its credential has expired: here 20 s, not 120.
CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge,cred_expire=20
FirstJobId={first_job}
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
TmpFS={folder}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1
KillWait=2
GresTypes=gpu
NodeName=DEFAULT Sockets=1 CoresPerSocket=64 RealMemory=256000 Gres=gpu:4
NodeName={nodes[0]} NodeHostname=localhost Port={ports[1]}
NodeName={nodes[1]} NodeHostname=localhost Port={ports[2]}
PartitionName=all Nodes=ALL Default=YES MaxTime=60
"""
DEVICES = "Name=gpu File=/dev/null,/dev/zero,/dev/full,/dev/random\n"

# Writes what each rank sees. Its package is the one that the tests run, wherever the script was submitted.
RANKS = """
import json, os, sys
import cupy_syncbn
from mpi4py import MPI

world = MPI.COMM_WORLD
names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
         "CUPY_SYNCBN_TIMEOUT", "CUPY_SYNCBN_TRANSPORT")
seen = {name: os.environ.get(name) for name in names}
seen |= {"rank": world.rank, "size": world.size, "local_rank": cupy_syncbn.local_rank(),
         "arguments": sys.argv[1:],
         "group": [cupy_syncbn.default_group().rank, cupy_syncbn.default_group().size]}
everyones = world.gather(seen)
if world.rank == 0:
    print("SEEN", json.dumps(everyones))
"""

# The training loop, which is not through when Slurm ends it.
ENDED_ONCE = """
import contextlib, os, runpy, sys, time

_, loop, checkpoint = sys.argv
is_first = "SLURM_RESTART_COUNT" not in os.environ
sys.argv[1:] = ["--checkpoint", checkpoint, "--steps", "100" if is_first else "200"]
try:
    runpy.run_path(loop, run_name="__main__")
finally:
    if is_first:
        time.sleep(600)
"""

# Rank 1 ends with an error while rank 0 waits for it, for longer than any deadline here.
ERROR = """
from mpi4py import MPI

if MPI.COMM_WORLD.rank == 1:
    raise RuntimeError("of rank 1")
MPI.COMM_WORLD.recv(source=1)
"""


@dataclasses.dataclass
class Cluster:
    """Slurm's daemons, and the environment in which its commands find them."""

    folder: Path
    environment: dict[str, str] = dataclasses.field(repr=False)

    def command(self, *words, **variables):
        status, output = run(words, self.environment | variables, DEADLINE)
        assert status == 0, f"{' '.join(words)}: {output}\n{self.logs()}"
        return output

    def submit(self, *words, python=sys.executable, requeue_when=None, **variables):
        """Submit options, script and arguments; return the job's state, exit code and output.

        Once `requeue_when()` is true, Slurm has to end the job and to start it again.
        """
        mpi_type = "pmix" if vendor_of(python) == "Open MPI" else "pmi2"
        variables = {"PYTHON": python, "SLURM_MPI_TYPE": mpi_type} | variables
        log = self.folder / "job.out"
        log.unlink(missing_ok=True)
        job = self.command("sbatch", "--parsable", f"--output={log}", *words, **variables).strip()
        requeue_when = requeue_when or (lambda: False)
        end = time.monotonic() + DEADLINE
        while True:
            fields = dict(
                re.findall(r"(\w+)=(\S+)", self.command("scontrol", "--oneliner", "show", "job", job))
            )
            if fields["Restarts"] == "0" and requeue_when():
                self.command("scontrol", "requeue", job)
            if fields["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
                output = log.read_text(errors="replace") if log.exists() else ""
                return fields["JobState"], fields["ExitCode"], output
            if time.monotonic() > end:
                output = log.read_text(errors="replace") if log.exists() else ""
                self.command("scancel", "--signal=KILL", "--full", job)
                pytest.fail(f"job {job} did not end within {DEADLINE} s: {fields}\n{output}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self):
        return "\n".join(
            f"{log.name}:\n{log.read_text(errors='replace')}" for log in self.folder.glob("*.log")
        )


def free_ports(number):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def processes_of(folder):
    """Return the processes that have the folder in their command or environment, this one left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (path / "environ").read_bytes() + (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return [process for process in found if process != os.getpid()]


def wait_until(condition, what, describe):
    end = time.monotonic() + 30
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"{what} took more than 30 s:\n{describe()}")
        time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster():
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])
    missing = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    skip_without(missing and f"no {', '.join(missing)}: install slurm-wlm and munge")

    # Not pytest's folder: the path of a socket has at most 107 characters, and others may not enter it.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    daemons = []

    def start(*command, log):
        with open(folder / log, "w") as file:
            daemons.append(
                subprocess.Popen(
                    command, cwd=folder, env=cluster.environment, stdin=subprocess.DEVNULL, stdout=file,
                    stderr=file, start_new_session=True,
                )
            )  # fmt: skip

    kept = {
        name: value
        for name, value in clean_environment().items()
        if not name.startswith(("SLURM_", "SBATCH_"))
    }
    kept |= {
        "PATH": path,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
        "PYTHONIOENCODING": "utf-8",
    }
    cluster = Cluster(folder, kept)
    user = pwd.getpwuid(os.geteuid()).pw_name
    settings = {"folder": folder, "user": user, "ports": free_ports(3), "nodes": NODES}
    # MPICH names its shared memory by the number of the job: what a killed one left must not be found again.
    settings["first_job"] = 1 + secrets.randbelow(10**7)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**settings))
    (folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} {DEVICES}")
    for name in ("state", *NODES):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(128))
    try:
        start(
            "munged", "--foreground", f"--socket={folder / 'munge'}", f"--key-file={key}",
            f"--pid-file={folder / 'munge.pid'}", f"--seed-file={folder / 'munge.seed'}", log="munged.log",
        )  # fmt: skip
        wait_until((folder / "munge").exists, "munged", cluster.logs)
        start("slurmctld", "-D", log="slurmctld.log")
        for node in NODES:
            start("slurmd", "-D", "-N", node, log=f"{node}.log")

        def idle():
            assert all(daemon.poll() is None for daemon in daemons), cluster.logs()
            _, output = run(["sinfo", "--noheader", "--Node", "--format=%t"], cluster.environment, DEADLINE)
            return output.split() == ["idle"] * len(NODES)

        wait_until(idle, "a cluster with idle nodes", cluster.logs)
        yield cluster
    finally:
        # Ranks first, else slurmstepd would report their end for as long as nobody listens.
        for _ in range(20):
            left = processes_of(folder)
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            for daemon in daemons:
                daemon.poll()
            if not left:
                break
            time.sleep(0.1)
        shutil.rmtree(folder, ignore_errors=True)
        assert not left, f"processes of the cluster are left: {left}"


@pytest.fixture(scope="module", params=["this", "other"])
def python(request, cluster):
    """Return the Python of each MPI library, if the cluster can start its ranks."""
    python = sys.executable if request.param == "this" else other_python()
    if vendor_of(python) == "Open MPI" and "can not load PMIx library" in cluster.logs():
        skip_without("Slurm finds no PMIx for Open MPI: install libpmix-dev")
    return python


@pytest.fixture
def program(tmp_path):
    """Return a function that writes a program, and returns its path."""

    def write(source):
        path = tmp_path / "program.py"
        path.write_text(source)
        return str(path)

    return write


def script(name):
    return str(REPOSITORY / "scripts" / "slurm" / name)


def seen(output):
    """Return what the ranks saw: one world, in which all write once."""
    (line,) = re.findall(r"^SEEN (.*)$", output, re.MULTILINE)
    everyones = json.loads(line)
    assert [one["rank"] for one in everyones] == list(range(len(everyones)))
    assert all(one["size"] == len(everyones) for one in everyones)
    assert all(one["group"] == [one["rank"], one["size"]] for one in everyones)
    return everyones


@pytest.mark.parametrize(
    "path", [*SLURM_SCRIPTS, PBS_SCRIPT], ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_scripts_are_bash(path):
    status, output = run(["bash", "-n", str(path)], clean_environment(), DEADLINE)
    assert (status, output) == (0, "")
    assert os.access(path, os.X_OK)


@slurm
@pytest.mark.parametrize("options", [(), ("--nodes=2",)], ids=["one-node", "two-nodes"])
@pytest.mark.parametrize("path", SLURM_SCRIPTS, ids=lambda path: path.stem)
def test_directives_are_accepted(cluster, path, options):
    """As they are, and by a cluster that has what they ask for."""
    output = cluster.command("sbatch", "--test-only", *options, str(path))
    nodes = ",".join(NODES[: 1 + len(options)])
    assert re.search(rf"Job \d+ to start at \S+ using \d+ processors on nodes {nodes} ", output), output


@slurm
@pytest.mark.parametrize(
    "shape",
    [pytest.param((1, 2), marks=pytest.mark.long, id="one-node"), pytest.param((2, 1), id="two-nodes")],
)
def test_training(cluster, tmp_path, shape):
    nodes, ranks = shape
    state, code, output = cluster.submit(
        f"--nodes={nodes}", f"--ntasks-per-node={ranks}", f"--chdir={REPOSITORY}", script("cpu.sh"),
        "scripts/train_digits.py", "--epochs", "1", "--batch", "32", "--plot", str(tmp_path / "curves.png"),
    )  # fmt: skip
    assert (state, code) == ("COMPLETED", "0:0"), output
    assert "float64 on cpu, 2 rank(s)" in output
    assert "they agree" in output
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@slurm
@pytest.mark.parametrize("nodes", [pytest.param(1, marks=pytest.mark.long), 2], ids=["one-node", "two-nodes"])
def test_ranks_are_one_world(cluster, program, python, nodes):
    # Ranks of MPICH on two nodes of one machine would name the shared memory of their nodes alike.
    ranks_per_node = 2 if nodes == 1 or vendor_of(python) == "Open MPI" else 1
    state, code, output = cluster.submit(
        f"--nodes={nodes}", f"--ntasks-per-node={ranks_per_node}", script("cpu.sh"),
        program(RANKS), "--epochs", "3 4", python=python, CUPY_SYNCBN_TIMEOUT="77",
    )  # fmt: skip
    assert (state, code) == ("COMPLETED", "0:0"), output
    everyones = seen(output)
    assert len(everyones) == nodes * ranks_per_node
    assert [int(one["SLURM_PROCID"]) for one in everyones] == [one["rank"] for one in everyones]
    assert [one["SLURMD_NODENAME"] for one in everyones] == sorted(NODES[:nodes] * ranks_per_node)
    assert all(one["arguments"] == ["--epochs", "3 4"] for one in everyones)
    assert all((one["OMP_NUM_THREADS"], one["CUPY_SYNCBN_TIMEOUT"]) == ("1", "77") for one in everyones)
    for node in NODES[:nodes]:
        local_ranks = [one["local_rank"] for one in everyones if one["SLURMD_NODENAME"] == node]
        # The second node is on the same machine: it depends on the MPI library whether its ranks count on.
        first = local_ranks[0] if node == NODES[1] else 0
        assert local_ranks == list(range(first, first + ranks_per_node))


@slurm
@pytest.mark.long
def test_a_job_that_is_requeued_goes_on_from_its_checkpoint(cluster, program, tmp_path):
    """On both nodes, with the losses of one process; the log has both starts."""
    checkpoint, loop = tmp_path / "state.npz", REPOSITORY / "scripts" / "examples" / "training_loop.py"
    state, code, output = cluster.submit(
        "--nodes=2", "--ntasks-per-node=1", script("cpu.sh"), program(ENDED_ONCE), str(loop), str(checkpoint),
        requeue_when=checkpoint.exists,
    )  # fmt: skip
    assert (state, code) == ("COMPLETED", "0:0"), output
    assert re.search(r"goes on from step (50|100) of 200", output), output
    assert re.search(r"losses within \S+ of one process's", output.partition("goes on")[2]), output


@slurm
def test_error_ends_the_job(cluster, program):
    state, code, output = cluster.submit("--ntasks-per-node=2", script("cpu.sh"), program(ERROR))
    assert state == "FAILED", output
    assert code != "0:0"
    assert "RuntimeError: of rank 1" in output


@slurm
@pytest.mark.parametrize("words", [["cpu.sh"], ["--gpus-per-node=2", "gpu.sh"]], ids=["cpu", "gpu"])
def test_separate_worlds_are_an_error(cluster, program, words):
    """What one gets by the wrong way of starting MPI must not look like training."""
    *options, name = words
    state, code, output = cluster.submit(
        "--ntasks-per-node=2", *options, script(name), program(RANKS), SLURM_MPI_TYPE="none"
    )
    assert state == "FAILED", output
    assert code != "0:0"
    assert "expected 2 ranks of one MPI world (got 1): SLURM_MPI_TYPE=none does not suit" in output
    assert "SEEN" not in output


@slurm
@pytest.mark.parametrize("nodes", [1, 2], ids=["one-node", "two-nodes"])
def test_ranks_see_all_gpus_of_their_node(cluster, program, nodes):
    ranks = 2  # on two nodes one each
    options = (f"--nodes={nodes}", f"--ntasks-per-node={ranks // nodes}", "--gpus-per-node=2")
    state, code, output = cluster.submit(
        *options,
        script("gpu.sh"),
        program(RANKS),
        CUPY_SYNCBN_TRANSPORT="mpi",  # NCCL takes more than device files
    )
    assert (state, code) == ("COMPLETED", "0:0"), output
    everyones = seen(output)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in everyones] == ["0,1"] * ranks
    assert all(one["OMP_NUM_THREADS"] == "8" for one in everyones)


@slurm
@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed here")
def test_gpu_job_without_cupy(cluster, program):
    """It ends at once, and says what is missing: it would train on the CPU."""
    options = ("--ntasks-per-node=2", "--gpus-per-node=2")
    state, code, output = cluster.submit(*options, script("gpu.sh"), program(RANKS))
    assert state == "FAILED", output
    assert code != "0:0"
    assert "transport 'nccl': CuPy is not installed" in output
    assert "SEEN" not in output


def run_pbs(tmp_path, python, words, ranks=2, **variables):
    """Run the script of PBS as PBS does: at home, with the folder of qsub and a line for each rank."""
    (tmp_path / "nodes").write_text("localhost\n" * ranks)
    environment = clean_environment(
        PBS_O_WORKDIR=str(REPOSITORY), PBS_NODEFILE=str(tmp_path / "nodes"), OMP_NUM_THREADS="64",
        PYTHONPATH=str(REPOSITORY), PYTHONIOENCODING="utf-8", PYTHON=python, PROGRAM=words,
    )  # fmt: skip
    if os.geteuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = ["bash", "-c", 'cd && exec bash "$0"', str(PBS_SCRIPT)]
    return run(command, environment | variables, DEADLINE)


@pytest.mark.parametrize("which", ["this", "other"])
def test_pbs_ranks_are_one_world(tmp_path, program, which):
    python = sys.executable if which == "this" else other_python()
    status, output = run_pbs(tmp_path, python, f"{program(RANKS)} --epochs 3")
    assert status == 0, output
    everyones = seen(output)
    assert [one["local_rank"] for one in everyones] == [0, 1]
    assert all(one["arguments"] == ["--epochs", "3"] for one in everyones)
    assert all((one["OMP_NUM_THREADS"], one["CUPY_SYNCBN_TIMEOUT"]) == ("1", "300") for one in everyones)


@pytest.mark.long
def test_pbs_training(tmp_path):
    words = "scripts/train_digits.py --epochs 1 --batch 32 --plot="
    status, output = run_pbs(tmp_path, sys.executable, words)
    assert status == 0, output
    assert "float64 on cpu, 2 rank(s)" in output
    assert "they agree" in output


def test_pbs_separate_worlds_are_an_error(tmp_path, program):
    """A launcher of another MPI library may start ranks that know nothing of each other."""
    launcher = tmp_path / "mpiexec"
    launcher.write_text('#!/bin/bash\nshift 4\n"$@" & "$@"\n')
    launcher.chmod(0o755)
    status, output = run_pbs(tmp_path, sys.executable, program(RANKS), MPIEXEC=str(launcher))
    assert status == 1, output
    assert "expected 2 ranks of one MPI world (got 1)" in output
    assert "SEEN" not in output


# ---- srun by hand, without the scripts ----
START = """
import os, sys
import numpy as np
from cupy_syncbn import SyncBatchNorm, default_group

SyncBatchNorm(3)(np.ones((4, 3), "f4"))
group = default_group()
started = "mpi4py.MPI" in sys.modules
os.write(1, f"RANK {group.rank} of {group.size} {started}\\n".encode())
"""


def srun(cluster, *words):
    """Return the status and output of a job step of its own."""
    return run(["srun", "--nodes=1", "--overlap", *words], cluster.environment, DEADLINE)


@slurm
@pytest.mark.parametrize("kind", ["pmi2", "pmix", "none"])
def test_srun_never_trains_alone_without_a_word(cluster, program, python, kind):
    """The right --mpi gives the right ranks; others a warning or an error that names the cause."""
    is_right = kind == ("pmix" if vendor_of(python) == "Open MPI" else "pmi2")
    ranks = 2 if vendor_of(python) == "Open MPI" else 3  # nor does it start more of a program of its own here
    words = (f"--mpi={kind}", f"--ntasks={ranks}", python, "-m", "mpi4py", program(START))
    status, output = srun(cluster, *words)
    found = re.findall(r"RANK (\d) of (\d) True", output)
    in_one_world = sorted(found) == [(str(rank), str(ranks)) for rank in range(ranks)]
    assert status is not None, output
    assert in_one_world or not is_right, output
    if status:
        assert re.search(r"PMI|MPI_Init", output), output
    elif not in_one_world:
        assert found == [("0", "1")] * ranks, output
        assert output.count(f"{ranks} processes were started, but each is alone in its world") == ranks
        assert f"MPI library, {vendor_of(python)} (with srun, see --mpi=pmix and --mpi=pmi2)" in output


@slurm
@pytest.mark.parametrize("kind", ["pmi2", pytest.param("pmix", marks=pytest.mark.long), "none"])
def test_programs_one_after_the_other_in_a_shell_of_one_task(cluster, program, python, kind):
    """As in `srun --pty bash`, where PMI would serve but the first: none of them starts MPI."""
    shell = f"for i in 1 2 3; do {python} -W error {program(START)}; done"
    status, output = srun(cluster, f"--mpi={kind}", "--ntasks=1", "sh", "-c", shell)
    assert status == 0, output
    assert output.splitlines() == ["RANK 0 of 1 False"] * 3


@slurm
def test_program_without_srun_is_a_single_process(cluster, program):
    state, code, output = cluster.submit("--ntasks=2", f"--wrap={sys.executable} -W error {program(START)}")
    assert (state, code) == ("COMPLETED", "0:0"), output
    assert output == "RANK 0 of 1 False\n"


@slurm
def test_rank_that_fails_early_ends_the_step(cluster, program):
    source = "import os, cupy_syncbn\nif os.environ['SLURM_PROCID'] == '1': raise KeyError('of rank 1')\n"
    words = ("--mpi=pmi2", "--ntasks=3", sys.executable, "-m", "mpi4py", program(source + START))
    status, output = srun(cluster, *words)
    assert status not in (0, None), output
    assert "KeyError: 'of rank 1'" in output
    assert "RANK" not in output


@slurm
@pytest.mark.parametrize("kind", [pytest.param("pmi2", marks=pytest.mark.long), "none"])
def test_report_in_a_step(cluster, kind):
    words = (f"--mpi={kind}", "--ntasks=2", sys.executable, "-m", "mpi4py", "-m", "cupy_syncbn")
    status, output = srun(cluster, *words)
    assert output.count("cupy_syncbn 0.") == 1
    if kind == "pmi2":
        assert status == 0, output
        assert "2 ranks (started by a launcher: PMI_RANK is set" in output
    else:
        assert status not in (0, None), output
        assert "1 rank (started by a launcher: SLURM_STEP_NUM_TASKS is set" in output
        assert "2 processes were started, but each is alone in its world" in " ".join(output.split())
