"""Emulated device memory: each array has its own allocation, of which the runtime knows the exact bounds."""

import ctypes
import weakref

import numpy as np

from .runtime import native


class MemoryRecord:
    """How much device memory is in use, and was at most since reset_peak()."""

    def __init__(self):
        self.live_count = self.live_bytes = 0
        self.peak_count = self.peak_bytes = 0
        self.total_count = self.total_bytes = 0  # of all allocations ever made

    def reset_peak(self):
        self.peak_count, self.peak_bytes = self.live_count, self.live_bytes

    def allocated(self, nbytes):
        self.total_count += 1
        self.total_bytes += nbytes
        self.live_count += 1
        self.live_bytes += nbytes
        self.peak_count = max(self.peak_count, self.live_count)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def freed(self, nbytes):
        self.live_count -= 1
        self.live_bytes -= nbytes

    def __repr__(self):
        return ", ".join(f"{name}={value}" for name, value in vars(self).items())


memory = MemoryRecord()

_live = weakref.WeakValueDictionary()  # base address: Allocation


class Allocation:
    """`nbytes` bytes of device memory, poisoned and never written; freed with the last array on them."""

    def __init__(self, nbytes, name, device_id):
        written = ctypes.c_void_p()
        self.nbytes, self.name, self.device_id = nbytes, name, device_id
        if not nbytes:  # no memory, as in CuPy
            self.address, self.bytes = 0, bytearray()
            return
        self.address = native().emu_allocate(nbytes, name.encode(), ctypes.byref(written))
        if not self.address:
            raise MemoryError(f"no {nbytes} bytes for {name}")
        self.bytes = (ctypes.c_ubyte * nbytes).from_address(self.address)
        self.written = (ctypes.c_ubyte * nbytes).from_address(written.value)
        memory.allocated(nbytes)
        _live[self.address] = self
        weakref.finalize(self, _free, self.address, nbytes).atexit = False

    def view(self, shape, dtype, offset=0, strides=None):
        if not self.nbytes:  # NumPy takes an empty buffer for a read-only one
            return np.ndarray(shape, dtype)
        return np.ndarray(shape, dtype, self.bytes, offset, strides)

    def mark_all_written(self):
        if self.nbytes:
            ctypes.memset(self.written, 1, self.nbytes)

    def written_map(self, values):
        """Return the map of written bytes of a view: of its shape, with the bytes of an element last."""
        shape, strides = (*values.shape, values.itemsize), (*values.strides, 1)
        return np.ndarray(shape, np.uint8, self.written, values.ctypes.data - self.address, strides)


def _free(address, nbytes):
    native().emu_free(address)
    memory.freed(nbytes)


def find_allocation(address):
    """Return the live allocation that `address` lies in, or None."""
    for base, allocation in list(_live.items()):
        if base <= address < base + allocation.nbytes:
            return allocation
    return None
