"""CUDA kernels on the CPU, behind a stand-in for CuPy: see README.md."""

from .build import BuildError, available, build_all
from .cuda import devices, pinned
from .device_memory import memory
from .runtime import SCHEDULES, EmulatorError, Schedule, schedule, stats
from .stand_in import installed, make_cupy
from .work import streams

__all__ = [
    "SCHEDULES",
    "BuildError",
    "EmulatorError",
    "Schedule",
    "available",
    "build_all",
    "devices",
    "installed",
    "make_cupy",
    "memory",
    "pinned",
    "schedule",
    "stats",
    "streams",
]
