"""The emulator's late streams find what they are for."""

import numpy as np
import pytest

pytestmark = pytest.mark.mpi_skip


def test_streams_that_work_late(cupy, streams):
    on_host = np.frombuffer(cupy.cuda.alloc_pinned_memory(24), "f8", 3)
    on_host[:] = 7
    source = cupy.arange(3.0)
    with cupy.cuda.Stream() as stream:
        copy = cupy.empty(3)
        copy[...] = source
        copy.get(out=on_host, blocking=False)
        assert on_host.tolist() == [7, 7, 7]
        event = stream.record()
        assert event.done
        assert on_host.tolist() == [0, 1, 2]
        copy.set(on_host)
        on_host[:] = 9  # too early
        assert copy.tolist() == [9, 9, 9]


def test_streams_wait_for_events_and_the_null_stream(cupy, streams):
    null, blocking, other = cupy.cuda.Stream.null, cupy.cuda.Stream(), cupy.cuda.Stream(non_blocking=True)
    array, ones = cupy.zeros(2), cupy.ones(1)
    cupy.cuda.Device().synchronize()
    with blocking:
        array[:1] = ones
    with null:
        array[1:] = array[:1]
    with other:
        assert array.tolist() == [0, 0]  # such a stream waits for no other
        other.wait_event(null.record())
        assert array.tolist() == [1, 1]


def test_pinned_memory_that_a_kernel_writes_to(cupy, emulator, streams):
    """CUDA lets kernels have it at the host's address; they come to it when the stream does."""
    code = 'extern "C" __global__ void tell(double* to) { to[threadIdx.x] = threadIdx.x; }'
    kernel = cupy.RawModule(code=code).get_function("tell")
    on_host = np.frombuffer(cupy.cuda.alloc_pinned_memory(24), "f8", 3)
    on_host[:] = 7
    kernel((1,), (3,), (on_host.ctypes.data,))
    assert on_host.tolist() == [7, 7, 7]
    cupy.cuda.get_current_stream().synchronize()
    assert on_host.tolist() == [0, 1, 2]
    with pytest.raises(emulator.EmulatorError, match="no address"):
        kernel((1,), (3,), (np.zeros(3).ctypes.data,))
    kernel((1,), (65,), (on_host.ctypes.data,))
    with pytest.raises(emulator.EmulatorError, match="out-of-bounds"):
        cupy.cuda.get_current_stream().synchronize()
    kernel((1,), (3,), (on_host.ctypes.data,))
    del on_host
    with pytest.raises(emulator.EmulatorError, match="pinned memory, was freed"):
        cupy.cuda.get_current_stream().synchronize()


def test_pinned_memory_that_is_freed_early(cupy, emulator, streams):
    array = cupy.ones(3)
    on_host = np.frombuffer(cupy.cuda.alloc_pinned_memory(24), "f8", 3)
    array.get(out=on_host, blocking=False)
    del on_host
    with pytest.raises(emulator.EmulatorError, match="pinned memory was freed"):
        cupy.cuda.get_current_stream().synchronize()
