"""Replay the messages of scaling.py in SimGrid's SMPI, a simulator of MPI by others, and compare.

    python scripts/benchmarks/smpi.py       # 64 ranks, 8 a node: seconds

It takes `smpirun` (Debian: libsimgrid-dev). SMPI lets messages that share a link share its bandwidth, where
scaling.py sends one after the other; the figures of network, memory and steps are the same. Ends with an
error where they are further apart than TOLERANCE.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from measure import table
from scaling import CHANNELS, PYTHON, RECEIVE, SEND, Network, Program, blocks, length_of, ours, simulate

from cupy_syncbn.comm.schedules import Schedule

RANKS, PER_NODE = 64, 8
TOLERANCE = 0.12
FLOPS = 1e9
"""A second of computing."""

# A switch with a node at each port; within a node, one flow for the two copies.
PLATFORM = """<?xml version='1.0'?>
<!DOCTYPE platform SYSTEM "https://simgrid.org/simgrid.dtd">
<platform version="4.1">
<cluster id="c" prefix="n" radical="0-{last}" suffix="" speed="{flops}f" core="{per_node}"
 topology="FAT_TREE" topo_parameters="1;{nodes};1;1" sharing_policy="SPLITDUPLEX"
 bw="{network.card}Bps" lat="{latency}s" loopback_bw="{memory}Bps" loopback_lat="{network.memory_latency}s"/>
</platform>
"""


def settings(network: Network) -> list[str]:
    """Return the options of smpirun: a plain model of links, and the time of a message at either end."""
    each = f"0:{network.processor}:0"
    found = {
        "network/model": "CM02",
        "network/crosstraffic": "0",
        "network/TCP-gamma": "0",
        "smpi/async-small-thresh": str(network.rendezvous),
        "smpi/send-is-detached-thresh": str(network.rendezvous),
        **{f"smpi/{name}": each for name in ("os", "ois", "or")},
        "smpi/display-timing": "yes",
    }
    return [f"--cfg={name}:{value}" for name, value in found.items()]


def trace(rank: int, program: Program) -> str:
    """Return what a rank does, as SMPI replays it; 6 is its number for bytes."""
    lines = ["init"]
    for seconds, _, kind, partner, nbytes in program.operations:
        if seconds:
            lines.append(f"compute {seconds * FLOPS}")
        if kind == SEND:
            lines.append(f"isend {partner} 0 {nbytes:.0f} 6")
        elif kind == RECEIVE:
            lines += [f"irecv {partner} 0 {nbytes:.0f} 6", f"wait {partner} {rank} 0"]
    if program.seconds:
        lines.append(f"compute {program.seconds * FLOPS}")
    return "".join(f"{rank} {line}\n" for line in (*lines, "finalize"))


def replayed(programs: Sequence[Program], nodes: Sequence[int]) -> float:
    """Return the seconds that SMPI says these programs take."""
    network, count = Network(), max(nodes) + 1
    platform = PLATFORM.format(
        last=count - 1, nodes=count, per_node=len(nodes) // count, flops=FLOPS, network=network,
        latency=network.wire / 2, memory=network.memory / 2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        traces = [folder / str(rank) for rank in range(len(programs))]
        for rank, program in enumerate(programs):
            traces[rank].write_text(trace(rank, program))
        files = {
            "platform.xml": platform,
            "hosts": "".join(f"n{node}\n" for node in nodes),
            "traces": "".join(f"{path}\n" for path in traces),
        }
        for file, text in files.items():
            (folder / file).write_text(text)
        command = [
            "smpirun", "-np", str(len(nodes)), "-platform", "platform.xml", "-hostfile", "hosts",
            "-no-privatize", *settings(network), "-replay", "traces",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    found = re.search(r"Simulated time: ([\d.e+-]+) seconds", done.stdout + done.stderr)
    if done.returncode or not found:
        raise SystemExit(f"smpirun failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return float(found[1])


def compare(ranks: int, per_node: int) -> list[list[str]]:
    """Return a row for each length and schedule; end with an error if one is too far apart."""
    nodes = blocks(ranks, per_node)
    schedule = Schedule(nodes)
    rows = []
    for channels in CHANNELS:
        length = length_of(channels)
        for halvings in dict.fromkeys((0, schedule.halvings(8 * length))):
            programs = ours(schedule, length, halvings, PYTHON)
            here, there = simulate(programs, nodes).seconds, replayed(programs, nodes)
            rows.append([str(channels), str(halvings), f"{here * 1e6:.1f}", f"{there * 1e6:.1f}"])
            if abs(there / here - 1) > TOLERANCE:
                raise SystemExit(f"{rows[-1]}: more than {TOLERANCE:.0%} apart")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, and print a table."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    if not shutil.which("smpirun"):
        print("this needs smpirun (Debian: libsimgrid-dev)", file=sys.stderr)
        return 2
    print(f"\nMicroseconds of the messages of a sum on {RANKS} ranks, {PER_NODE} a node, simulated\n")
    print(table(["C", "halvings", "scaling.py", "SMPI"], compare(RANKS, PER_NODE)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
