"""What ranks on two hosts do: the main job, the report, a group per node, and what their cable carries."""

import functools
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.hosts import Cable, command_on, skip_without_hosts, two_hosts
from support.launcher import REPOSITORY, other_python, run

pytestmark = [pytest.mark.launch, pytest.mark.mpi_skip, pytest.mark.long]  # test_hosts.py is the sample

RANKS = 2, 2
SCRIPTS = REPOSITORY / "scripts"
LENGTH = 32_774
"""Numbers of a vector of 8192 channels: the wire takes much longer than a step of Python."""
PROGRAMS = {
    "main job": [str(SCRIPTS / "train_digits.py"), "--epochs", "1"],
    "report": ["-m", "cupy_syncbn"],
    "node groups": [str(SCRIPTS / "examples" / "node_groups.py")],
    "wire": [str(Path(__file__).with_name("wire.py")), str(LENGTH)],
}
LONG = Cable(seconds=1e-3, bytes_per_second=6.25e6)
"""50 Mbit/s, as of a network card that the ranks of a host share, over some 200 km."""


def on_hosts(python, label):
    """Return the hosts, and the status and output of each program."""
    outcomes = {}
    for cable, names in (None, PROGRAMS.keys() - {"wire"}), (LONG, ["wire"]):
        with two_hosts(label, cable) as hosts, tempfile.TemporaryDirectory() as folder:
            for name in names:
                command, environment = command_on(
                    hosts, folder, python, RANKS, ["-m", "mpi4py", *PROGRAMS[name]], CUPY_SYNCBN_TIMEOUT="60"
                )
                outcomes[name] = run(command, environment, 180)
    return hosts, outcomes


@functools.cache
def outcomes_of_both():
    """Return them by library: both at once, as the cable is slow."""
    pythons = {"this": sys.executable, "other": other_python()}
    with ThreadPoolExecutor(2) as pool:
        runs = {name: pool.submit(on_hosts, python, name) for name, python in pythons.items()}
        return {name: each.result() for name, each in runs.items()}


@pytest.fixture(params=["this", "other"])
def outcomes(request):
    skip_without_hosts()
    return outcomes_of_both()[request.param]


def test_the_main_job_equals_one_process(outcomes):
    status, output = outcomes[1]["main job"]
    assert status == 0, output
    assert "they agree" in output


def test_the_report_names_both_hosts(outcomes):
    hosts, programs = outcomes
    status, output = programs["report"]
    assert status == 0, output
    assert all(host in output for host in hosts), output


def test_groups_of_the_nodes(outcomes):
    status, output = outcomes[1]["node groups"]
    assert status == 0, output
    assert "4 rank(s) in 2 group(s)" in output


def test_a_long_cable_carries_half_by_lanes(outcomes):
    """Two ranks on each host send the whole vector by doubling, and a half each by lanes."""
    status, output = outcomes[1]["wire"]
    assert status == 0, output
    found = {
        name: (int(nbytes), float(ms))
        for name, nbytes, ms in re.findall(r"(doubling|lanes) (\d+) ([\d.]+)", output)
    }
    print(found)  # how long it takes as well, which no test asserts
    vector = 8 * LENGTH
    assert 2 * vector < found["doubling"][0] < 2.4 * vector
    assert vector < found["lanes"][0] < 1.2 * vector
    least = 1e3 * (LONG.seconds + vector / LONG.bytes_per_second)
    assert found["lanes"][1] > least, "the cable is not as slow as it says"
