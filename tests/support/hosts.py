"""Hosts of their own: two network namespaces, joined by a cable, for ranks of either MPI library.

A rank sees no other way to the ranks of the other host: each host has a name, a loopback and one end of a
pair of virtual Ethernet devices, and MPI goes over TCP. It takes root, and iproute2.
"""

import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from support.launcher import REPOSITORY, TESTS, clean_environment, find_launcher, vendor_of

CABLE = "cable"
ADDRESSES = "10.77.0.1", "10.77.0.2"

# By vendor: the launcher's options, {agent} being what it calls instead of ssh, and variables.
OPTIONS = {
    "MPICH": ("-launcher ssh -launcher-exec {agent} -hosts {0}:{2},{1}:{3}", {"UCX_TLS": "tcp,self"}),
    "Open MPI": (
        "--prtemca plm_ssh_agent {agent} --mca pml ob1 --mca btl tcp,self --host {0}:{2},{1}:{3}",
        {},
    ),
}

AGENT = """#!/bin/sh
# Called as ssh is: options, the host, a command.
while case $1 in -*) true ;; *) false ;; esac; do shift; done
case $1 in {0}) host={hosts[0]} ;; *) host={hosts[1]} ;; esac
shift
exec ip netns exec $host unshare --uts sh -c "hostname $host; $*"
"""


def ip(*arguments):
    command = ["ip", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


@functools.cache
def why_no_hosts():
    """Return the reason why this machine lets no test make hosts, or an empty text."""
    for tool in "ip", "unshare", "hostname":
        if not shutil.which(tool):
            return f"there is no {tool} (Debian: iproute2, util-linux, hostname)"
    try:
        with two_hosts("try"):
            return ""
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed here: {error.stderr.strip()}"


class Cable(NamedTuple):
    """How long a bit is on the way, and how many go at once."""

    seconds: float
    bytes_per_second: float


@contextmanager
def two_hosts(label, cable=None):
    """Make two hosts and the link, and remove them with all processes that are left there."""
    names = [f"syncbn-{os.getpid()}-{label}-{number}" for number in (1, 2)]
    made, relay = [], None
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        if cable is None:
            ends = [("name", CABLE, "netns", name) for name in names]
            ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        else:
            relay = start_relay(cable, names)
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            for device in "lo", CABLE:
                ip("-n", name, "link", "set", device, "up")
        # The kernel takes up to a second to call it up, and UCX leaves it out until then.
        state = "state UP" if cable is None else "state UNKNOWN"  # who is to know whether there is a relay?
        while any(state not in ip("-n", name, "link", "show", CABLE) for name in names):
            time.sleep(0.05)
        yield names
    finally:
        for name in made:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, timeout=30)
            for pid in pids.stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        for name in made:
            ip("netns", "delete", name)
        if relay is not None:
            relay.kill()
            relay.communicate()


def start_relay(cable, names):
    """Join the hosts by a process that carries what they send; return it."""
    devices = [f"relay{secrets.token_hex(4)}{number}" for number in (1, 2)]  # 15 characters at most
    command = [sys.executable, TESTS / "support" / "relay.py", *devices, *map(str, cable)]
    relay = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        if relay.stdout.readline() != "made\n":
            raise RuntimeError("the relay has not started: see what it printed")
        for device, name in zip(devices, names, strict=True):
            ip("link", "set", device, "netns", name, "name", CABLE)
    except BaseException:
        relay.kill()
        relay.communicate()
        raise
    return relay


def command_on(hosts, folder, python, ranks, arguments, **variables):
    """Return the command and environment that start Python on the hosts, on so many ranks each."""
    agent = Path(folder, "agent")
    agent.write_text(AGENT.format(*ADDRESSES, hosts=hosts))
    agent.chmod(0o755)
    options, own_variables = OPTIONS[vendor_of(python)]
    inside = ["ip", "netns", "exec", hosts[0], "unshare", "--uts", "sh", "-c", 'hostname $0; exec "$@"']
    command = [
        *inside, hosts[0],
        find_launcher(python), *options.format(*ADDRESSES, *ranks, agent=agent).split(),
        "-n", str(sum(ranks)), python, *arguments,
    ]  # fmt: skip
    environment = clean_environment(
        PYTHONPATH=os.pathsep.join([str(REPOSITORY), str(TESTS)]), OMP_NUM_THREADS="1", **own_variables,
        OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", **variables,
    )  # fmt: skip
    return command, environment


def skip_without_hosts():
    """Skip a test where this machine lets none make hosts."""
    if why_no_hosts():
        pytest.skip(why_no_hosts())
