"""What is compiled ahead does not depend on the tests that run meanwhile, nor outlives them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.ahead import start_pool
from support.launcher import REPOSITORY

pytestmark = pytest.mark.mpi_skip

KILLED = """
import os, sys, time
sys.path.insert(0, "tests")
from support.ahead import start_pool
if __name__ == "__main__":
    pool = start_pool()
    print(pool.submit(os.getpid).result(60), flush=True)
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


def test_tests_are_not_seen(monkeypatch):
    before = os.environ.get("CXX")
    with start_pool() as pool:
        assert pool.submit(os.getenv, "CXX").result(60) == before
        monkeypatch.setenv("CXX", "/a/stand-in")
        seen = [pool.submit(os.getenv, "CXX") for _ in range(20)]
        assert {each.result(60) for each in seen} == {before}
        assert pool.submit(os.getpid).result(60) != os.getpid()


def test_nothing_outlives_a_killed_process(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(KILLED)
    with subprocess.Popen(
        [sys.executable, str(program)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as process:
        worker = Path("/proc", process.stdout.readline().strip())
        assert worker.exists()
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while worker.exists():
        assert time.monotonic() < deadline, f"{worker.name} still runs"
        time.sleep(0.05)
