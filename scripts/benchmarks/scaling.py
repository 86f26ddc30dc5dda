"""What a sum costs on 64 to 16,384 ranks, simulated: ours, MPI's algorithms, an allgather with a merge.

    ours         the messages of `cupy_syncbn.comm.schedules`, from the package itself
    doubling     the same without halvings: what the package did before it knew nodes
    rabenseifner MPI_Allreduce by halving and doubling over all ranks, in C (MPICH, for vectors from 2 KB)
    two levels   MPI_Allreduce by the first ranks of the nodes, in C (MPICH's SMP, Open MPI's HAN)
    libnbc       MPI_Iallreduce of Open MPI, in place: a tree up, and one down, in C
    allgather    what torch and apex do: 2C + 1 numbers of float32 of each rank go to all, who merge them

The model is LogGP with network cards: a message takes its sender's time, then the card of the node, which
sends one after the other, the wire, and the card of the other node; above 16 KB it waits for a round trip
first. Within a node it is copied twice. All links of the network are as fast as the cards. Nobody is late,
unless there is jitter: one step in 1,000 then takes 50 us more. The vector is the forward's, 4C + 4 numbers.

    python scripts/benchmarks/scaling.py                # the whole table, some 15 minutes
    python scripts/benchmarks/scaling.py --quick        # 64 and 256 ranks, seconds
    python scripts/benchmarks/scaling.py --resnet50     # the 106 sums of a step of ResNet-50
    python scripts/benchmarks/scaling.py --groups       # how long it takes to make groups
    python scripts/benchmarks/scaling.py --validate     # messages and bytes of real ranks, 2 to 8
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measure import RESULTS, caption, circumstances, new_figure, pin_threads, save, table

from cupy_syncbn.comm.schedules import WHOLE, Schedule

CHANNELS = (64, 1024, 4096)
RANKS = (64, 256, 1024, 4096, 16384)
PER_NODE = (8, 64)
ALGORITHMS = ("ours", "doubling", "rabenseifner", "two levels", "libnbc", "allgather")
WITH_JITTER = ("ours", "doubling", "rabenseifner")
JITTER = 1e-3, 50e-6
"""How many of the steps take longer, and by how many seconds."""
SEEDS = 2

# Microseconds of doubling by an earlier program in C++ of the same model, whose runs of 64 and 256 ranks
# SimGrid's SMPI confirmed within 12 %: this one has to agree with it.
REFERENCE = {
    (64, 8): (27, 75, 241), (256, 64): (39, 242, 882), (4096, 8): (50, 138, 492), (4096, 64): (60, 577, 2225),
    (16384, 8): (58, 158, 576), (16384, 64): (71, 745, 2896),
}  # fmt: skip
TOLERANCE = 0.05


class Network(NamedTuple):
    """Seconds, and bytes per second."""

    wire: float = 1.2e-6
    processor: float = 0.25e-6
    """Of a message, at either end."""
    card: float = 25e9
    """200 Gb/s for each node."""
    gap: float = 8e-9
    """The least between two messages of a card."""
    memory_latency: float = 0.35e-6
    memory: float = 12e9
    """Of each of the two copies within a node."""
    rendezvous: int = 16384
    """Bytes above which a message waits for a round trip."""


class Cost(NamedTuple):
    """Seconds of the steps in the program that makes them."""

    step: float
    slice_step: float
    copy: float
    """Per byte."""
    add: float
    """Per byte."""
    fixed: float
    """Of a sum: the trailer, the checks, the call."""


# Measured, on loaded cores: a step takes 2.2 to 2.9 us with its copy and addition, one of slices 0.5 us more.
PYTHON = Cost(2.0e-6, 2.5e-6, 1 / 35e9, 1 / 35e9, 4.5e-6)
IN_C = Cost(0.15e-6, 0.15e-6, 0.0, 1 / 35e9, 4.5e-6)
MERGE = 2.5e-9
"""Seconds for each number that an allgather brings (2.1 to 24 ns were measured)."""

SEND, RECEIVE, END = range(3)


@dataclass
class Program:
    """What a rank does: operations (seconds before it, steps that jitter can hit, kind, partner, bytes)."""

    operations: list[tuple[float, int, int, int, float]] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0

    def compute(self, seconds: float) -> None:
        self.seconds += seconds
        self.steps += 1

    def _add(self, kind: int, partner: int, nbytes: float) -> None:
        self.operations.append((self.seconds, self.steps, kind, partner, nbytes))
        self.seconds, self.steps = 0.0, 0

    def send(self, partner: int, nbytes: float) -> None:
        self._add(SEND, partner, nbytes)

    def receive(self, partner: int, nbytes: float) -> None:
        self._add(RECEIVE, partner, nbytes)

    def end(self) -> None:
        self._add(END, -1, 0)


@dataclass
class Outcome:
    """What a simulation came to."""

    seconds: float = 0.0
    messages: int = 0
    nbytes: float = 0.0
    leaving: float = 0.0
    """Bytes between nodes."""


def simulate(programs: Sequence[Program], nodes: Sequence[int], seed: int | None = None) -> Outcome:
    """Return how long the slowest rank takes; with a seed some steps are slower, drawn by it."""
    wire, processor, card, gap, memory_latency, memory, rendezvous = Network()
    sending, receiving = [0.0] * (max(nodes) + 1), [0.0] * (max(nodes) + 1)
    coming: dict[tuple[int, int], deque[float]] = {}
    for program in programs:
        program.end()
    lists = [program.operations for program in programs]
    draw = None if seed is None else random.Random(seed).random
    share, longer = JITTER

    def before(operation: tuple[float, int, int, int, float]) -> float:
        if draw is not None and draw() < operation[1] * share:
            return operation[0] + longer
        return operation[0]

    events = [(before(operations[0]), rank) for rank, operations in enumerate(lists)]
    heapq.heapify(events)
    push, pop = heapq.heappush, heapq.heappop
    at, waits_for, since = [0] * len(lists), [-1] * len(lists), [0.0] * len(lists)
    outcome = Outcome()
    while events:
        now, rank = pop(events)
        _, _, kind, partner, nbytes = lists[rank][at[rank]]
        if kind == SEND:
            node, other = nodes[rank], nodes[partner]
            outcome.messages += 1
            outcome.nbytes += nbytes
            if node == other:
                now += processor + nbytes / memory
                arrival = now + memory_latency
            else:
                outcome.leaving += nbytes
                now += processor
                takes = max(nbytes / card, gap)
                start = max(now + (2 * wire if nbytes > rendezvous else 0.0), sending[node])
                sending[node] = start + takes
                arrival = max(start + wire, receiving[other]) + takes
                receiving[other] = arrival
            coming.setdefault((rank, partner), deque()).append(arrival)
            if waits_for[partner] == rank:
                waits_for[partner] = -1
                push(events, (max(since[partner], arrival), partner))
        elif kind == RECEIVE:
            arrivals = coming.get((partner, rank))
            if not arrivals:
                waits_for[rank], since[rank] = partner, now
                continue
            if arrivals[0] > now:
                push(events, (arrivals[0], rank))
                continue
            arrivals.popleft()
            now += processor + (nbytes / memory if nodes[rank] == nodes[partner] else 0.0)
        else:
            outcome.seconds = max(outcome.seconds, now)
            continue
        at[rank] += 1
        push(events, (now + before(lists[rank][at[rank]]), rank))
    return outcome


def ours(schedule: Schedule, length: int, halvings: int, cost: Cost) -> list[Program]:
    """Return the programs of the package's own schedule, for a vector of some numbers."""
    programs, nbytes = [Program() for _ in range(schedule.size)], 8 * length
    numbers = range(length)
    for rank, program in enumerate(programs):
        for step in schedule.steps(rank, length, halvings):
            swaps = step.sends is not None and step.receives is not None
            each = (cost.slice_step if step.is_slice else cost.step) / (2 if swaps else 1)
            tail = 4 if step.is_slice else 0
            if step.sends is not None:
                sent = nbytes if step.sends == WHOLE else 8 * len(numbers[step.sends])
                program.compute(each + cost.copy * sent)
                program.send(step.partner, sent + tail)
            if step.receives is not None:
                received = nbytes if step.receives == WHOLE else 8 * len(numbers[step.receives])
                program.receive(step.partner, received + tail)
                program.compute(each + (cost.copy if step.replaces else cost.add) * received)
    return programs


def rabenseifner(programs: list[Program], ranks: Sequence[int], nbytes: float, cost: Cost) -> None:
    """Add a reduce-scatter by halving and an allgather by doubling, among a power of two of ranks."""
    parts = [nbytes / 2 ** (k + 1) for k in range((len(ranks) - 1).bit_length())]
    for number, rank in enumerate(ranks):
        program = programs[rank]
        for is_scatter in True, False:
            for k, part in list(enumerate(parts))[:: 1 if is_scatter else -1]:
                partner = ranks[number ^ 1 << k]
                program.compute(cost.step / 2 + cost.copy * part * is_scatter)
                program.send(partner, part)
                program.receive(partner, part)
                program.compute(cost.step / 2 + cost.add * part * is_scatter)


def doubling(programs: list[Program], ranks: Sequence[int], nbytes: float, cost: Cost) -> None:
    """Add recursive doubling among a power of two of ranks."""
    for number, rank in enumerate(ranks):
        program = programs[rank]
        for k in range((len(ranks) - 1).bit_length()):
            partner = ranks[number ^ 1 << k]
            program.compute(cost.step / 2 + cost.copy * nbytes)
            program.send(partner, nbytes)
            program.receive(partner, nbytes)
            program.compute(cost.step / 2 + cost.add * nbytes)


def reduce_by_tree(programs: list[Program], ranks: Sequence[int], nbytes: float, cost: Cost) -> None:
    """Add a binomial tree that sums up to the first rank."""
    for number, rank in enumerate(ranks):
        program, bit = programs[rank], 1
        while bit < len(ranks):
            if number & bit:
                program.compute(cost.step + cost.copy * nbytes)
                program.send(ranks[number - bit], nbytes)
                break
            if number + bit < len(ranks):
                program.receive(ranks[number + bit], nbytes)
                program.compute(cost.step + cost.add * nbytes)
            bit *= 2


def hand_on(
    programs: list[Program], ranks: Sequence[int], nbytes: float, cost: Cost, nearest_first: bool
) -> None:
    """Add a binomial broadcast from the first rank; MPICH hands on to the farthest first, libnbc not."""
    for number, rank in enumerate(ranks):
        program = programs[rank]
        if nearest_first:
            bits = [1 << k for k in range(number.bit_length(), (len(ranks) - 1).bit_length())]
            parent = number - (1 << number.bit_length() - 1) if number else 0
        else:
            lowest = number & -number if number else 1 << (len(ranks) - 1).bit_length()
            bits = [1 << k for k in reversed(range(lowest.bit_length() - 1))]
            parent = number - lowest
        if number:
            program.receive(ranks[parent], nbytes)
            program.compute(cost.step + cost.copy * nbytes)
        for bit in bits:
            if number + bit < len(ranks):
                program.compute(cost.step / 2)
                program.send(ranks[number + bit], nbytes)


def gather(programs: list[Program], ranks: Sequence[int], nbytes: float, cost: Cost) -> None:
    """Add an allgather by doubling, among a power of two of ranks, of some bytes from each."""
    for number, rank in enumerate(ranks):
        program = programs[rank]
        for k in range((len(ranks) - 1).bit_length()):
            program.compute(cost.step)
            program.send(ranks[number ^ 1 << k], nbytes * 2**k)
            program.receive(ranks[number ^ 1 << k], nbytes * 2**k)


def blocks(ranks: int, per_node: int) -> list[int]:
    """Return the node of each rank, placed in blocks."""
    return [rank // per_node for rank in range(ranks)]


def length_of(channels: int, is_backward: bool = False) -> int:
    """Return the numbers in a vector, as the earlier program had them."""
    return 2 * channels + 3 if is_backward else 4 * channels + 4


# How many batch norms of ResNet-50 have so many channels, and where its sums are simulated.
RESNET50 = {64: 7, 128: 8, 256: 16, 512: 11, 1024: 7, 2048: 4}
RESNET50_RANKS = (
    (8, 8), (32, 8), (64, 8), (64, 64), (512, 8), (512, 64), (4096, 8), (4096, 64),
)  # fmt: skip


def resnet50(ranks: int, per_node: int) -> dict[str, float]:
    """Return the milliseconds of all sums of a step, by ours and by doubling."""
    schedule, nodes = Schedule(blocks(ranks, per_node)), blocks(ranks, per_node)
    found = {"ours": 0.0, "doubling": 0.0}
    for channels, layers in RESNET50.items():
        for is_backward in False, True:
            length = length_of(channels, is_backward)
            for name in found:
                halvings = schedule.halvings(8 * length) if name == "ours" else 0
                seconds = simulate(ours(schedule, length, halvings, PYTHON), nodes).seconds + PYTHON.fixed
                found[name] += 1e3 * layers * seconds
    return found


def seconds_of(algorithm: str, ranks: int, per_node: int, channels: int, seed: int | None = None) -> float:
    """Return the simulated time of one sum; ranks and ranks per node are powers of two."""
    nodes, nbytes = blocks(ranks, per_node), 8.0 * length_of(channels)
    everyone, cost = range(ranks), IN_C
    programs = [Program() for _ in range(ranks)]
    extra = 0.0
    if algorithm in ("ours", "doubling"):
        cost, schedule = PYTHON, Schedule(nodes)
        halvings = schedule.halvings(int(nbytes)) if algorithm == "ours" else 0
        programs = ours(schedule, length_of(channels), halvings, cost)
    elif algorithm == "rabenseifner":
        rabenseifner(programs, everyone, nbytes, cost)
    elif algorithm == "libnbc":
        reduce_by_tree(programs, everyone, nbytes, cost)
        hand_on(programs, everyone, nbytes, cost, nearest_first=True)
    elif algorithm == "two levels":
        members = [everyone[first : first + per_node] for first in range(0, ranks, per_node)]
        leaders = [own[0] for own in members]
        for own in members:
            reduce_by_tree(programs, own, nbytes, cost)
        (doubling if nbytes <= 2048 else rabenseifner)(programs, leaders, nbytes, cost)
        for own in members:
            hand_on(programs, own, nbytes, cost, nearest_first=False)
    else:
        message, network = 4.0 * (2 * channels + 1), Network()
        extra = MERGE * ranks * 2 * channels
        gather(programs, everyone, message, cost)
        ring = (ranks - 1) * (network.wire + 2 * network.processor + message / network.card)
        return min(ring, simulate(programs, nodes).seconds) + extra + cost.fixed
    return simulate(programs, nodes, seed=seed).seconds + extra + cost.fixed


REQUEST = 13
"""Numbers of the sum in which the ranks compare what they ask for."""
MASK = 256
"""Bytes by which MPI's ranks agree on a communicator's number: MPICH's."""
NUMBER = 8
"""Bytes from each rank to each: color and key in MPI_Comm_split, its host, its transport."""
GROUP_RANKS = ((64, 8), (1024, 64), (4096, 64), (16384, 64))


def round_of_requests(ranks: int, per_node: int) -> Outcome:
    """Return what it takes all ranks to compare their requests and to split a communicator."""
    nodes = blocks(ranks, per_node)
    programs = ours(Schedule(nodes), REQUEST, 0, PYTHON)
    gather(programs, range(ranks), NUMBER, IN_C)
    doubling(programs, range(ranks), MASK, IN_C)
    return simulate(programs, nodes)


def first_use(ranks: int, per_node: int) -> Outcome:
    """Return what the first sum of a group takes beside the sum, with the choice of a transport."""
    nodes = blocks(ranks, per_node)
    programs = [Program() for _ in range(ranks)]
    doubling(programs, range(ranks), MASK, IN_C)
    gather(programs, range(ranks), NUMBER, IN_C)
    gather(programs, range(ranks), NUMBER, IN_C)
    return simulate(programs, nodes)


def groups(ranks: int, per_node: int) -> dict[str, float]:
    """Return messages and bytes per rank and the milliseconds of making groups, of all ranks and by node."""
    request, whole = round_of_requests(ranks, per_node), first_use(ranks, per_node)
    node = first_use(per_node, per_node)
    return {
        "messages": (request.messages + whole.messages) / ranks,
        "bytes": (request.nbytes + whole.nbytes) / ranks,
        "one group": 1e3 * (request.seconds + whole.seconds),
        "split_group": 1e3 * (request.seconds + node.seconds),
        "new_group for each node": 1e3 * (ranks // per_node * request.seconds + node.seconds),
    }


def counted(nodes: Sequence[int], length: int, halvings: int) -> tuple[int, int]:
    """Return the messages and bytes of one sum, simulated."""
    outcome = simulate(ours(Schedule(nodes), length, halvings, PYTHON), nodes)
    return outcome.messages, int(outcome.nbytes)


PLACES = ("01", "001", "0011", "0001", "01010", "000111", "0011222", "00001111")
"""The nodes of real ranks, a digit each."""
FEW_PLACES = ("0011", "01010")
LENGTHS = (29, 260, 4102)


def worker(places: str) -> None:
    """Count what comes in sums of real ranks; rank 0 prints it as JSON."""
    from mpi4py import MPI

    from cupy_syncbn.comm.private_comm import private_comm_of

    world = MPI.COMM_WORLD
    rows = []
    for halvings in 0, 1, 99:
        private = private_comm_of(world.Dup(), 60.0, f"node {places[world.rank]}")
        most = min(halvings, len(private.schedule.crossing))
        private.schedule.halvings = lambda nbytes, most=most: most  # type: ignore[method-assign]
        count, wait = np.zeros(2, int), private.wait

        def counting(request: Any, *more: Any, wait: Any = wait, count: Any = count) -> Any:
            status = wait(request, *more)
            if len(more) == 1:  # a message that was waited for, and not one that was sent
                count += 1, status.count
            return status

        private.wait = counting  # type: ignore[method-assign]
        for length in LENGTHS:
            count[:] = 0
            private.sum(np.zeros(length), 60.0)
            everyones = world.allreduce(count)
            rows.append([length, most, *map(int, everyones)])
    if world.rank == 0:
        print(json.dumps(rows))


def launch(places: str) -> list[list[int]]:
    """Return the rows that the worker prints: numbers in the vector, halvings, messages, bytes."""
    folder = Path(sys.executable).parent
    launcher = shutil.which("mpirun", path=f"{folder}{os.pathsep}{os.environ.get('PATH', '')}")
    if launcher is None:
        raise SystemExit("no mpirun beside this Python or on the PATH")
    version = subprocess.run([launcher, "--version"], capture_output=True, text=True).stdout
    options = ["--oversubscribe"] if "Open" in version or "prte" in version.lower() else []
    environment = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [launcher, *options, "-n", str(len(places)), sys.executable, "-m", "mpi4py", __file__]
    with tempfile.TemporaryFile("w+") as output:
        subprocess.run(
            [*command, "--worker", places], env=environment, stdout=output, check=True, timeout=300
        )
        output.seek(0)
        rows: list[list[int]] = json.loads(output.read().strip().splitlines()[-1])
        return rows


def validate(places: Sequence[str]) -> None:
    """Compare the simulated messages and bytes with those of real ranks; end with an error if they differ."""
    rows = []
    for nodes in places:
        for length, halvings, *found in launch(nodes):
            simulated = counted([int(node) for node in nodes], length, halvings)
            rows.append([nodes, str(length), str(halvings), *map(str, found)])
            if list(simulated) != found:
                raise SystemExit(f"ranks on nodes {nodes}, {rows[-1][1:]}: simulated {simulated}")
    print(f"\nReal and simulated ranks agree in {len(rows)} cases:\n")
    print(table(["nodes of the ranks", "numbers", "halvings", "messages", "bytes"], rows))


def reproduce(cases: Sequence[tuple[int, int]]) -> dict[str, list[float]]:
    """Return the times of doubling in us, compared with the earlier program's."""
    rows, found = [], {}
    for ranks, per_node in cases:
        times = [1e6 * seconds_of("doubling", ranks, per_node, channels) for channels in CHANNELS]
        found[f"{ranks}/{per_node}"] = times
        for channels, mine, reference in zip(CHANNELS, times, REFERENCE[ranks, per_node], strict=True):
            rows.append([f"{ranks}/{per_node}, {channels}", f"{mine:.1f}", str(reference)])
            if abs(mine / reference - 1) > TOLERANCE:
                raise SystemExit(f"{rows[-1]}: more than {TOLERANCE:.0%} from the reference")
    print("\nDoubling, by this program and by the earlier one, in us:\n")
    print(table(["ranks/per node, C", "here", "before"], rows))
    return found


def plot(record: dict[str, Any]) -> Any | None:
    """Draw the times for 1024 channels at the most ranks per node."""
    made = new_figure(figsize=(9, 4.5))
    if made is None:
        return None
    figure, axes = made
    for algorithm in ALGORITHMS:
        points = {
            row["ranks"]: row["us"][algorithm]
            for row in record["rows"]
            if (row["per_node"], row["channels"]) == (max(PER_NODE), 1024)
        }
        axes.loglog(points.keys(), points.values(), marker="o", label=algorithm)
    axes.set(
        title=f"1024 channels, {max(PER_NODE)} ranks per node, simulated",
        xlabel="number of ranks",
        ylabel="time of a sum (µs)",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.supxlabel(caption(record), fontsize="small")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, or validate the simulation."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64 and 256 ranks")
    parser.add_argument("--validate", action="store_true", help="count messages of real ranks, and no more")
    parser.add_argument("--resnet50", action="store_true", help="the sums of a step, and no more")
    parser.add_argument("--groups", action="store_true", help="how long it takes to make groups, and no more")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="where the results go")
    parser.add_argument("--worker", metavar="NODES", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        worker(options.worker)
        return 0
    if options.validate:
        validate(FEW_PLACES if options.quick else PLACES)
        return 0
    pin_threads(1)
    if options.resnet50:
        steps = [
            {"ranks": ranks, "per_node": per_node, "ms": resnet50(ranks, per_node)}
            for ranks, per_node in RESNET50_RANKS[: 3 if options.quick else None]
        ]
        print("\nMilliseconds of the 106 sums of a step of ResNet-50, simulated\n")
        lines = [
            [f"{each['ranks']}/{each['per_node']}", *(f"{ms:.1f}" for ms in each["ms"].values())]
            for each in steps
        ]
        print(table(["ranks/per node", "ours", "doubling"], lines))
        name = "scaling-resnet" + "-quick" * options.quick
        save(options.output, name, circumstances(arguments, 1, ["numpy"]) | {"steps": steps}, None)
        return 0
    if options.groups:
        made = [
            {"ranks": ranks, "per_node": per_node, **groups(ranks, per_node)}
            for ranks, per_node in GROUP_RANKS[: 2 if options.quick else None]
        ]
        print("\nMaking groups, simulated: messages and bytes that a rank sends, milliseconds\n")
        names = list(made[0])[2:]
        lines = [
            [f"{each['ranks']}/{each['per_node']}", *(f"{each[name]:,.2f}" for name in names)]
            for each in made
        ]
        print(table(["ranks/per node", *names], lines))
        name = "scaling-groups" + "-quick" * options.quick
        save(options.output, name, circumstances(arguments, 1, ["numpy"]) | {"groups": made}, None)
        return 0
    print(f"Assumptions: {Network()}\n  of the package: {PYTHON}\n  of MPI's own: {IN_C}")
    print(f"  merge {MERGE} s a number; ranks in blocks; jitter {JITTER}, the mean of {SEEDS} runs")
    counts = RANKS[:2] if options.quick else RANKS
    reproduced = reproduce([case for case in REFERENCE if case[0] in counts])

    rows, shown = [], []
    for ranks in counts:
        for per_node in PER_NODE:
            for channels in CHANNELS:
                times = {each: 1e6 * seconds_of(each, ranks, per_node, channels) for each in ALGORITHMS}
                jitter = {
                    each: 1e6
                    / SEEDS
                    * sum(seconds_of(each, ranks, per_node, channels, seed) for seed in range(SEEDS))
                    for each in WITH_JITTER
                }
                print(f"{ranks}/{per_node}, {channels}", end=" ", flush=True)
                halvings = Schedule(blocks(ranks, per_node)).halvings(8 * length_of(channels))
                rows.append(
                    {
                        "ranks": ranks, "per_node": per_node, "channels": channels, "halvings": halvings,
                        "us": times, "us_with_jitter": jitter,
                    }
                )  # fmt: skip
                figures = [f"{value:,.0f}" for value in (*times.values(), *jitter.values())]
                shown.append([f"{ranks}/{per_node}, {channels}", str(halvings), *figures])
    print("\nMicroseconds of a sum, simulated; the last columns with jitter\n")
    headings = ["ranks/per node, C", "halvings", *ALGORITHMS, *(f"{each}*" for each in WITH_JITTER)]
    print(table(headings, shown))
    record = circumstances(arguments, 1, ["numpy"]) | {
        "network": Network()._asdict(), "python": PYTHON._asdict(), "in_c": IN_C._asdict(), "merge": MERGE,
        "jitter": JITTER, "seeds": SEEDS, "doubling_us": reproduced, "rows": rows,
    }  # fmt: skip
    save(options.output, f"scaling{'-quick' if options.quick else ''}", record, plot(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
