"""The stand-in for cupy.cuda: devices, streams, events, pinned memory and errors of the CUDA runtime.

Work is done at once, in the order of the calls: a missing synchronisation cannot show here.
"""

import ctypes
import itertools
import threading
import time
from types import SimpleNamespace

_INVALID_DEVICE, _STREAM_CAPTURE_UNSUPPORTED = 101, 900

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
        "MaxGridDimX": 2**31 - 1,
        "MaxGridDimY": 65535,
        "MaxGridDimZ": 65535,
        "WarpSize": 32,
        "L2CacheSize": 50 << 20,
    },
)

_thread = threading.local()  # .device, .streams: CUDA keeps them for each thread of the host


class CUDARuntimeError(RuntimeError):
    def __init__(self, status, name):
        self.status = status
        super().__init__(name)


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
        for stream in _capturing:
            stream._refuse_in_capture("cudaDeviceSynchronize")

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
_capturing = []


class Stream:
    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        self.ptr = 0 if null else next(_next_pointer)
        self.non_blocking = non_blocking

    @classmethod
    def from_external(cls, ptr):
        stream = cls(null=True)
        stream.ptr = ptr
        return stream

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

    @property
    def done(self):
        self._refuse_in_capture("cudaStreamQuery")
        return True

    def record(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event):
        pass

    def launch_host_func(self, callback, arg):
        callback(arg)

    # What is captured is done at once as well: there is no graph to launch.
    def begin_capture(self, mode=None):
        _capturing.append(self)

    def end_capture(self):
        _capturing.remove(self)

    def is_capturing(self):
        return self in _capturing

    def _refuse_in_capture(self, name):
        """Raise what CUDA raises where the host would wait for a stream that is being captured."""
        if self in _capturing:
            message = f"cudaErrorStreamCaptureUnsupported: {name} is not permitted when stream is capturing"
            raise CUDARuntimeError(_STREAM_CAPTURE_UNSUPPORTED, message)

    def __eq__(self, other):
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self):
        return hash(self.ptr)


class ExternalStream(Stream):
    def __init__(self, ptr, device_id=-1):
        super().__init__(null=True)
        self.ptr = ptr


Stream.null = Stream(null=True)


def _streams():
    if not hasattr(_thread, "streams"):
        _thread.streams = [Stream.null]
    return _thread.streams


def get_current_stream(device_id=-1):
    return _streams()[-1]


class Event:
    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self.ptr = next(_next_pointer)
        self._disable_timing, self._time = disable_timing, None

    def record(self, stream=None):
        self._time = time.perf_counter()

    def synchronize(self):
        get_current_stream()._refuse_in_capture("cudaEventSynchronize")

    @property
    def done(self):
        return True


def get_elapsed_time(start_event, end_event):
    return 1e3 * (end_event._time - start_event._time)


# ---- Pinned memory ----
_PINNED_UNIT = 512


def alloc_pinned_memory(size):
    """Return poisoned host memory with the buffer protocol; as CuPy's, it is larger than asked for."""
    nbytes = max(1, -(-size // _PINNED_UNIT)) * _PINNED_UNIT
    memory = _pinned_type(nbytes)()
    ctypes.memset(memory, 0xFF, nbytes)
    return memory


def _pinned_type(nbytes):
    properties = {"ptr": property(ctypes.addressof), "size": lambda self: nbytes}
    return type("PinnedMemoryPointer", (ctypes.c_ubyte * nbytes,), properties)


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
    streamIsCapturing=lambda ptr: Stream.from_external(ptr).is_capturing(),
    runtimeGetVersion=lambda: 13000,
    driverGetVersion=lambda: 13000,
)
