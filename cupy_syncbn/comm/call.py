"""One collective call: prepare, exchange, commit; its name, and what its sum tells of the ranks."""

from __future__ import annotations

import contextlib
import functools
import operator
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from cupy_syncbn.arrays import Array, module_of
from cupy_syncbn.comm import trailer
from cupy_syncbn.comm.errors import CollectiveTimeoutError, RankMismatchError, RemoteRankError
from cupy_syncbn.comm.groups import ProcessGroup
from cupy_syncbn.comm.trailer import FAULT

_ODD = 0x9E3779  # calls that differ in their number alone have different tags


class Call(NamedTuple):
    """A collective step of a layer: all ranks that are in step make the same call."""

    name: str
    channels: int
    """0 if the call is none of a layer's."""
    direction: str
    """"forward" or "backward"; "" for a call that its name describes."""
    number: int
    """Calls that the layer has made before; a backward has the number of its forward."""
    model: int | None = None
    """The number of the model that a layer belongs to, which tells layers of one name apart."""

    def __str__(self) -> str:
        if not self.direction:
            return self.name
        count = f" ({self.channels} channels)" if self.channels else ""
        model = f" of model {self.model}" if self.model else ""
        return f"{self.direction} {self.number} of {self.name}{count}{model}"

    def trailer(self, group: ProcessGroup) -> tuple[float, float, float, float, float]:
        """Return the end of a faultless rank's vector.

        Calls of a layer in one direction have equal tags only if their numbers differ by a multiple of 2^24;
        other calls collide with probability 2^-24.
        """
        if group.size == 1:
            return 0.0, 0.0, 0.0, 0.0, 0.0
        name, channels, direction, number, model = self
        tag = _hash(name, channels, direction, model) + _ODD * number
        low, high = tag & 0xFFF, tag >> 12 & 0xFFF  # as `trailer.trailer_of`, without a call of it
        return 0.0, low, low * low, high, high * high


@functools.cache
def _hash(name: str, channels: int, direction: str, model: int | None) -> int:
    """Return the first tag of a layer's calls in one direction."""
    return zlib.crc32(repr((name, channels, direction, model)).encode())


class Collective(SimpleNamespace, contextlib.AbstractContextManager["Collective"]):
    """The context of one collective call, from its entry to its end.

    It sums vectors over the ranks, raises what their trailers tell of, and names the call in a timeout. After
    an error inside, before the sums have ended, it tells the other ranks, who wait in a sum of vectors of
    `length` numbers: of CuPy if any of `arrays` is, else of NumPy. An error before the first line inside is
    told to nobody, so that neither construction nor entry has a line of its own.
    """

    describe: Callable[[], tuple[Call, ProcessGroup, int, tuple[Any, ...]]]
    """Returns the arguments of `enter`, after an error that came before it."""
    call: Call
    group: ProcessGroup
    needed = 1
    """How many sums the call takes."""
    owes_messages = False
    """Whether, after the first sum, the other ranks wait in messages that no trailer ends."""
    _done = 0
    _length = -1  # not entered yet
    _mailed: tuple[Any, Array] | None = None
    """The trailer of a sum, of CuPy, that the next kernel copies to a mailbox, and that."""

    def enter(self, call: Call, group: ProcessGroup, length: int, arrays: tuple[Any, ...] = ()) -> None:
        """Say what call this is, and in which sum the other ranks wait."""
        self.call, self.group, self._arrays = call, group, arrays
        self._ended_before = group.counter.sums  # first: an error before the next line is one before a sum
        self._done, self.needed = 0, 1
        self._length = length
        if group.problem is not None:
            kind, message = group.problem
            raise kind(message)

    def expect(self, length: int) -> None:
        """Say that the other ranks wait in another sum next."""
        self._length = length

    def trailer(self) -> tuple[float, float, float, float, float]:
        """Return the end of this rank's vector."""
        return self.call.trailer(self.group)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self.fail(error)
        elif self._mailed:
            self._look_behind_kernel()

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks of an error, if they wait for this one, and name the call in a timeout."""
        if self._mailed:  # who knows if the kernel was launched, which writes the same numbers there
            with contextlib.suppress(Exception):  # such as an error of the GPU
                ending, mailbox = self._mailed
                ending.get(out=mailbox, blocking=False)
                self._look_behind_kernel()
        if self._length < 0:
            try:
                self.enter(*self.describe())
            except Exception:  # such as no MPI: the first error may well be the same
                if self._length < 0:
                    return
        if isinstance(error, CollectiveTimeoutError):
            error.call = error.call or self.call
        elif isinstance(error, Exception) and self.group.size > 1:
            done = max(self._done, self.group.counter.sums - self._ended_before)
            if was_heard_by(self.group, error) or self.group.is_given_up:
                return
            if done and self.owes_messages:
                self.group.abandon(error)
            elif done < self.needed:
                self._tell_others(error)

    def sum(self, vector: Array, kernel_follows: bool = False) -> int:
        """Replace `vector` by its sum, and raise the error that its trailer tells of (**collective**).

        Where a GPU has the sum, and the host does not wait for it, the trailer is looked at later. If
        `kernel_follows`, the next kernel copies it to the host, at the address returned, if that is not 0:
        so no copy stands between the two.
        """
        group = self.group
        size = group.size
        if size == 1:
            return 0
        if self._mailed:
            self._look_behind_kernel()
        ending = group.allreduce_checked(vector)[FAULT:]
        self._done += 1
        if type(ending) is not np.ndarray:
            mailbox = group.mailbox() if kernel_follows else None
            if mailbox is None:
                self._raise_fault_later(ending)
                return 0
            self._mailed = ending, mailbox
            return int(mailbox.ctypes.data)
        fault, low, low_square, high, high_square = found = ending.tolist()
        # As `trailer.is_sound`, without a call of it.
        if fault or size * low_square != low * low or size * high_square != high * high:
            error = self._fault(found, details=True)
            _note_hearers(error, group)
            raise error
        return 0

    def _tell_others(self, error: Exception) -> None:
        """Join the sum in which the other ranks wait, with a fault flag: they raise RemoteRankError."""
        group = self.group
        library = next((module for module in map(module_of, self._arrays) if module is not np), np)
        try:
            own = trailer.fault_code(group.rank, group.size), *self.trailer()[1:]
            ending = group.tell_fault(own, self._length, library)[FAULT:]
            _note_hearers(error, group)
            if isinstance(ending, np.ndarray):
                self._fault(ending.tolist(), details=True, own=_FAILED)  # which all ranks look into together
                return
            with contextlib.suppress(RemoteRankError, RankMismatchError):
                self._raise_fault_later(ending)  # by NCCL, where the others may end the sum by an error
        except Exception as late:  # a timeout, or no memory on the GPU for the vector
            if isinstance(late, CollectiveTimeoutError):
                late.call = late.call or self.call
            error.add_note(f"The other ranks did not hear of it: {str(late) or type(late).__name__}")

    def _fault(self, ending: list[float], details: bool, own: str = "") -> RuntimeError:
        """Return the error that a trailer tells of; for `details` the ranks are asked (**collective**)."""
        group, fault = self.group, ending[0]
        asks, own = details and group.asks, own or str(self.call)
        if fault > 0:
            ranks = trailer.faulty_ranks(fault, group.size)
            if not ranks and asks:
                ranks = trailer.describe_ranks(_whereabouts(group, own).get(_FAILED, []))
            return RemoteRankError(f"{ranks or 'some ranks'} failed before {self.call}: see the error there")
        others = _whereabouts(group, own) if asks else {}
        others.pop(_shown(own), None)
        where = " and ".join(
            f"{trailer.describe_ranks(ranks)} {'is' if len(ranks) == 1 else 'are'} in {call}"
            for call, ranks in others.items()
        )
        return RankMismatchError(
            f"rank {group.rank} is in {self.call}, while {where or 'another rank is in another call'}: "
            "all ranks must call the same layers in the same order"
        )

    def _look_behind_kernel(self) -> None:
        """Let the group look at a mailbox, when the kernel has ended that was launched since the sum."""
        assert self._mailed
        (ending, mailbox), self._mailed = self._mailed, None
        self._raise_fault_later(ending, mailbox)

    def _raise_fault_later(self, ending: Array, mailbox: Array | None = None) -> None:
        call, group = self.call, self.group
        group.defer(ending, functools.partial(_check, call, group), call, mailbox)


def _check(call: Call, group: ProcessGroup, ending: list[float]) -> None:
    """Raise the error that the trailer of a sum on the GPU tells of, if any."""
    if not trailer.is_sound(ending, group.size):
        step = Collective(call=call, group=group)
        raise step._fault(ending, details=False)


commit: Callable[[Iterable[object]], object] = functools.partial(deque, maxlen=0)
"""Do what a call has prepared, assignments of complete values that cannot fail: ``commit(map(DO, writes))``.

It is one step of the interpreter, between whose parts no signal can be handled.
"""
DO: Callable[[Any], object] = operator.call


def _note_hearers(error: Exception, group: ProcessGroup) -> None:
    """Note in an error that all ranks of a group raise one now."""
    vars(error).setdefault("_heard_by", []).append(group)


def was_heard_by(group: ProcessGroup, error: Exception) -> bool:
    """Tell whether all ranks of a group have heard of an error."""
    for hearers in vars(error).get("_heard_by", ()):
        with contextlib.suppress(RuntimeError):  # of a group that was freed since
            if group.has_same_ranks(hearers):
                return True
    return False


# What each rank is in, as numbers that add up exactly: six bytes are an integer below 2^48.
_NUMBERS, _BYTES = 40, 6
_ASKING = Call("the ranks' whereabouts", 0, "question", 0)
_FAILED = "a failure"


def _shown(text: str) -> str:
    """Return as much of a text as ranks tell each other."""
    return text.encode()[: _NUMBERS * _BYTES].decode(errors="ignore")


def _whereabouts(group: ProcessGroup, own: str) -> dict[str, list[int]]:
    """Return the ranks by what they are in; nothing if they do not tell (**collective**).

    All ranks that have met in a sum of different calls ask so, and one that has not ends here as well.
    """
    ending = _ASKING.trailer(group)
    try:
        rows = np.zeros(group.size * _NUMBERS + trailer.LENGTH)
        text = _shown(own).encode().ljust(_NUMBERS * _BYTES, b"\0")
        numbers = [int.from_bytes(text[at : at + _BYTES], "big") for at in range(0, len(text), _BYTES)]
        rows[group.rank * _NUMBERS :][:_NUMBERS] = numbers
        rows[FAULT:] = ending
    except MemoryError:  # the others do not wait: this rank has no answer
        group.tell_fault((trailer.fault_code(group.rank, group.size), *ending[1:]), trailer.LENGTH, np)
        return {}
    try:
        total = group.allreduce_checked(rows)
    except CollectiveTimeoutError:
        return {}
    if not trailer.is_sound(total[FAULT:].tolist(), group.size):
        return {}
    ranks: dict[str, list[int]] = {}
    for rank, row in enumerate(total[:FAULT].reshape(group.size, _NUMBERS)):
        said = b"".join(int(number).to_bytes(_BYTES, "big") for number in row)
        ranks.setdefault(said.rstrip(b"\0").decode(errors="ignore"), []).append(rank)
    return ranks
