"""A stand-in for cupy.cuda.nccl: communicators of MPI processes, on the emulator's GPUs and streams.

It demands what NCCL demands. An operation does nothing when it is called; when its stream comes to it, each
rank sends its part to the others, by MPI, and it ends when all parts are there. If the ranks bring different
operations, counts or types, or one brings none, it never ends, until the communicator is aborted.
"""

import itertools
import sys
import threading
import time
import types

import ml_dtypes
import numpy as np
from mpi4py import MPI

import cuda_emulator
from cuda_emulator import cuda
from cuda_emulator.device_memory import find_allocation

PATIENCE = 30.0  # seconds that the making of a communicator waits for the other ranks

_TYPES = {
    "INT8": (0, "i1"), "CHAR": (0, "i1"), "UINT8": (1, "u1"), "INT32": (2, "i4"), "INT": (2, "i4"),
    "UINT32": (3, "u4"), "INT64": (4, "i8"), "UINT64": (5, "u8"), "FLOAT16": (6, "f2"), "HALF": (6, "f2"),
    "FLOAT32": (7, "f4"), "FLOAT": (7, "f4"), "FLOAT64": (8, "f8"), "DOUBLE": (8, "f8"),
    "BFLOAT16": (9, ml_dtypes.bfloat16),
}  # fmt: skip
_DTYPES = {number: np.dtype(dtype) for number, dtype in _TYPES.values()}
_OPERATORS = {"SUM": 0, "PROD": 1, "MAX": 2, "MIN": 3, "AVG": 4}
_ERRORS = {
    1: "NCCL_ERROR_UNHANDLED_CUDA_ERROR",
    2: "NCCL_ERROR_SYSTEM_ERROR",
    3: "NCCL_ERROR_INTERNAL_ERROR",
    4: "NCCL_ERROR_INVALID_ARGUMENT",
    5: "NCCL_ERROR_INVALID_USAGE",
    6: "NCCL_ERROR_REMOTE_ERROR",
}
_ID_BYTES = 128

_lock = threading.RLock()  # of what follows, and of the calls to MPI
_numbers = itertools.count(1)
_unsent = []  # requests of MPI, with what they send
made = []  # a line for each communicator that this process has made


class NcclError(RuntimeError):
    def __init__(self, status):
        self.status = status
        super().__init__(f"{_ERRORS[status]}: of the stand-in")


def make_nccl(available=True):
    """Return a module to put in place of cupy.cuda.nccl."""
    nccl = types.ModuleType("cupy.cuda.nccl")
    nccl.available = available
    _messages()
    if available:
        nccl.NcclError, nccl.NcclCommunicator, nccl.get_unique_id = NcclError, NcclCommunicator, get_unique_id
        for name, (number, _) in _TYPES.items():
            setattr(nccl, f"NCCL_{name}", number)
        for name, number in _OPERATORS.items():
            setattr(nccl, f"NCCL_{name}", number)
    return nccl


_own_world = []


def _messages():
    """Return a communicator of MPI for the stand-in alone; the first call is collective."""
    if not _own_world:
        _own_world.append(MPI.COMM_WORLD.Dup())
    return _own_world[0]


def get_unique_id():
    """Return 128 bytes; the process that makes them must be one of the ranks."""
    text = f"{MPI.COMM_WORLD.rank} {next(_numbers)}"
    return text.encode().ljust(_ID_BYTES, b"\0")


class NcclCommunicator:
    """One rank's part of a communicator. The constructor waits for all ranks."""

    def __init__(self, ndev, commId, rank, config=None):
        if not isinstance(commId, bytes) or len(commId) != _ID_BYTES:
            raise TypeError(f"expected {_ID_BYTES} bytes as the unique id (got {commId!r})")
        if not 0 <= rank < ndev:
            raise NcclError(4)
        self._is_open, self.was_aborted = False, False
        creator, number = map(int, commId.rstrip(b"\0").split())
        self._tag = 2 * (number * MPI.COMM_WORLD.size + creator)
        self._rank, self._device = rank, cuda.Device().id
        self._calls = 0
        self._parts = {}  # (call, rank): header and data
        self.asynchronous_error = 0  # for tests to set
        gpu = sys.modules["cupy.cuda.runtime"].deviceGetPCIBusId(self._device)  # which tests may replace
        mine = (rank, ndev, MPI.Get_processor_name(), gpu)
        self._worlds = self._agree(creator, mine, ndev)
        self._is_open = True
        made.append(f"rank {rank} of {ndev} on {gpu}")

    def _agree(self, creator, mine, ndev):
        """Return the ranks in the world of all ranks; or raise what is wrong, on all."""
        world, tag = _messages(), self._tag + 1
        if world.rank != creator:
            with _lock:
                request = world.isend((world.rank, mine), creator, tag)
            answer = self._receive(creator, tag)
            request.wait()
        else:
            all_ranks = [(world.rank, mine)]
            while len(all_ranks) < ndev:
                all_ranks.append(self._receive(MPI.ANY_SOURCE, tag))
            answer = self._judge(all_ranks, ndev)
            for other, _ in all_ranks[1:]:
                world.send(answer, other, tag)
        if isinstance(answer, int):
            raise NcclError(answer)
        return answer

    def _receive(self, source, tag):
        deadline = time.monotonic() + PATIENCE
        while True:
            with _lock:
                message = _messages().improbe(source, tag)
                if message is not None:
                    return message.recv()
            if time.monotonic() > deadline:
                raise cuda_emulator.EmulatorError(
                    f"NCCL waited {PATIENCE:g} s for all ranks of a communicator"
                )
            time.sleep(1e-4)

    @staticmethod
    def _judge(all_ranks, ndev):
        ranks = [rank for _, (rank, *_) in all_ranks]
        gpus = {gpu for _, (_, _, *gpu) in all_ranks for gpu in [tuple(gpu)]}
        if sorted(ranks) != list(range(ndev)) or any(size != ndev for _, (_, size, *_) in all_ranks):
            return 4
        if len(gpus) < ndev:
            return 5  # "Duplicate GPU detected"
        return dict(zip(ranks, (world for world, _ in all_ranks), strict=True))

    # ---- What it is ----
    def _check_open(self):
        if not self._is_open:
            raise NcclError(4)

    def size(self):
        self._check_open()
        return len(self._worlds)

    def rank_id(self):
        self._check_open()
        return self._rank

    def device_id(self):
        self._check_open()
        return self._device

    def check_async_error(self):
        self._check_open()
        if self.asynchronous_error:
            raise NcclError(self.asynchronous_error)

    # ---- Its end ----
    def abort(self):
        """End all operations at once; what they were to write is undefined."""
        self.was_aborted, self._is_open = True, False

    def destroy(self):
        """Wait for the operations. The real one waits for the other ranks, too: so not in the main thread."""
        if not self._is_open:
            return
        if threading.current_thread() is threading.main_thread():
            raise cuda_emulator.EmulatorError(
                "NCCL's communicator was destroyed where its ranks may wait for it"
            )
        self._is_open = False

    # ---- Its operations ----
    def allReduce(self, sendbuf, recvbuf, count, datatype, op, stream):  # noqa: N802 (CuPy's name)
        if op not in _OPERATORS.values():
            raise NcclError(4)
        if op != _OPERATORS["SUM"]:
            raise NotImplementedError("the stand-in only adds up")
        self._enqueue(("allReduce", count, datatype, op), sendbuf, recvbuf, stream)

    def broadcast(self, sendbuff, recvbuff, count, datatype, root, stream):
        if root not in self._worlds:
            raise NcclError(4)
        self._enqueue(("broadcast", count, datatype, root), sendbuff, recvbuff, stream)

    def _enqueue(self, header, sendbuf, recvbuf, stream):
        self._check_open()
        _, count, datatype, _ = header
        if datatype not in _DTYPES:
            raise NcclError(4)
        send = self._memory(sendbuf, count, _DTYPES[datatype])
        receive = self._memory(recvbuf, count, _DTYPES[datatype])
        on_stream = cuda.ExternalStream(stream, self._device)
        cuda.submit(None, on_stream, give=lambda: self._give(header, send, receive))

    def _give(self, header, send, receive):
        """Number the operation among those of the communicator: ranks match them by their order."""
        call, self._calls = self._calls, self._calls + 1
        return lambda: self._begin(call, header, send, receive)

    def _memory(self, pointer, count, dtype):
        """Return an allocation of the emulator, and the part of it that an operation takes."""
        if not all(isinstance(value, int) for value in (pointer, count)):
            raise TypeError("expected integers as pointer and count")
        allocation = find_allocation(pointer)
        if allocation is None:
            raise NcclError(4)
        end = pointer + count * dtype.itemsize
        if allocation.device_id != self._device or end > allocation.address + allocation.nbytes:
            raise NcclError(4)
        if pointer % dtype.itemsize:
            raise NcclError(4)
        return allocation, allocation.view((count,), dtype, pointer - allocation.address)

    def _begin(self, call, header, send, receive):
        """Send this rank's part, and return a function that tells whether all has been received."""
        allocation, values = send
        kind, _, _, root = header
        is_sender = kind == "allReduce" or root == self._rank
        if is_sender and not allocation.written_map(values).all():
            raise cuda_emulator.EmulatorError("NCCL reads device memory that nothing has written")
        with _lock:
            part = (header, values.tobytes() if is_sender else b"")
            self._parts[call, self._rank] = part
            if self._is_open:
                for rank, world in self._worlds.items():
                    if rank != self._rank:
                        _unsent.append(_messages().isend((call, self._rank, *part), world, self._tag))
        return lambda: self._poll(call, *receive)

    def _poll(self, call, allocation, values):
        with _lock:
            if self.was_aborted:
                values.view("u1")[:] = 0xFF  # NaN
                return True
            _unsent[:] = [request for request in _unsent if not request.Test()]
            while (message := _messages().improbe(MPI.ANY_SOURCE, self._tag)) is not None:
                number, rank, *part = message.recv()
                self._parts[number, rank] = tuple(part)
            parts = [self._parts.get((call, rank)) for rank in range(len(self._worlds))]
            if None in parts or any(header != parts[0][0] for header, _ in parts):
                return False
            for rank in range(len(parts)):
                del self._parts[call, rank]
        (kind, _, _, root), _ = parts[0]
        arrays = [np.frombuffer(data, values.dtype) for _, data in parts]
        if kind == "broadcast":
            values[:] = arrays[root]
        else:
            wide = np.promote_types(values.dtype, np.float32) if values.dtype.itemsize == 2 else values.dtype
            values[:] = sum(array.astype(wide) for array in arrays)
        allocation.written_map(values)[...] = 1
        return True


def install(monkeypatch, cupy, available=True):
    """Put the stand-in in place of cupy.cuda.nccl, for the time of a test; return it. **Collective.**"""
    nccl = make_nccl(available)
    monkeypatch.setitem(sys.modules, "cupy.cuda.nccl", nccl)
    monkeypatch.setattr(cupy.cuda, "nccl", nccl, raising=False)
    return nccl
