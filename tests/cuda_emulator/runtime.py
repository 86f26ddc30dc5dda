"""The native runtime as Python sees it: its structs, its functions, and how the next launches run."""

import contextlib
import ctypes
import dataclasses
import functools

from . import build


class EmulatorError(RuntimeError):
    """A kernel, or its launch, is wrong."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """In which order the threads of a launch run."""

    order: str = "forward"  # of the threads and the blocks: forward, reverse, random
    seed: int = 0
    resident: int = 1  # blocks under way at once
    preempt: int = 0  # per mille: how often a thread is interrupted at an access
    allow_exited: bool = False  # barriers and warp collectives do without threads that have returned
    strict_shuffles: bool = False  # a shuffle from a lane that takes no part is an error, not a NaN
    switch_limit: int = 200_000_000  # switches between threads, after which a launch counts as a livelock

    def __str__(self):
        changed = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return ",".join(f"{field.name}={getattr(self, field.name)}" for field in changed) or "forward"


# What a test should run a kernel under: an error in its order shows under one of these or another.
SCHEDULES = (
    Schedule(order="forward"),
    Schedule(order="reverse"),
    Schedule(order="random", seed=1),
    Schedule(order="random", seed=2, resident=4),
    Schedule(order="random", seed=3, resident=4, preempt=20),
)

_current_schedule = Schedule()


def current_schedule():
    return _current_schedule


@contextlib.contextmanager
def schedule(chosen=None, **changes):
    """Run the launches inside by `chosen`, a Schedule, or by the current one with changes."""
    global _current_schedule
    before = _current_schedule
    _current_schedule = dataclasses.replace(chosen or before, **changes)
    try:
        yield _current_schedule
    finally:
        _current_schedule = before


class Stats:
    """What the launches since the last reset() did. Accesses are counted in checked kernels only."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.launches = []  # (name, grid, block)
        self.reads = self.writes = self.read_bytes = self.write_bytes = 0
        self.atomics = self.barriers = self.warp_collectives = self.switches = 0

    def add(self, name, grid, block, counters):
        self.launches.append((name, grid, block))
        for counter, _ in counters._fields_:
            setattr(self, counter, getattr(self, counter) + getattr(counters, counter))

    def __repr__(self):
        return ", ".join(f"{name}={value}" for name, value in vars(self).items())


stats = Stats()


# The structs of native/interface.h.
class Parameter(ctypes.Structure):
    _fields_ = [("is_pointer", ctypes.c_bool), ("kind", ctypes.c_char), ("size", ctypes.c_uint16)]


class KernelInfo(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("invoke", ctypes.c_void_p),
        ("function", ctypes.c_void_p),
        ("parameter_count", ctypes.c_int),
        ("parameters", ctypes.POINTER(Parameter)),
    ]


class LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("dynamic_shared_bytes", ctypes.c_uint32),
        ("order", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
        ("resident_blocks", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("preempt_per_mille", ctypes.c_uint32),
        ("switch_limit", ctypes.c_uint64),
    ]


_COUNTERS = "switches barriers warp_collectives reads writes read_bytes write_bytes atomics"


class Counters(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in _COUNTERS.split()]


class Failure(ctypes.Structure):
    _fields_ = [
        ("message", ctypes.c_char * 2048),
        ("library", ctypes.c_char * 1024),
        ("offset", ctypes.c_uint64),
        ("allocation", ctypes.c_uint64),
    ]


ORDERS = {"forward": 0, "reverse": 1, "random": 2}
CHECK_RACES, CHECK_WRITTEN, ALLOW_EXITED, STRICT_SHUFFLES = 1, 2, 4, 8


@functools.cache
def native():
    """Return the runtime's library: one for all modules, since device memory is common to them."""
    # A PyDLL keeps the interpreter's lock: a launch runs to its end before any other call.
    library = ctypes.PyDLL(str(build.build_runtime()))
    library.emu_allocate.restype = ctypes.c_void_p
    library.emu_allocate.argtypes = [ctypes.c_size_t, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p)]
    library.emu_free.restype = None
    library.emu_free.argtypes = [ctypes.c_void_p]
    library.emu_launch.argtypes = [
        ctypes.POINTER(KernelInfo),
        ctypes.POINTER(LaunchConfig),
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.POINTER(Counters),
        ctypes.POINTER(Failure),
    ]
    return library
