"""Two hosts, joined by a cable that is pulled out and put back."""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from support.hosts import CABLE, command_on, ip, skip_without_hosts, two_hosts
from support.launcher import OTHER_PYTHON, REPOSITORY

pytestmark = [pytest.mark.launch, pytest.mark.mpi_skip]

TIMEOUT = 4.0
MARGIN = 2.0
AWAY = 1.2
"""Seconds without the link that TCP and MPI bridge within the timeout."""
PATIENCE = 40.0
"""Seconds until the ranks have started, and until they go on."""
STEPS = 20

RANKS = 2, 1
"""On the first host, and on the second."""

PROGRAM = """
import json, socket, sys, time
import numpy as np
from mpi4py import MPI
from cupy_syncbn import DistributedDataParallel, MPIProcessGroup, Sequential, SyncBatchNorm

folder, timeout = sys.argv[1], float(sys.argv[2])
rank = MPI.COMM_WORLD.rank
group = MPIProcessGroup(MPI.COMM_WORLD, timeout=timeout)
net = Sequential(*(SyncBatchNorm(channels, process_group=group) for channels in (8, 8)))
model = DistributedDataParallel(net, group)
x = np.random.default_rng(rank).normal(size=(4 + rank, 8, 3)).astype("f4")

def report(**line):
    with open(f"{folder}/{rank}.jsonl", "a") as lines:
        lines.write(json.dumps(line) + "\\n")

report(host=socket.gethostname())
step = 0
try:
    while True:
        dx = model.backward(model(x))
        model.reduce_gradients()
        model.zero_grad()
        step += 1
        report(step=step, sum=float(net[1].running_mean.sum()))
        time.sleep(0.005)
except Exception as error:
    report(error=type(error).__name__, message=str(error), at=time.time())
time.sleep(1000)  # the test ends it: what launchers do without the other host is theirs
"""


class Run(NamedTuple):
    """What the ranks wrote, and when the link was there."""

    told: str
    hosts: list[str]
    cut: tuple[list[int], list[int]]
    """The steps of the ranks, some time after the link was cut, and before it came back."""
    back: list[int]
    """Those that they reached afterwards."""
    lost: float
    """When it went for good."""
    reports: list[list[dict]]


class Job:
    """The training program on both hosts."""

    def __init__(self, python, hosts, folder):
        self.folder, self.hosts = folder, hosts
        program = Path(folder, "program.py")
        program.write_text(PROGRAM)
        arguments = ["-m", "mpi4py", str(program), folder, str(TIMEOUT)]
        self.command, environment = command_on(hosts, folder, python, RANKS, arguments)
        self.log = Path(folder, "log").open("w+")  # noqa: SIM115, closed by end
        self.process = subprocess.Popen(
            self.command, stdout=self.log, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY,
            start_new_session=True,
        )  # fmt: skip

    def reports(self):
        files = [Path(self.folder, f"{rank}.jsonl") for rank in range(sum(RANKS))]
        texts = [file.read_text() if file.exists() else "" for file in files]
        return [[json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()] for text in texts]

    def steps(self):
        return [max((line.get("step", 0) for line in lines), default=0) for lines in self.reports()]

    def wait(self, condition, seconds):
        end = time.monotonic() + seconds
        while not condition() and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)

    def errors(self):
        return [line["error"] for lines in self.reports() for line in lines if "error" in line]

    def end(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.seek(0)
        text = f"{' '.join(self.command)}\n{self.log.read()[-3000:]}"
        self.log.close()
        return text


def train(python, label):
    """Train while the link goes down and comes back, and then goes down for good."""
    with two_hosts(label) as hosts, tempfile.TemporaryDirectory() as folder:
        job = Job(python, hosts, folder)
        try:
            job.wait(lambda: min(job.steps()) >= STEPS, PATIENCE)
            ip("-n", hosts[1], "link", "set", CABLE, "down")
            time.sleep(AWAY / 2)
            cut = job.steps()
            time.sleep(AWAY / 2)
            cut = cut, job.steps()
            ip("-n", hosts[1], "link", "set", CABLE, "up")
            job.wait(lambda: min(job.steps()) >= max(cut[1]) + STEPS or job.errors(), PATIENCE)
            back = job.steps()
            ip("-n", hosts[1], "link", "set", CABLE, "down")
            lost = time.time()
            job.wait(lambda: len(job.errors()) == sum(RANKS), TIMEOUT + 2 * MARGIN)
            reports = job.reports()
        finally:
            told = job.end()
    return Run(told, hosts, cut, back, lost, reports)


@functools.cache
def train_on_both_libraries():
    """Return what came of it, by library: both at once, as they mostly wait."""
    pythons = {"this": sys.executable, "other": os.environ.get(OTHER_PYTHON)}
    with ThreadPoolExecutor(2) as pool:
        runs = {name: pool.submit(train, python, name) for name, python in pythons.items() if python}
        return {name: run.result() for name, run in runs.items()}


@pytest.fixture(params=["this", "other"])
def run(request):
    skip_without_hosts()
    if request.param not in train_on_both_libraries():
        pytest.skip(f"{OTHER_PYTHON} names no Python with another MPI library")
    return train_on_both_libraries()[request.param]


def test_ranks_are_on_two_hosts(run):
    names = [lines[0]["host"] for lines in run.reports if lines]
    assert names == [run.hosts[0], run.hosts[0], run.hosts[1]], run.told


def test_training_loop_runs(run):
    """All ranks have the same statistics after each step."""
    sums = [{line["step"]: line["sum"] for line in lines if "step" in line} for lines in run.reports]
    assert min(map(len, sums)) >= STEPS, run.told
    for step in range(1, min(map(len, sums)) + 1):
        assert len({own[step] for own in sums}) == 1


def test_link_that_comes_back_is_no_error(run):
    """The ranks wait meanwhile, and go on."""
    assert run.cut[0] == run.cut[1], run.told
    assert min(run.back) >= max(run.cut[1]) + STEPS, f"{run.back} after {run.cut[1]}\n{run.told}"


def test_link_that_stays_away_is_every_ranks_error(run):
    assert min(run.back) > max(run.cut[1]), run.told
    for lines in run.reports:
        assert lines[-1].get("error") == "CollectiveTimeoutError", f"{lines[-1]}\n{run.told}"
        assert lines[-1]["at"] < run.lost + TIMEOUT + MARGIN
        # The first to give up has waited for the whole timeout; the others hear of it.
        assert f"waited {TIMEOUT:g}" in lines[-1]["message"] or "another to its end" in lines[-1]["message"]
