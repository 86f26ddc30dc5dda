"""Let an error come at every line of the package in turn, on the last rank, and write what came of it.

    injection.py FOLDER ERROR STEPS

ERROR is MemoryError or KeyboardInterrupt, STEPS the name of a call, all of whose lines are taken, or "sample"
for some of the lines of each. Each rank writes a line of JSON for each: where the error came, what the rank
raised, after how long, what had changed, and the same of a second call. test_injection.py judges them.
"""

import builtins
import json
import sys
import time
from pathlib import Path

import numpy as np
from trial import meet, world_of_ranks

import cupy_syncbn
from cupy_syncbn import DistributedDataParallel, MPIProcessGroup, Sequential, SyncBatchNorm
from support.compare import snapshot
from support.nodes import pretend

PACKAGE = str(Path(cupy_syncbn.__file__).parent)
TIMEOUT = 0.6
CHANNELS = 4


class Injection:
    """Raises an error before the k-th line of the package that is traced, once."""

    def __init__(self, error, k):
        self.error, self.left, self.where = error, k, None

    def __enter__(self):
        sys.settrace(self.enter)

    def __exit__(self, *error):
        sys.settrace(None)

    def enter(self, frame, event, argument):
        return self.line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def line(self, frame, event, argument):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                path = Path(frame.f_code.co_filename).relative_to(PACKAGE)
                self.where = f"{path}:{frame.f_lineno} {frame.f_code.co_qualname}"
                sys.settrace(None)
                raise self.error("injected")
        return self.line


class Subject:
    """Two layers and their model, and the calls to make with them."""

    def __init__(self, call, number):
        world = world_of_ranks()
        self.comm = world.Dup()
        self.group = MPIProcessGroup(self.comm, timeout=TIMEOUT)
        rng = np.random.default_rng((number, world.rank))
        self.layers = [
            SyncBatchNorm(CHANNELS, name="stem", process_group=self.group),
            SyncBatchNorm(CHANNELS - 1, name="head", process_group=self.group, dtype="float64"),
        ]
        self.x, z = (rng.normal(size=(5, C)).astype(t) for C, t in ((CHANNELS, "f4"), (CHANNELS - 1, "f8")))
        stem, head = self.layers
        self.network = Sequential(stem, head)
        if call in ("forward", "backward", "gradients"):
            for layer, batch in zip(self.layers, (self.x, z), strict=True):
                layer.backward(layer(batch))
        if call == "gradients":
            self.model = DistributedDataParallel(self.network, self.group, bucket_cap_mb=1e-6)
        if call == "backward":
            stem(self.x)
        if call == "construction":
            for layer in self.layers:
                layer.weight.data += world.rank
        self.z = z

    def state(self):
        return {
            f"{number}.{name}": array
            for number, layer in enumerate(self.layers)
            for name, array in snapshot(layer).items()
        }


def differences(before, after):
    """Return the names of what has changed."""
    bits = [{k: None if v is None else v.tobytes() for k, v in state.items()} for state in (before, after)]
    return [name for name in before if bits[0][name] != bits[1][name]]


def construct(subject):
    subject.model = DistributedDataParallel(subject.network, subject.group)


CALLS = {
    "first": (lambda s: s.layers[0](s.x), lambda s: s.layers[0](s.x)),
    "forward": (lambda s: s.layers[0](s.x), lambda s: s.layers[0](s.x)),
    "forward64": (lambda s: s.layers[1](s.z), lambda s: s.layers[1](s.z)),
    "backward": (lambda s: s.layers[0].backward(s.x), lambda s: s.layers[0](s.x)),
    "gradients": (lambda s: s.model.reduce_gradients(), lambda s: s.model.reduce_gradients()),
    "construction": (construct, lambda s: s.layers[0](s.x)),
}
"""The call, and the next one."""


def attempt(subject, call, injection=None):
    """Make a call, and return what came of it."""
    meet()
    before, start, error = subject.state(), time.monotonic(), None
    try:
        if injection is None:
            call(subject)
        else:
            with injection:
                call(subject)
    except (Exception, KeyboardInterrupt) as caught:
        error = caught
    seconds = time.monotonic() - start
    return {
        "error": None if error is None else type(error).__name__,
        "message": "\n".join([str(error), *getattr(error, "__notes__", [])]),
        "seconds": seconds,
        "changed": differences(before, subject.state()),
    }


SAMPLE = {"first": 23, "forward": 13, "forward64": 17, "backward": 13, "gradients": 53, "construction": 67}
"""Of so many lines one is taken."""


def inject(name, error, step, file):
    world = world_of_ranks()
    is_faulty = world.rank == world.size - 1
    call, following = CALLS[name]
    state_of = "forward" if name == "forward64" else name
    for _ in range(2):  # what is imported or cached at the first use is no part of what is tried
        warm = Subject(state_of, 0)
        attempt(warm, call)
        attempt(warm, following)
    for k in range(1, 100_000, step):
        subject = Subject(state_of, k)
        injection = Injection(error, k) if is_faulty else None
        report = {"call": name, **attempt(subject, call, injection)}
        report["next"] = attempt(subject, following)
        everyones_place = world.bcast(injection.where if is_faulty else None, world.size - 1)
        if everyones_place is None:
            return
        file.write(json.dumps(report | {"where": everyones_place}) + "\n")
        file.flush()
        if not world.allreduce(subject.group.is_given_up):
            subject.comm.Free()  # MPI has only so many


def main(folder, error, steps):
    pretend()
    with Path(folder, f"{world_of_ranks().rank}.jsonl").open("w") as file:
        for name, step in (SAMPLE if steps == "sample" else {steps: 1}).items():
            inject(name, getattr(builtins, error), step, file)
            print(f"{name}: every {step}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
