"""The stand-in for cupy.cuda: devices, streams, events, graphs, pinned memory and errors of the CUDA runtime.

Work is done as work.py says: at once, unless something before it takes its time.
"""

import ctypes
import itertools
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np

from . import work
from .runtime import EmulatorError, native

_INVALID_DEVICE, _NOT_READY, _STREAM_CAPTURE_UNSUPPORTED, _CAPTURED_EVENT = 101, 600, 900, 907

# What tests may change: how many devices there are, and what every device has.
devices = SimpleNamespace(
    count=1,
    compute_capability="90",
    attributes={
        "MultiProcessorCount": 4,  # small, so that grids are small
        "MaxThreadsPerBlock": 1024,
        "MaxThreadsPerMultiProcessor": 2048,
        "MaxBlocksPerMultiprocessor": 32,
        "MaxSharedMemoryPerBlock": 48 << 10,
        "MaxSharedMemoryPerMultiprocessor": 164 << 10,
        "MaxGridDimX": 2**31 - 1,
        "MaxGridDimY": 65535,
        "MaxGridDimZ": 65535,
        "WarpSize": 32,
        "L2CacheSize": 50 << 20,
    },
)

pinned = SimpleNamespace(allocations=0)  # how often pinned memory has been allocated

_thread = threading.local()  # .device, .streams: CUDA keeps them for each thread of the host


class CUDARuntimeError(RuntimeError):
    def __init__(self, status, name=None):
        self.status = status
        super().__init__(name or f"CUDA's status {status}")


def _check_device(number):
    if not 0 <= number < devices.count:
        raise CUDARuntimeError(_INVALID_DEVICE, f"cudaErrorInvalidDevice: invalid device ordinal ({number})")


class Device:
    def __init__(self, device=None):
        self.id = getattr(_thread, "device", 0) if device is None else int(device)
        self._before = []

    def use(self):
        _check_device(self.id)
        _thread.device = self.id

    def __enter__(self):
        self._before.append(Device())
        self.use()
        return self

    def __exit__(self, *exception):
        self._before.pop().use()

    def synchronize(self):
        _check_device(self.id)
        _refuse("cudaDeviceSynchronize", work.is_any_capturing())
        work.synchronize("cudaDeviceSynchronize", work.under_way(self.id))

    @property
    def attributes(self):
        _check_device(self.id)
        return devices.attributes

    @property
    def compute_capability(self):
        _check_device(self.id)
        return devices.compute_capability

    @property
    def pci_bus_id(self):
        _check_device(self.id)
        return f"0000:{self.id + 1:02X}:00.0"

    def __int__(self):
        return self.id

    def __index__(self):
        return self.id

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self):
        return hash(self.id)

    def __repr__(self):
        return f"<CUDA Device {self.id}>"


# ---- Streams and events ----
_next_pointer = itertools.count(0x10000, 0x100)


def _refuse(name, is_capturing):
    if is_capturing:
        message = f"cudaErrorStreamCaptureUnsupported: {name} is not permitted when stream is capturing"
        raise CUDARuntimeError(_STREAM_CAPTURE_UNSUPPORTED, message)


class Stream:
    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        self.ptr = 0 if null else next(_next_pointer)
        self.device_id = -1 if null else Device().id
        if non_blocking:
            work.set_non_blocking(self.ptr)

    @classmethod
    def from_external(cls, ptr):
        stream = cls(null=True)
        stream.ptr = ptr
        return stream

    def _key(self):
        return (Device().id if self.device_id < 0 else self.device_id), self.ptr

    def use(self):
        _streams()[-1] = self
        return self

    def __enter__(self):
        _streams().append(self)
        return self

    def __exit__(self, *exception):
        _streams().pop()

    def synchronize(self):
        self._refuse_in_capture("cudaStreamSynchronize")
        work.synchronize("cudaStreamSynchronize", self._under_way())

    @property
    def done(self):
        self._refuse_in_capture("cudaStreamQuery")
        work.go_on(self._under_way())
        return not self._under_way()

    def record(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event):
        if event._works:
            work.submit(*self._key(), lambda: None, after=event._works)

    def launch_host_func(self, callback, arg):
        def call():
            callback(arg)

        work.submit(*self._key(), call)

    def begin_capture(self, mode=None):
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        work.begin_capture(*self._key())

    def end_capture(self):
        return Graph(work.end_capture(*self._key()))

    def is_capturing(self):
        return work.is_capturing(*self._key())

    def _under_way(self):
        return work.under_way(*self._key())

    def _refuse_in_capture(self, name):
        """Raise what CUDA raises where the host would wait for a stream that is being captured."""
        _refuse(name, self.is_capturing())

    def __eq__(self, other):
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self):
        return hash(self.ptr)


class ExternalStream(Stream):
    def __init__(self, ptr, device_id=-1):
        super().__init__(null=True)
        self.ptr, self.device_id = ptr, device_id


Stream.null = Stream(null=True)


class Graph:
    """What has been captured. As in CUDA, it does not keep its memory; to use what was freed is an error."""

    def __init__(self, captured):
        self._captured = captured

    @property
    def nodes(self):  # CuPy has no such list
        """The kinds of its nodes: launch, assign (a kernel, or a memset), copy (by the host), operation."""
        return ["operation" if give else start.__name__ for start, give in self._captured]

    def launch(self, stream=None):
        for start, give in self._captured:
            submit(start, stream, give)


def submit(start, stream=None, give=None):
    """Give work to a stream, by default the current one."""
    work.submit(*(get_current_stream() if stream is None else stream)._key(), start, give=give)


def settle(stream=None):
    """Wait for what is before on a stream, as work comes that the stand-in does at once."""
    work.settle(*(get_current_stream() if stream is None else stream)._key())


def _streams():
    if not hasattr(_thread, "streams"):
        _thread.streams = [Stream.null]
    return _thread.streams


def get_current_stream(device_id=-1):
    return _streams()[-1]


_events = weakref.WeakValueDictionary()  # by pointer


class Event:
    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self.ptr = next(_next_pointer)
        self._device = Device().id
        self._works, self._time, self._captured = (), None, False
        _events[self.ptr] = self

    def record(self, stream=None):
        stream = get_current_stream() if stream is None else stream
        self._captured = stream.is_capturing()
        self._works, self._time = stream._under_way(), time.perf_counter()

    def synchronize(self):
        self._refuse_captured()
        work.synchronize("cudaEventSynchronize", self._works)

    @property
    def done(self):
        self._refuse_captured()
        if not hasattr(_thread, "device") and self._device:
            raise EmulatorError("an event is queried in a thread without a device: CUDA would open device 0")
        work.go_on(self._works)
        return all(before.done for before in self._works)

    def _refuse_captured(self):
        if self._captured:
            raise CUDARuntimeError(_CAPTURED_EVENT, "cudaErrorCapturedEvent: the event is part of a graph")


def get_elapsed_time(start_event, end_event):
    return 1e3 * (end_event._time - start_event._time)


# ---- Pinned memory ----
_PINNED_UNIT = 512
_pinned = weakref.WeakValueDictionary()  # address: memory


def alloc_pinned_memory(size):
    """Return poisoned host memory with the buffer protocol; as CuPy's, it is larger than asked for."""
    nbytes = max(1, -(-size // _PINNED_UNIT)) * _PINNED_UNIT
    # Of the runtime, as kernels may read and write it.
    address = native().emu_allocate(nbytes, b"pinned memory", ctypes.byref(ctypes.c_void_p()))
    memory = _pinned_type(nbytes).from_address(address)
    weakref.finalize(memory, native().emu_free, address).atexit = False
    ctypes.memset(memory, 0xFF, nbytes)
    pinned.allocations += 1
    _pinned[memory.ptr] = memory
    return memory


def _pinned_type(nbytes):
    properties = {"ptr": property(ctypes.addressof), "size": lambda self: nbytes}
    return type("PinnedMemoryPointer", (ctypes.c_ubyte * nbytes,), properties)


def find_pinned(address):
    """Return the pinned memory that `address` lies in, or None."""
    return next((m for base, m in list(_pinned.items()) if base <= address < base + len(m)), None)


def when_copied(array):
    """Return a function that returns an array of the host when a copy to or from it takes place.

    CUDA copies pinned memory when the stream comes to it, and knows nothing of who has freed it since.
    """
    address = array.ctypes.data
    memory = find_pinned(address)
    if memory is None:
        return lambda: array
    owner, offset = weakref.ref(memory), address - memory.ptr
    shape, strides, dtype = array.shape, array.strides, array.dtype

    def find():
        memory = owner()
        if memory is None:
            raise EmulatorError("pinned memory was freed before the copy to or from it took place")
        return np.ndarray(shape, dtype, memory, offset, strides)

    return find


# ---- cupy.cuda itself, and cupy.cuda.runtime ----
def is_available():
    return devices.count > 0


def _get_device_properties(number):
    _check_device(number)
    return {
        "name": b"CUDA on the CPU",
        "uuid": b"emulated" + number.to_bytes(8, "big"),
        "multiProcessorCount": devices.attributes["MultiProcessorCount"],
    }


def _get_pci_bus_id(number):
    _check_device(number)
    return f"0000:{number:02X}:00.0"


runtime = SimpleNamespace(
    CUDARuntimeError=CUDARuntimeError,
    getDeviceCount=lambda: devices.count,
    getDevice=lambda: Device().id,
    setDevice=lambda number: Device(number).use(),
    getDeviceProperties=_get_device_properties,
    deviceGetPCIBusId=_get_pci_bus_id,
    deviceSynchronize=lambda: Device().synchronize(),
    streamSynchronize=lambda ptr: Stream.from_external(ptr).synchronize(),
    streamIsCapturing=lambda ptr: int(Stream.from_external(ptr).is_capturing()),
    eventQuery=lambda ptr: 0 if _events[ptr].done else _NOT_READY,
    runtimeGetVersion=lambda: 13000,
    driverGetVersion=lambda: 13000,
)
