"""When MPI is started and in which processes, what a rank that fails early does to others, who is warned.

start_cases.py is what the ranks run.
"""

import os
import re
import sys
import time
from pathlib import Path

import pytest
import start_cases

from cupy_syncbn.comm import launcher
from support.launcher import (
    OVERSUBSCRIBE,
    REPOSITORY,
    clean_environment,
    find_launcher,
    finish,
    launch,
    other_python,
    run,
    vendor_of,
)

pytestmark = pytest.mark.mpi_skip
launches = pytest.mark.launch

PROGRAM = start_cases.__file__
DEADLINE = 60
TIMEOUT = 1.5
MARGIN = 8.0
"""Seconds for the launcher, and for a busy machine; without an end a rank would wait for DEADLINE."""

LIBRARIES = ["this", "other"]


def python_of(library):
    return sys.executable if library == "this" else other_python()


def run_case(library, ranks, name, *arguments, options=(), runner=True, **variables):
    """Return status, output without the ranks' labels, and seconds."""
    words = [*(["-m", "mpi4py"] if runner else []), PROGRAM, name, *arguments]
    began = time.monotonic()
    _, status, output = launch(python_of(library), ranks, words, DEADLINE, *options, **variables)
    seconds = time.monotonic() - began
    return status, re.sub(r"\[\d+(,\d+\]<\w+>:|\]) ?", "", output), seconds


def assert_trained(output, ranks):
    found = re.findall(r"trained as (\d) of (\d)", output)
    assert sorted(found) == [(str(rank), str(ranks)) for rank in range(ranks)], output


# ---- A rank fails before its first layer ----
# By name: the number of ranks, what the output shows, and the libraries that run it without `-m long`.
EARLY = {
    "missing_file": (2, "FileNotFoundError", LIBRARIES),
    "wrong_option": (3, "invalid int value: 'many'", ["this"]),
    "exits_with_a_text": (4, "no licence on this node", ["this"]),
    "missing_module": (2, "module_of_another_node", []),
    "wrong_layer": (3, "ValueError: .*sine", ["this"]),
    "interrupted": (5, "KeyboardInterrupt", []),
}


@launches
@pytest.mark.parametrize(
    ("name", "library"),
    [
        pytest.param(
            name, library, marks=[] if library in EARLY[name][2] else pytest.mark.long
        )
        for name in EARLY
        for library in LIBRARIES
    ],
)  # fmt: skip
def test_rank_that_fails_before_its_first_layer_ends_all(name, library):
    """At once, as MPI is started by the import: mpi4py's runner can tell the launcher."""
    ranks, text, _ = EARLY[name]
    status, output, seconds = run_case(library, ranks, name, CUPY_SYNCBN_TIMEOUT="40")
    assert status not in (0, None), output
    assert re.search(text, output), output
    assert "trained" not in output
    assert seconds < 20


@launches
@pytest.mark.parametrize("library", ["this", pytest.param("other", marks=pytest.mark.long)])
def test_rank_that_leaves_before_its_first_layer(library):
    """It has no error, so the others wait for the timeout, and no longer."""
    timeout = 2 * TIMEOUT  # the start of MPI has that time too, on a busy machine as well
    status, output, seconds = run_case(library, 2, "leaves_early", CUPY_SYNCBN_TIMEOUT=str(timeout))
    assert status not in (0, None), output
    assert "CollectiveTimeoutError" in output
    assert seconds < timeout + MARGIN


# ---- A rank never starts MPI ----
@launches
@pytest.mark.parametrize(
    ("name", "ranks", "library"),
    [
        ("never_imports", 3, "this"),
        ("never_imports", 2, "other"),
        pytest.param("hangs_before_the_import", 2, "this", marks=pytest.mark.long),
        pytest.param("hangs_before_the_import", 4, "other", marks=pytest.mark.long),
        pytest.param("own_timers_are_kept", 2, "this", marks=pytest.mark.long),
    ],
)
def test_start_has_a_deadline(name, ranks, library):
    status, output, seconds = run_case(library, ranks, name, CUPY_SYNCBN_TIMEOUT=str(TIMEOUT))
    assert status not in (0, None), output
    assert rf"of {ranks} waited 1.5 s (CUPY_SYNCBN_TIMEOUT) for MPI to start" in output
    assert "start_cases.py" in output  # the traceback
    assert seconds < TIMEOUT + MARGIN


TIMERS = """
import faulthandler, signal, sys, threading, time
from cupy_syncbn.comm import launcher

def handler(*_):
    seen.append(time.monotonic())

seen, began = [], time.monotonic()
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.2, 50)
faulthandler.dump_traceback_later(0.5, exit=False, file=sys.stdout)
with launcher._deadline(30):
    pass
assert signal.getsignal(signal.SIGALRM) is handler
assert signal.getitimer(signal.ITIMER_REAL)[1] == 50
time.sleep(0.8)
assert seen, "the program's alarm was lost"

def other_thread():
    with launcher._deadline(30):
        done.append(True)

done = []
thread = threading.Thread(target=other_thread)
thread.start()
thread.join()
assert done
with launcher._deadline(float("inf")):
    pass
"""


def test_timers_of_the_program_are_kept():
    environment = clean_environment(PYTHONPATH=str(REPOSITORY))
    process = finish([sys.executable, "-W", "error", "-c", TIMERS], 60, env=environment)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("Timeout (0:00:00.500000)!")  # that of faulthandler


DEADLINES = """
import threading, time
from cupy_syncbn.comm import launcher

def hang():
    with launcher._deadline(0.3):
        time.sleep(30)

if {in_thread}:
    thread = threading.Thread(target=hang)
    thread.start()
    thread.join()
else:
    hang()
"""


@pytest.mark.parametrize("in_thread", [False, True])
def test_deadline_shows_where_it_hangs(in_thread):
    code = DEADLINES.format(in_thread=in_thread)
    status, output = run([sys.executable, "-c", code], clean_environment(PYTHONPATH=str(REPOSITORY)), 20)
    assert status not in (0, None), output
    assert "in hang" in output


# ---- mpi4py.rc, and MPI that the program starts and ends itself ----
@launches
@pytest.mark.parametrize(
    ("name", "ranks", "library"),
    [
        ("rc_initialize", 2, "this"),
        pytest.param("rc_initialize", 3, "other", marks=pytest.mark.long),
        ("rc_thread_level", 3, "this"),
        pytest.param("rc_thread_level", 2, "other", marks=pytest.mark.long),
        ("mpi_first", 2, "this"),
        pytest.param("mpi_first", 2, "other", marks=pytest.mark.long),
    ],
)
def test_what_the_program_says_to_mpi4py_holds(name, ranks, library):
    status, output, _ = run_case(library, ranks, name)
    assert status == 0, output
    assert_trained(output, ranks)
    if name == "mpi_first":
        assert output.count("child mpi_first of 1 False") == ranks


@launches
def test_options_of_mpi4pys_runner():
    words = ["-m", "mpi4py", "-rc", "initialize=False", PROGRAM, "rc_initialize"]
    _, status, output = launch(sys.executable, 2, words, DEADLINE)
    assert status == 0, output
    assert_trained(output, 2)


@launches
@pytest.mark.parametrize("library", ["this", pytest.param("other", marks=pytest.mark.long)])
def test_first_use_after_finalize(library):
    status, output, _ = run_case(library, 2, "after_finalize")
    assert status == 0, output


# ---- Children ----
@launches
@pytest.mark.parametrize("library", LIBRARIES)
def test_children_are_no_ranks(library):
    status, output, _ = run_case(library, 2, "children")
    assert status == 0, output
    assert_trained(output, 2)
    for name in ("subprocess", "open_files", "environment", "shell", "system", "posix_spawn", "grandchild",
                 "spawn", "forkserver"):  # fmt: skip
        assert f"child {name} of 1 False" in output, output


# ---- Ranks as ever ----
def wrapped(kind, folder):
    """Return what starts Python by a script of the launcher's."""
    if kind == "python":
        code = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:], close_fds=False).returncode)"
        return [sys.executable, "-c", code]
    script = folder / "wrapper.sh"
    script.write_text('#!/bin/sh\n"$@"\nexit $?\n' if kind == "shell" else '#!/bin/sh\nexec "$@"\n')
    script.chmod(0o755)
    return [str(script)]


@launches
@pytest.mark.parametrize(
    ("kind", "library"),
    [
        ("shell", "this"),
        ("exec", "this"),
        pytest.param("python", "this", marks=pytest.mark.long),
        pytest.param("shell", "other", marks=pytest.mark.long),
        pytest.param("exec", "other", marks=pytest.mark.long),
        pytest.param("python", "other", marks=pytest.mark.long),
    ],
)
def test_wrapper_scripts_start_ranks(tmp_path, kind, library):
    options = ["-n", "3", *wrapped(kind, tmp_path)]
    python = python_of(library)
    environment = clean_environment(PYTHONPATH=str(REPOSITORY))
    if os.geteuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [find_launcher(python), *OVERSUBSCRIBE.get(vendor_of(python), []), *options]
    status, output = run([*command, python, "-m", "mpi4py", PROGRAM, "trains"], environment, DEADLINE)
    assert status == 0, output
    assert_trained(output, 3)


@launches
@pytest.mark.parametrize(
    ("name", "ranks", "library"),
    [
        ("executes_itself", 2, "this"),
        pytest.param("executes_itself", 2, "other", marks=pytest.mark.long),
        pytest.param("executes_itself_before", 3, "this", marks=pytest.mark.long),
        pytest.param("executes_itself_before", 3, "other", marks=pytest.mark.long),
        ("spawns", 2, "this"),
        pytest.param("spawns", 2, "other", marks=pytest.mark.long),
    ],
)
def test_processes_that_stay_or_become_ranks(name, ranks, library):
    status, output, _ = run_case(library, ranks, name)
    assert status == 0, output
    assert_trained(output, ranks)


@launches
@pytest.mark.parametrize("library", LIBRARIES)
def test_mpirun_within_a_rank(library):
    """MPICH's gives its ranks the numbers of the outer ones, even that of PMI_FD."""
    python = python_of(library)
    words = [find_launcher(python), *OVERSUBSCRIBE.get(vendor_of(python), [])]
    status, output, _ = run_case(library, 2, "inner_launch", *words)
    assert status == 0, output
    assert_trained(output, 2)


@launches
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_mpirun_of_another_library_within_a_rank(ranks):
    """Its variables stand beside those of the outer launch, whose ranks are as many, or one."""
    other = other_python()
    words = [
        find_launcher(other),
        *OVERSUBSCRIBE.get(vendor_of(other), []),
        "-n",
        "3",
        other,
        PROGRAM,
        "trains",
    ]
    code = (
        f"import cupy_syncbn, subprocess; cupy_syncbn.default_group(); subprocess.run({words!r}, check=True)"
    )
    _, status, output = launch(sys.executable, ranks, ["-c", code], DEADLINE)
    assert status == 0, output
    assert output.count("trained as") == 3 * ranks


# ---- What a launcher says, without one ----
LAUNCHES = [
    # variables; how many were started; whether MPI is started
    ({}, None, False),
    ({"PMI_RANK": "0", "PMI_SIZE": "4"}, 4, True),
    ({"PMI_RANK": "0", "PMI_SIZE": "1"}, 1, False),
    ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "1"}, 2, True),
    ({"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "8"}, 8, True),
    ({"MVP_COMM_WORLD_RANK": "1", "MVP_COMM_WORLD_SIZE": "1"}, 1, False),
    # Slurm's library of PMI sets no rank
    ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3"}, 3, True),
    # a shell of one task, where PMI serves once
    ({"PMIX_RANK": "0", "PMIX_NAMESPACE": "slurm.pmix.7.0", "SLURM_STEP_NUM_TASKS": "1"}, 1, False),
    ({"PMI_RANK": "0", "PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1"}, 1, False),
    # an mpirun in a step of as many tasks as nodes
    ({"PMI_RANK": "0", "PMI_SIZE": "8", "SLURM_STEP_NUM_TASKS": "1"}, 8, True),
    ({"PMI_RANK": "0", "PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "4"}, 1, False),
    # prterun in such a shell
    ({"PMIX_RANK": "0", "PMIX_NAMESPACE": "prterun-7@1", "SLURM_STEP_NUM_TASKS": "1"}, None, True),
    # one launcher within another
    ({"OMPI_COMM_WORLD_SIZE": "1", "PMI_RANK": "1", "PMI_SIZE": "3"}, 3, True),
    # an allocation without a step
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None, False),
    # those that tell no number
    ({"PALS_RANKID": "0"}, None, True),
    ({"ALPS_APP_PE": "3"}, None, True),
    ({"PMI_RANK": "0", "PMI_SIZE": ""}, None, True),
]


@pytest.fixture
def process(monkeypatch):
    """Return a function that gives this process the variables of a launch, as if nothing had started it."""
    for name in set(os.environ) - set(clean_environment()):
        monkeypatch.delenv(name)
    for name in "SLURM_JOB_ID", "SLURM_NTASKS":
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launcher, "_is_worker", lambda: False)

    def start(variables):
        launcher._is_launched.cache_clear()
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    yield start
    launcher._is_launched.cache_clear()


@pytest.mark.parametrize(("variables", "size", "is_rank"), LAUNCHES)
def test_launchers_are_recognised(process, variables, size, is_rank):
    process(variables)
    assert (launcher.started(), launcher.is_launched()) == (size, is_rank)
    assert (launcher.launcher_variable() is not None) == is_rank


@pytest.mark.parametrize(
    "change",
    [
        {"PMI_RANK": "1"},
        {"PMI_PORT": "node:12346"},
        {"PMI_SIZE": "3"},
        {"PMIX_NAMESPACE": "prterun-8@1", "PMIX_RANK": "0"},
        {"SLURM_STEP_ID": "4"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
def test_mark_of_a_rank(process, monkeypatch, change):
    """Another process with its variables is its child; with others it is a rank of its own."""
    first = {"PMI_RANK": "0", "PMI_SIZE": "2", "PMI_PORT": "node:12345", "SLURM_STEP_ID": "3"}
    process(first)
    launcher._leave_mark()
    monkeypatch.setenv(launcher._MARK, os.environ[launcher._MARK])  # so that it is undone
    pid = os.getpid()
    assert launcher.is_launched()
    assert not launcher._is_launched(pid + 1)
    with monkeypatch.context() as child:
        child.delitem(sys.modules, "mpi4py.MPI", raising=False)
        child.setattr(os, "getpid", lambda: pid + 1)
        with pytest.raises(RuntimeError, match="a rank started this process, which is none itself"):
            launcher.import_mpi(1.0)
    process(change)
    assert launcher._is_launched(pid + 1)


# ---- Importing never fails ----
BROKEN = {
    "no mpi4py": (None, "ModuleNotFoundError", "No module named 'mpi4py'"),
    "no library": (
        "raise RuntimeError('cannot load MPI library')",
        "RuntimeError",
        "cannot load MPI library",
    ),
    "wrong library": ("raise ImportError('libmpi.so.12: cannot open')", "ImportError", "libmpi.so.12"),
    "no start": ("raise OSError('MPI_Init: no network')", "OSError", "no network"),
    "no text": ("raise KeyError", "KeyError", "KeyError"),
}
USES = """
import sys
import numpy as np
import cupy_syncbn
from cupy_syncbn import BatchNorm1d, DistributedDataParallel, SyncBatchNorm, default_group, local_rank

x = np.ones((4, 3), "f4")
BatchNorm1d(3)(x)  # needs no ranks
SyncBatchNorm(3, process_group=cupy_syncbn.SingleProcessGroup())(x)
for use in (
    default_group,
    local_rank,
    lambda: SyncBatchNorm(3)(x),
    lambda: DistributedDataParallel(SyncBatchNorm(3)),
    lambda: cupy_syncbn.recalibrate(SyncBatchNorm(3), [x]),
):
    try:
        use()
    except RuntimeError as error:
        print(type(error.__cause__).__name__, "|", error)
"""


def broken_mpi4py(folder, source):
    """Write a package mpi4py whose MPI does not start, or that is not there at all."""
    package = folder / "mpi4py"
    package.mkdir()
    code = "raise ModuleNotFoundError(\"No module named 'mpi4py'\")\n"
    if source is not None:
        code = "__version__ = '4.9'\nclass rc: initialize = True\n"
        (package / "MPI.py").write_text(source + "\n")
    (package / "__init__.py").write_text(code)
    return os.pathsep.join([str(folder), str(REPOSITORY)])


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("launch_", ["of 2", pytest.param("unknown", marks=pytest.mark.long)])
def test_broken_mpi_is_told_by_the_first_use(tmp_path, kind, launch_):
    source, cause, text = BROKEN[kind]
    variables = {"PMI_RANK": "0", "PMI_SIZE": "2"} if launch_ == "of 2" else {"PALS_RANKID": "0"}
    environment = clean_environment(PYTHONPATH=broken_mpi4py(tmp_path, source), **variables)
    status, output = run([sys.executable, "-W", "error", "-c", USES], environment, DEADLINE)
    assert status == 0, output
    lines = output.splitlines()
    assert len(lines) == 5, output
    for line in lines:
        assert line.startswith(f"{cause} | MPI cannot be used: ")
        assert text in line
        assert "process_group=SingleProcessGroup()" in line
        assert "; load the m" in line.lower()  # as there is an MPI, of the launcher
        assert "pip install mpi4py mpich" not in line


@pytest.mark.parametrize("has_launcher", [False, True])
@pytest.mark.parametrize("kind", ["no mpi4py", "no library"])
def test_a_wheel_is_advised_only_where_there_is_no_mpi(tmp_path, kind, has_launcher):
    path = tmp_path / "bin"
    path.mkdir()
    if has_launcher:
        (path / "mpiexec").write_text("#!/bin/sh\n")
        (path / "mpiexec").chmod(0o755)
    environment = clean_environment(PYTHONPATH=broken_mpi4py(tmp_path, BROKEN[kind][0]), PATH=str(path))
    status, output = run([sys.executable, "-m", "cupy_syncbn"], environment, DEADLINE)
    assert status == 0, output
    assert ("pip install mpi4py mpich" in output) == (not has_launcher)
    assert bool(re.search("load the (MPI|mpi4py) that", output)) == has_launcher


# ---- Each alone in its world ----
def run_alone(uses, library="this", *options, **variables):
    """Run what counts warnings, in a process with some variables."""
    environment = clean_environment(PYTHONPATH=str(REPOSITORY), **variables)
    command = [python_of(library), *options, PROGRAM, "alone", uses]
    status, output = run(command, environment, DEADLINE)
    assert status == 0, output
    return output


SLURM = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("uses", "variables"),
    [
        ("group,layer,group,parallel", SLURM),
        ("layer,layer", SLURM),
        ("local_rank,world", {"PMI_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2"}),
        pytest.param("world,layer,group", SLURM, marks=pytest.mark.long),
        pytest.param("parallel,none", SLURM, marks=pytest.mark.long),
    ],
)
def test_ranks_that_are_alone_are_warned_once(uses, variables):
    output = run_alone(uses, **variables)
    assert "warnings 1 True:" in output
    size = variables["SLURM_STEP_NUM_TASKS"]
    assert f"{size} processes were started, but each is alone in its world" in output
    assert "--mpi=pmi2" in output
    assert "process_group=SingleProcessGroup()" in output


@pytest.mark.parametrize(
    ("uses", "variables", "starts"),
    [
        ("none", SLURM, True),  # four runs that are to be alone
        ("group,layer", {"PMI_RANK": "0", "PMI_SIZE": "1"}, False),
        ("group,layer,parallel", {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, False),
        pytest.param("group,layer", SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, False, marks=pytest.mark.long),
        pytest.param("group,layer", {}, False, marks=pytest.mark.long),
    ],
)
def test_no_warning(uses, variables, starts):
    assert f"warnings 0 {starts}:" in run_alone(uses, **variables)


@launches
@pytest.mark.long  # test_slurm.py has the same by srun
def test_launcher_of_another_library():
    """Both ways: a warning on each rank, or the library's own error."""
    this, other = sys.executable, other_python()
    for theirs, python in (this, other), (other, this):
        environment = clean_environment(PYTHONPATH=str(REPOSITORY), CUPY_SYNCBN_TIMEOUT="10")
        if os.geteuid() == 0:
            environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        command = [find_launcher(theirs), *OVERSUBSCRIBE.get(vendor_of(theirs), []), "-n", "3"]
        status, output = run([*command, python, PROGRAM, "alone", "group,layer"], environment, DEADLINE)
        assert status is not None, output
        if status == 0:
            assert output.count("warnings 1 True:") == 3, output
            assert output.count("3 processes were started, but each is alone") == 3
            assert vendor_of(python) in output
        else:
            assert "MPI" in output


def test_cases_are_all_run():
    text = Path(__file__).read_text()
    names = [
        name for name, value in vars(start_cases).items() if getattr(value, "__module__", "") == "start_cases"
    ]
    used = Path(start_cases.__file__).read_text()
    assert all(f'"{name}"' in text or len(re.findall(rf"\b{name}\b", used)) > 1 for name in names)
