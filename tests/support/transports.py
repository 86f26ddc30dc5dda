"""What tests of transports share."""

import time

from cupy_syncbn import SyncBatchNorm, new_group

SHAPE = (18, 4, 3, 5)
TRANSPORTS = ("mpi", "cuda-aware-mpi", "nccl")
# As ids in capitals: a test with the id "mpi" has pytest-mpi's mark.


def eventually(condition, what, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def communicator_of(group):
    return group._transport._operations._communicator


def share_gpus(world, monkeypatch, cupy):
    monkeypatch.setattr(
        cupy.cuda.runtime, "deviceGetPCIBusId", lambda device: f"0000:{world.rank // 2:02X}:00.0"
    )


def nccl_layer(timeout=20.0, **arguments):
    group = new_group(transport="nccl", timeout=timeout)
    return SyncBatchNorm(4, device="cuda", process_group=group, name="stem", **arguments)


def state_of(layer):
    """Return copies of a layer's state, on the host."""
    return [array.get() for array in layer.state_dict().values()]


_pools = []
"""Those of the graphs below, whose memory has to live as long."""


def capture(cupy, step):
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    _pools.append(pool)
    cupy.cuda.Device().synchronize()  # such a stream does not wait for what others were given
    with stream, cupy.cuda.using_allocator(pool.malloc):
        step()  # the workspaces are there, the communicator too
        stream.synchronize()
        stream.begin_capture()
        results = step()
        return stream, stream.end_capture(), results
