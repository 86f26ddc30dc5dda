"""What synchronization costs: our exchange, a bare allreduce, and an allgather with a merge.

    ours         `Collective.sum` of the forward's vector, 4C + 6 numbers of float64: with the fault flag and
                 the tag, made and checked, a look at the length of every message, and a timeout
    unchecked    the same messages and sums with none of these: the difference is what they cost
    iallreduce   MPI's Iallreduce of the same vector, waited for by Test, so that a timeout is possible
    allreduce    MPI's Allreduce of it, which waits for ever
    allgather    what torch and apex do: each rank's mean, invstd and count, 2C + 1 numbers of float32, go to
                 all ranks, and each merges all of them
    gather       that without the merge

Times are medians over runs interleaved in random order, of the slowest rank in each. With more ranks than
cores they are those of the operating system's scheduler: read them as an order of magnitude.

The model for larger groups takes its latency a and its time per byte b from two ranks, where neither
contender waits for a core, by least squares over C:

    ours         log2(ranks) steps, each a + b (32C + 48)
    allgather    log2(ranks) steps of latency a, and b (ranks - 1) (8C + 4), the least that must arrive,
                 with a and b of the gather; then the merge, timed for up to 1024 ranks, and scaled beyond

It assumes that all ranks are as far apart as two processes of this machine, that no two messages share a
link, and that no rank is late. A network has its own a and b: `--latency-us` and `--gigabytes-per-s` put
them in.

    python scripts/benchmarks/exchange.py               # 2 to 32 ranks of the MPI library of this Python
    python scripts/benchmarks/exchange.py --quick       # 2 and 4 ranks, seconds
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import RESULTS, caption, circumstances, new_figure, pin_threads, save, table

from cupy_syncbn import default_group
from cupy_syncbn.comm import trailer
from cupy_syncbn.comm.call import Call, Collective
from cupy_syncbn.comm.schedules import Schedule

CHANNELS = (64, 256, 1024, 4096)
RANKS = (2, 4, 8, 16, 32)
MODELLED = (2, 32, 1024, 16384)
LARGEST_MERGE = 1024
CONTENDERS = ("ours", "unchecked", "iallreduce", "allreduce", "allgather", "gather")
# Their names in the plot
SHOWN = {
    "ours": "cupy_syncbn", "unchecked": "cupy_syncbn, unchecked", "iallreduce": "MPI_Iallreduce",
    "allreduce": "MPI_Allreduce", "allgather": "allgather and merge",
}  # fmt: skip


def sent_bytes(contender: str, channels: int) -> int:
    """Return the bytes of one rank's message."""
    return 8 * channels + 4 if contender == "allgather" else 32 * channels + 48


def received_bytes(contender: str, channels: int, ranks: int) -> int:
    """Return the bytes that must reach a rank: of an allgather all others' messages."""
    if contender == "allgather":
        return (ranks - 1) * sent_bytes(contender, channels)
    return math.ceil(math.log2(ranks)) * sent_bytes(contender, channels)


def merge(gathered: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance over ranks from rows [mean (C) | invstd (C) | count], as torch does."""
    means, invstds, counts = gathered[:, :channels], gathered[:, channels:-1], gathered[:, -1:]
    total = counts.sum()
    mean = (means * counts).sum(axis=0) / total
    variances = 1 / (invstds * invstds) - np.float32(1e-5)
    var = ((variances + np.square(means - mean)) * counts).sum(axis=0) / total
    return mean, var


def merge_seconds(ranks: int, channels: int, repeats: int) -> float:
    """Return the median time of a merge on one core."""
    gathered = np.random.default_rng(0).uniform(1, 2, (ranks, 2 * channels + 1)).astype(np.float32)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        merge(gathered, channels)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def unchecked_sum(comm: Any, vector: np.ndarray) -> Callable[[], None]:
    """Return what adds up a vector by the messages of `checked_sum`, and nothing else."""
    messages = []
    for partner, sends, receives, replaces in Schedule([0] * comm.size).steps(comm.rank):
        place, sent = np.empty_like(vector), np.empty_like(vector)
        incoming = comm.Recv_init(place, partner) if receives else None
        messages.append((incoming, comm.Send_init(sent, partner) if sends else None, place, sent, replaces))

    def add_up() -> None:
        vector[-4] = 1  # the count
        for incoming, outgoing, place, sent, replaces in messages:
            if incoming is not None:
                incoming.Start()
            if outgoing is not None:
                np.copyto(sent, vector)
                outgoing.Start()
            if incoming is not None:
                incoming.Wait()
                np.copyto(vector, place) if replaces else np.add(vector, place, vector)
        for _, outgoing, *_ in messages:
            if outgoing is not None:
                outgoing.Wait()

    return add_up


def worker(repeats: int) -> None:
    """Time the contenders on this rank; rank 0 prints the medians as JSON."""
    from mpi4py import MPI

    comm, group = MPI.COMM_WORLD.Dup(), default_group()
    results = {}
    for channels in CHANNELS:
        vector = np.ones(4 * channels + 1 + trailer.LENGTH)
        statistics = np.ones(2 * channels + 1, np.float32)
        gathered = np.empty((comm.size, statistics.size), np.float32)

        step = Collective()
        step.enter(Call("stem", channels, "forward", 7), group, vector.size)

        def ours(vector: np.ndarray = vector, channels: int = channels, step: Collective = step) -> None:
            call = Call("stem", channels, "forward", 7)
            # As a backend writes the count, which is needed anyway.
            vector[trailer.FAULT - 1 :] = 1, *call.trailer(group)
            step.sum(vector)

        def iallreduce(vector: np.ndarray = vector) -> None:
            request = comm.Iallreduce(MPI.IN_PLACE, vector)
            spins = 0
            while not request.Test():
                spins += 1
                if spins > 50:  # as the package: ranks may share a core
                    os.sched_yield()

        def allreduce(vector: np.ndarray = vector) -> None:
            comm.Allreduce(MPI.IN_PLACE, vector)

        def allgather(
            statistics: np.ndarray = statistics, gathered: np.ndarray = gathered, channels: int = channels
        ) -> None:
            comm.Allgather(statistics, gathered)
            merge(gathered, channels)

        def gather(statistics: np.ndarray = statistics, gathered: np.ndarray = gathered) -> None:
            comm.Allgather(statistics, gathered)

        runs = (ours, unchecked_sum(comm, vector), iallreduce, allreduce, allgather, gather)
        times = np.zeros((repeats, len(runs)))
        orders = np.random.default_rng(0)  # alike on all ranks
        for repeat in range(-2, repeats):
            for i in orders.permutation(len(runs)):  # what ran before has left its data in the caches
                vector[:] = 1  # sums stay finite
                comm.Barrier()
                start = time.perf_counter()
                runs[i]()
                times[repeat, i] = time.perf_counter() - start  # the first two are overwritten
        comm.Allreduce(MPI.IN_PLACE, times, op=MPI.MAX)
        results[channels] = dict(zip(CONTENDERS, np.median(times, axis=0).tolist(), strict=True))
    if comm.rank == 0:
        name, version = MPI.get_vendor()
        library = f"{name} {'.'.join(map(str, version))}"
        print(json.dumps({"library": library, "seconds": results}))


def launch(ranks: int, repeats: int) -> dict[str, Any]:
    """Run the workers, and return what rank 0 printed."""
    folder = Path(sys.executable).parent
    launcher = shutil.which("mpirun", path=f"{folder}{os.pathsep}{os.environ.get('PATH', '')}")
    if launcher is None:
        raise SystemExit("no mpirun beside this Python or on the PATH")
    version = subprocess.run([launcher, "--version"], capture_output=True, text=True).stdout
    options = ["--oversubscribe"] if "Open" in version or "prte" in version.lower() else []
    environment = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    # mpi4py's runner ends all ranks when one of them fails.
    command = [launcher, *options, "-n", str(ranks), sys.executable, "-m", "mpi4py", __file__]
    with tempfile.TemporaryFile("w+") as output:
        subprocess.run(
            [*command, "--worker", "--repeats", str(repeats)], env=environment, stdout=output, check=True,
            timeout=600,
        )  # fmt: skip
        output.seek(0)
        result: dict[str, Any] = json.loads(output.read().strip().splitlines()[-1])
        return result


def fit(measured: dict[str, Any], contender: str) -> tuple[float, float]:
    """Return latency (s) and time per byte (s) of two ranks, by least squares weighted by 1 / time."""
    rows = measured["2"]
    sizes = np.array([received_bytes(contender, channels, 2) for channels in CHANNELS], float)
    name = "gather" if contender == "allgather" else contender
    times = np.array([rows[str(channels)][name] for channels in CHANNELS])
    matrix = np.stack([np.ones_like(sizes), sizes], axis=1) / times[:, None]
    (latency, per_byte), *_ = np.linalg.lstsq(matrix, np.ones_like(times), rcond=None)
    return max(float(latency), 0.0), max(float(per_byte), 0.0)


def model(
    contender: str,
    channels: int,
    ranks: int,
    network: tuple[float, float],
    merges: Callable[[int, int], float],
) -> float:
    """Return the seconds that the model gives."""
    latency, per_byte = network
    seconds = math.ceil(math.log2(ranks)) * latency + per_byte * received_bytes(contender, channels, ranks)
    return seconds + (merges(ranks, channels) if contender == "allgather" else 0.0)


def plot(record: dict[str, Any]) -> Any | None:
    """Draw what was measured and what is modelled, for 1024 channels."""
    made = new_figure(figsize=(9, 4.5))
    if made is None:
        return None
    figure, axes = made
    for contender, name in SHOWN.items():
        ranks = [int(ranks) for ranks in record["measured"]]
        times = [1e6 * record["measured"][str(r)]["1024"][contender] for r in ranks]
        (line,) = axes.loglog(ranks, times, marker="o", label=name)
        if contender in record["model"]["us"]["1024"]:
            values = record["model"]["us"]["1024"][contender]
            axes.loglog([int(r) for r in values], list(values.values()), "--", color=line.get_color())
    axes.plot([], [], "--", color="gray", label="model, in the color of what it models")
    axes.axvline(record["cores"], color="black", linewidth=1, linestyle=":", label="cores of this machine")
    axes.set(
        title=f"1024 channels, {record['library']}",
        xlabel="number of ranks",
        ylabel="time of an exchange (µs)",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))  # beside the lines
    figure.supxlabel(caption(record), fontsize="small")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 and 4 ranks, few repeats")
    parser.add_argument("--repeats", type=int, default=2000, metavar="N", help="runs of each (default 2000)")
    parser.add_argument("--latency-us", type=float, metavar="US", help="of the network to model")
    parser.add_argument("--gigabytes-per-s", type=float, metavar="GB/S", help="of the network to model")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="where the results go")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        worker(options.repeats)
        return 0
    pin_threads(1)
    repeats = 20 if options.quick else options.repeats
    counts = RANKS[:2] if options.quick else RANKS

    measured, library = {}, ""
    for ranks in counts:
        result = launch(ranks, max(10, repeats * 2 // ranks))
        measured[str(ranks)], library = result["seconds"], result["library"]
    cores = len(os.sched_getaffinity(0))
    print(f"\nMicroseconds per exchange, {library}, {cores} cores\n")
    rivals = ("unchecked", "iallreduce", "allreduce", "allgather")
    headings = ["ranks, C", *CONTENDERS, *(f"ours/{name}" for name in rivals), "bytes in: ours", "allgather"]
    rows = []
    for ranks, by_channels in measured.items():
        for channels, times in by_channels.items():
            ours = times["ours"]
            row = [f"{ranks}, {channels}", *(f"{1e6 * times[name]:.1f}" for name in CONTENDERS)]
            row += [f"{ours / times[name]:.2f}" for name in rivals]
            row += [f"{received_bytes(name, int(channels), int(ranks)):,}" for name in ("ours", "allgather")]
            rows.append(row)
    print(table(headings, rows))

    timed: dict[tuple[int, int], float] = {}

    def merges(ranks: int, channels: int) -> float:
        most = min(ranks, LARGEST_MERGE)
        if (most, channels) not in timed:
            timed[most, channels] = merge_seconds(most, channels, 5)
        return timed[most, channels] * ranks / most

    given = options.latency_us is not None and options.gigabytes_per_s is not None
    network = {
        name: (1e-6 * options.latency_us, 1e-9 / options.gigabytes_per_s) if given else fit(measured, name)
        for name in ("ours", "allgather")
    }
    modelled = {
        str(channels): {
            name: {
                str(ranks): 1e6 * model(name, channels, ranks, network[name], merges) for ranks in MODELLED
            }
            for name in network
        }
        for channels in CHANNELS
    }
    origin = "as given" if given else "fitted to two ranks here"
    print(f"\nThe model, in microseconds. Latency and time per byte {origin}:")
    for name, (latency, per_byte) in network.items():
        print(f"  {name}: {1e6 * latency:.1f} us and {1e9 * per_byte:.3f} ns per byte and step")
    print(
        "It assumes that all ranks are as near as two processes here, links of their own, and nobody late; "
        f"merges over more than {LARGEST_MERGE} ranks are scaled.\n"
    )
    rows = []
    for ranks in MODELLED:
        for channels, times in modelled.items():
            ours, allgather = (times[name][str(ranks)] for name in network)
            rows.append(
                [f"{ranks}, {channels}", f"{ours:,.0f}", f"{allgather:,.0f}", f"{allgather / ours:.1f}"]
            )
    print(table(["ranks, C", *network, "allgather/ours"], rows))

    facts = circumstances(arguments, 1, ["cupy_syncbn", "numpy", "mpi4py"])
    print(f"\n{caption(facts)}")
    record = {
        **facts, "library": library, "cores": cores, "measured": measured,
        "model": {"network": network, "origin": origin, "us": modelled},
    }  # fmt: skip
    vendor = library.rpartition(" ")[0].lower().replace(" ", "-")
    save(options.output, f"exchange-{vendor}" + "-quick" * options.quick, record, plot(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
