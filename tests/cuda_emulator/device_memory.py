"""Emulated device memory: each array has its own allocation, of which the runtime knows the exact bounds."""

import contextlib
import ctypes
import threading
import weakref

import numpy as np

from .cuda import get_current_stream
from .runtime import EmulatorError, native


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


class _Block:
    """Device memory, poisoned and never written; freed when neither an array nor a pool has it."""

    def __init__(self, nbytes, name):
        written = ctypes.c_void_p()
        self.address = native().emu_allocate(nbytes, name.encode(), ctypes.byref(written))
        if not self.address:
            raise MemoryError(f"no {nbytes} bytes for {name}")
        self.bytes = (ctypes.c_ubyte * nbytes).from_address(self.address)
        self.written = (ctypes.c_ubyte * nbytes).from_address(written.value)
        weakref.finalize(self, native().emu_free, self.address).atexit = False

    def poison(self):
        ctypes.memset(self.bytes, 0xFF, len(self.bytes))
        ctypes.memset(self.written, 0, len(self.written))

    def left(self):
        """Hear that no array has it any more."""


class MemoryPool:
    """As cupy.cuda.MemoryPool: what arrays leave is for the next of its size on its stream.

    CuPy's also cuts a block for smaller arrays; this one does not, so that the bounds are exact.
    """

    def __init__(self):
        self._free, self._used = {}, 0  # by (bytes, stream)

    def malloc(self, nbytes, name=""):
        blocks = self._free.get((nbytes, get_current_stream().ptr))
        block = blocks.pop() if blocks else _PooledBlock(nbytes, name, self)
        block.poison()
        self._used += nbytes
        return block

    def used_bytes(self):
        return self._used

    def free_bytes(self):
        return sum(nbytes * len(blocks) for (nbytes, _), blocks in self._free.items())

    def free_all_blocks(self):
        self._free.clear()

    def take_back(self, block):
        self._used -= len(block.bytes)
        self._free.setdefault((len(block.bytes), block.stream), []).append(block)


class _PooledBlock(_Block):
    def __init__(self, nbytes, name, pool):
        super().__init__(nbytes, name)
        self.stream, self._pool = get_current_stream().ptr, weakref.ref(pool)

    def left(self):
        if pool := self._pool():
            pool.take_back(self)


_allocators = threading.local()  # .current, if it is not the usual one


@contextlib.contextmanager
def using_allocator(allocator=None):
    """As cupy.cuda.using_allocator, of MemoryPool.malloc."""
    before = getattr(_allocators, "current", None)
    _allocators.current = allocator
    try:
        yield
    finally:
        _allocators.current = before


class Allocation:
    """The device memory of an array and its views, which leave it together."""

    def __init__(self, nbytes, name, device_id):
        self.nbytes, self.name, self.device_id = nbytes, name, device_id
        if not nbytes:  # no memory, as in CuPy
            self.address, self.bytes, self.block = 0, bytearray(), None
            return
        self.block = (getattr(_allocators, "current", None) or _Block)(nbytes, name)
        self.address, self.bytes, self.written = self.block.address, self.block.bytes, self.block.written
        memory.allocated(nbytes)
        _live[self.address] = self
        weakref.finalize(self, _left, self.block, nbytes).atexit = False

    def check(self):
        """Raise an error if the memory has been freed: not while this is there."""

    def view(self, shape, dtype, offset=0, strides=None):
        if not self.nbytes:  # NumPy takes an empty buffer for a read-only one
            return np.ndarray(shape, dtype)
        return np.ndarray(shape, dtype, self.bytes, offset, strides)

    def mark_all_written(self):
        if self.nbytes:
            ctypes.memset(self.written, 1, self.nbytes)

    def written_map(self, values):
        """Return the map of written bytes of a view: of its shape, with the bytes of an element last."""
        return _map_of(values, self.written, self.address)


class BorrowedAllocation:
    """The memory of an array to a graph, which does not keep it."""

    def __init__(self, allocation):
        self.name, self.address, self.nbytes = allocation.name, allocation.address, allocation.nbytes
        self._block = weakref.ref(allocation.block) if allocation.block else None

    def check(self):
        """Raise an error if the memory has been freed."""
        if self._block and self._block() is None:
            raise EmulatorError(f"a graph uses {self.name}, which has been freed")

    def mark_all_written(self):
        if self._block:
            ctypes.memset(self._block().written, 1, self.nbytes)

    def written_map(self, values):
        return _map_of(values, self._block().written, self.address)


def _map_of(values, written, address):
    shape, strides = (*values.shape, values.itemsize), (*values.strides, 1)
    return np.ndarray(shape, np.uint8, written, values.ctypes.data - address, strides)


def _left(block, nbytes):
    memory.freed(nbytes)
    block.left()


def find_allocation(address):
    """Return the live allocation that `address` lies in, or None."""
    for base, allocation in list(_live.items()):
        if base <= address < base + allocation.nbytes:
            return allocation
    return None
