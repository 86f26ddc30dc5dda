"""What streams have been given to do: it is done at once, or when what is before it on the stream has ended.

Only what takes its time makes a difference, as an operation of NCCL that waits for other ranks: what follows
it waits too. No thread works here. The work goes on when the host looks at it, by a synchronisation or the
query of an event, and not before: what reads a result too early gets none.
"""

import threading
import time
from types import SimpleNamespace

from .runtime import EmulatorError

PATIENCE = 60.0  # seconds that the host waits for a stream, after which that counts as a deadlock

# What tests may change, what is counted, and a function.
streams = SimpleNamespace(
    at_once=True,  # False: all work waits until the host looks at it
    synchronizations=[],  # the names of the calls by which the host has waited
    finish_all=lambda: finish_all(),
)

_lock = threading.RLock()
_unfinished = []  # all work that has not ended, in the order in which it was given
_last = {}  # (device, stream): its last work, if that has not ended
_graphs = {}  # (device, stream): what has been captured from it so far
_non_blocking = set()  # streams that take no turns with the null stream


class Work:
    """What `start` does: it returns None, or a function to be called until that returns True."""

    def __init__(self, start, needs, others_wait):
        self.needs, self.others_wait = needs, others_wait
        self.done = self._started = False
        self._next = start

    def go_on(self):
        """Do what can be done now; an error ends the work, and is the caller's."""
        if any(not work.done for work in self.needs):
            return
        self.needs = ()
        try:
            result = self._next()
        except BaseException:
            self.done = True
            raise
        if self._started:
            self.done = bool(result)
        elif result is None:
            self.done = True
        else:
            self._next, self._started = result, True


def submit(device, stream, start, after=(), give=None):
    """Give work to a stream, which begins it when other work has ended, too.

    `give`, if any, is called when the work is given to the stream, also by a graph, and returns its `start`.
    Other ranks wait for such work: it goes on whatever the host waits for.
    """
    with _lock:
        if (device, stream) in _graphs:
            _graphs[device, stream].append((start, give))
            return
        start = give() if give else start
        before = [*under_way(device, stream), *(work for work in after if not work.done)]
        work = Work(start, before, others_wait=give is not None)
        if streams.at_once and not before:
            work.go_on()
        if not work.done:
            _unfinished.append(work)
            _last[device, stream] = work


def under_way(device, stream=None):
    """Return the work that comes before what a stream, or all of a device, is given next."""
    with _lock:
        return tuple(
            work
            for (on, other), work in _last.items()
            if on == device and not work.done and (stream is None or _take_turns(stream, other))
        )


def _take_turns(stream, other):
    """Tell whether two streams do their work in the order in which it was given."""
    return stream == other or (0 in (stream, other) and not {stream, other} & _non_blocking)


def go_on(works):
    """Do what some work needs, as far as that can be done now. Other streams may be far behind."""
    with _lock:
        needed, found = [*works, *(work for work in _unfinished if work.others_wait)], set()
        while needed:
            work = needed.pop()
            if not work.done and work not in found:
                found.add(work)
                needed += work.needs
        try:
            for work in _unfinished:
                if work in found:
                    work.go_on()
        finally:
            _unfinished[:] = [work for work in _unfinished if not work.done]
            for key in [key for key, work in _last.items() if work.done]:
                del _last[key]


def finish(works):
    """Wait for work. Its errors come out here."""
    deadline = time.monotonic() + PATIENCE
    while not all(work.done for work in works):
        go_on(works)
        if time.monotonic() > deadline:
            raise EmulatorError(f"the host waited {PATIENCE:g} s for a stream: its work does not end")
        time.sleep(2e-5)


def settle(device, stream):
    """Wait for what is before work that the host does in place of a stream."""
    if (device, stream) in _graphs:
        raise EmulatorError("the stand-in captures launches, assignments and copies to the host, not this")
    finish(under_way(device, stream))


def synchronize(name, works):
    """Let the host wait, and count that."""
    streams.synchronizations.append(name)
    finish(works)


def finish_all():
    """Wait for everything; forget it if that fails."""
    try:
        finish(list(_unfinished))
    finally:
        _unfinished.clear()
        _last.clear()


def set_non_blocking(stream):
    _non_blocking.add(stream)


def begin_capture(device, stream):
    _graphs[device, stream] = []


def end_capture(device, stream):
    """Return what has been captured, as pairs of `start` and `give` for `submit`."""
    return _graphs.pop((device, stream))


def is_capturing(device, stream):
    return (device, stream) in _graphs


def is_any_capturing():
    return bool(_graphs)
