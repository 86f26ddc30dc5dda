"""Counts instructions in the kernels' machine code, which nvdisasm shows: in the main loop, and around it.

What a block does in a kernel is the entry, as many rounds of the main loop as it has vectors, and the rest.
Counted are the shortest paths: in the loop, the shortest that does all loads, stores and multiply-adds of a
full round; for scripts/benchmarks/gpu_model.py, around it the shortest on which a warp has a channel to
prepare, and one to add up.
"""

from __future__ import annotations

import collections
import heapq
import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from importlib import metadata
from typing import NamedTuple

PACKAGE = "nvidia-cuda-nvdisasm"


class Instruction(NamedTuple):
    """One line of the disassembly."""

    predicate: str
    operation: str
    operands: str


class Block(NamedTuple):
    """Instructions that run one after the other, and the blocks that may follow."""

    instructions: list[Instruction]
    followers: list[int]

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, each.operation)) for each in self.instructions)


class Round(NamedTuple):
    """What a full round of a kernel's main loop does."""

    kernel: str
    vectors: int
    """Per tensor."""
    loads: int
    stores: int
    multiply_adds: int
    stages: int
    """Values a channel that are written to shared memory before."""
    entries: int
    """Pairs of sums a thread that are written there behind."""


class Counts(NamedTuple):
    """Instructions of a warp."""

    loop: float
    """A vector of 16 bytes."""
    entry: int
    """Before the main loop."""
    profile: Profile | None
    """None where there is no such path around the loop."""


class Profile(NamedTuple):
    """What the model is made of, beside the registers."""

    pipes: dict[str, float]
    """Instructions a vector of 16 bytes in the main loop, by pipe."""
    around: int
    """Instructions outside of it, in a block that is not the last of its channels."""
    float64: int
    """Those of them in float64."""
    waits: int
    """Round trips to memory outside of it, one after the other: groups of loads, fences, atomics."""
    row: float | None
    """Instructions for another value of a channel, where a block adds up those of its threads."""
    own: int | None
    """Instructions by which each thread adds up its own values, where they are of one channel."""
    step: int | None
    """Instructions by which two halves of the threads of a channel add up, where their number varies."""


def disassemble(cubin: bytes) -> dict[str, list[Block]]:
    """Return the functions of a compiled file by their mangled names."""
    program = metadata.distribution(PACKAGE).locate_file("nvidia/cu13/bin/nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "-c", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^\.text\.(\S+):$", text, flags=re.MULTILINE)[1:]
    return {name: _blocks(body) for name, body in zip(parts[::2], parts[1::2], strict=True)}


def _blocks(text: str) -> list[Block]:
    """Divide a function at its labels and branches."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+) )?\s*([A-Z][\w.]*)\s*(.*?) ?;", line):
            instructions.append(Instruction(found[1] or "", found[2], found[3]))
        elif re.match(r"\$\w+:", line):
            break  # a function that this one calls
    ends = {i + 1 for i, each in enumerate(instructions) if re.match(r"BRA|EXIT|CALL|RET", each.operation)}
    starts = sorted(start for start in {0, *labels.values(), *ends} if start < len(instructions))
    number = {start: i for i, start in enumerate(starts)}
    blocks = []
    for i, start in enumerate(starts):
        end = starts[i + 1] if i + 1 < len(starts) else len(instructions)
        last = instructions[end - 1]
        followers = []
        if re.match(r"BRA|CALL", last.operation):
            target = re.search(r"\.L_x_\d+", last.operands)
            followers += [number[labels[target[0]]]] if target and labels[target[0]] in number else []
        # A branch may also depend on predicates among its operands. A call without one is of a slow path, and
        # ends here; with one, it is how sm_80 leaves a loop.
        is_conditional = bool(last.predicate) or re.match(r"!?U?P\d", last.operands) is not None
        is_conditional |= last.operation == "BRA.DIV"  # if the warp's threads have diverged
        goes_on = is_conditional or not re.match(r"BRA|EXIT|RET|CALL", last.operation)
        if goes_on and i + 1 < len(starts):
            followers.append(i + 1)
        blocks.append(Block(instructions[start:end], followers))
    return blocks


_ENTRY = r"LDS\.128"
_LOAD, _STORE, _MULTIPLY_ADD = r"LDG\.E(?!.*STRONG).*\.128", r"STG\.E.*\.128", r"[FD]FMA"


def count(blocks: list[Block], full: Round) -> Counts | None:
    """Return the counts of a function whose loop does this in a round; None if none does."""
    heads = {j for i, block in enumerate(blocks) for j in block.followers if j <= i}
    rounds = [(_length(blocks, path), head) for head in heads if (path := _round(blocks, head, full))]
    if not rounds:
        return None
    _, head = min(rounds)
    path = _round(blocks, head, full)
    loop = _length(blocks, path)
    profile = _profile(blocks, head, path, full)
    return Counts(loop / full.vectors, _distances(blocks, 0)[head], profile)


def _round(blocks: list[Block], head: int, full: Round) -> list[int]:
    """Return the shortest path from a block back to it that does all of a round."""
    needs = {_LOAD: full.loads, _STORE: full.stores, _MULTIPLY_ADD: full.multiply_adds}
    return _path(blocks, head, {head}, needs)


def _path(
    blocks: list[Block],
    start: int,
    ends: Collection[int],
    needs: dict[str, int],
    without: str | None = None,
    keep_end: bool = False,
    the_first_end: bool = False,
) -> list[int]:
    """Return the blocks of the shortest path to one of the ends, which it leaves out; or nothing.

    On the path there are at least so many instructions of each pattern, and none of the last one. With
    `keep_end` the end is among the blocks; it may have to be the first end that the path comes to.
    """
    does = [tuple(block.count(pattern) for pattern in needs) for block in blocks]
    enough = tuple(needs.values())
    waiting: list[tuple[int, int, tuple[int, ...], tuple[int, ...]]] = [(0, start, (0,) * len(needs), ())]
    seen = set()
    while waiting:
        length, i, done, path = heapq.heappop(waiting)
        if i in ends and path:
            last = does[i] if keep_end else (0,) * len(needs)
            if all(a + b >= need for a, b, need in zip(done, last, enough, strict=True)):
                return [*path, i] if keep_end else list(path)
            if i == start or the_first_end:
                continue
        if (i, done) in seen or (without and blocks[i].count(without)):
            continue
        seen.add((i, done))
        done = tuple(min(need, a + b) for need, a, b in zip(enough, done, does[i], strict=True))
        for j in blocks[i].followers:
            heapq.heappush(waiting, (length + len(blocks[i].instructions), j, done, (*path, i)))
    return []


_PIPES = {
    "cvt64": r"F2F.*F64",
    "xu": r"(F2F|I2F|F2I|MUFU|FRND)\b",
    "fp32": r"(FADD|FMUL|FFMA)\b",
    "half": r"(HADD2|HMUL2|HFMA2)\b",
    "imad": r"IMAD\b",
    "fp64": r"(DADD|DMUL|DFMA|DSETP|DMNMX)\b",
    "lsu": r"(LDG|STG|LDS|STS|ATOMG|ATOMS|RED|LD|ST)\b",
    "uniform": r"(U[A-Z]|R2UR|VOTEU|S2UR)",
    "control": r"(BRA|BSSY|BSYNC|EXIT|BAR|WARPSYNC|NOP|BMOV|BREAK|CALL|RET)\b",
    "constant": r"(LDC|LDCU|ULDC)\b",
}
"""What each pipe does; "alu" does the rest."""


def pipe_of(operation: str) -> str:
    """Return the pipe that does an operation."""
    return next((pipe for pipe, pattern in _PIPES.items() if re.match(pattern, operation)), "alu")


def _profile(blocks: list[Block], head: int, loop: list[int], full: Round) -> Profile | None:
    pipes = collections.Counter(pipe_of(each.operation) for i in loop for each in blocks[i].instructions)
    outside = [i for i in range(len(blocks)) if i not in loop]
    is_normalize, adds_up = full.kernel == "normalize", full.kernel in ("statistics", "reduce_gradients")
    # A warp that has a channel writes its constants to shared memory, for all. In a forward they are of five
    # sums, and perhaps of the five numbers behind these; running statistics are left out.
    needs, without = {"STS": full.stages, "BAR": int(full.stages > 0)}, None
    if is_normalize:
        sums, without = r"LDG\.E\.64.*CONSTANT", r"LDG(?!.*CONSTANT)(?!.*\.128)|ATOMG"
        needs[r"LDG\.E\.(U16\.)?CONSTANT"] = 2
        entry = _path(blocks, 0, {head}, needs | {sums: 10}, without)
        entry = entry or _path(blocks, 0, {head}, needs | {sums: 5}, without)
    else:
        entry = _path(blocks, 0, {head}, needs)
    ends = {i for i in outside if blocks[i].count("EXIT")}
    rest = _path(blocks, head, ends, {})
    own = step = row = None
    if adds_up:  # up to the barrier behind the entries, to the one behind the sums of a channel, and on
        barriers = {i for i in outside if blocks[i].count("BAR")}

        def up_to_barrier(start: int, needs: dict[str, int], the_next: bool = True) -> list[int]:
            return _path(blocks, start, barriers - {start}, needs, keep_end=True, the_first_end=the_next)

        own_barriers = 3 if full.kernel == "statistics" else 1  # that of the entries, and the pivots' two
        before = up_to_barrier(head, {r"STS\.128": full.entries, "BAR": own_barriers}, the_next=False)
        if not before:
            return None
        sums, one_step, two_steps = (up_to_barrier(before[-1], {_ENTRY: 1, "SHFL": 4 * n}) for n in range(3))
        behind = sums and _path(blocks, sums[-1], ends, {"BAR": 2, "MEMBAR": 1, "ATOMG": 1})
        if not behind:
            return None
        rest = [*before[:-1], *sums[:-1], *behind]
        own = _own(blocks, outside, full.entries)
        step = _length(blocks, two_steps) - _length(blocks, one_step)
        row = _row(blocks, set(outside))
    if not entry or not rest:
        return None
    around = [each for i in (*entry, *rest) for each in blocks[i].instructions]
    return Profile(
        {pipe: number / full.vectors for pipe, number in sorted(pipes.items())},
        len(around),
        sum(pipe_of(each.operation) in ("fp64", "cvt64") for each in around),
        sum(_waits([each for i in part for each in blocks[i].instructions]) for part in (entry, rest)),
        row,
        own,
        step,
    )


def _own(blocks: list[Block], outside: list[int], entries: int) -> int:
    """Return the instructions of the block in which a thread adds up its entries; 0 if all do that."""
    sums = 2 * (entries - 1)
    found = (blocks[i] for i in outside if sums and not blocks[i].count("LDG"))
    does = (b for b in found if b.count("DADD") >= sums and b.count(r"STS\.128") == 1)
    return min((len(b.instructions) for b in does), default=0)


def _length(blocks: list[Block], path: list[int]) -> int:
    return sum(len(blocks[i].instructions) for i in path)


def _waits(instructions: list[Instruction]) -> int:
    """Return how often a path waits for memory: at a fence, an atomic, or the first use of loaded values.

    Loads of the main loop that the path leads past load nothing there: others write to their registers. What
    is loaded before the loop and used behind it is waited for in the loop, if at all.
    """
    waits, loaded = 0, set[str]()
    for each in instructions:
        first, *others = (re.findall(r"\bR\d+", operand) for operand in each.operands.split(", "))
        is_store = re.match("ST", each.operation)
        used = {register for operand in others + [first] * bool(is_store) for register in operand}
        if re.match("MEMBAR|ATOMG", each.operation):
            waits += 1
        elif loaded & used:
            waits += 1
            loaded.clear()
        if not is_store:
            loaded -= set(first)
        if re.match("LDG", each.operation):
            loaded.update(first)
    return waits


def _row(blocks: list[Block], outside: set[int]) -> float | None:
    """Return the fewest instructions of a loop behind the main one for each entry in shared memory."""
    found = []
    for head in {j for i in outside for j in blocks[i].followers if j <= i and j in outside}:
        path = _path(blocks, head, {head}, {_ENTRY: 1})
        if path and outside.issuperset(path) and not any(blocks[i].count("BAR|LDG") for i in path):
            entries = sum(blocks[i].count(_ENTRY) for i in path)
            found.append(_length(blocks, path) / entries)
    return min(found, default=None)


def _distances(blocks: list[Block], start: int) -> dict[int, int]:
    """Return the fewest instructions from the beginning of a block to those of the others."""
    found: dict[int, int] = {}
    waiting = [(0, start)]
    while waiting:
        distance, i = heapq.heappop(waiting)
        if i in found:
            continue
        found[i] = distance
        for j in blocks[i].followers:
            heapq.heappush(waiting, (distance + len(blocks[i].instructions), j))
    return found


def round_of(name: str) -> Round | None:
    """Return what a kernel's loop does in a round, by its name; None if it reads no vectors."""
    match = re.match(r"(\w+)<(\w+), (\d+), (true|false)(?:, (true|false), (\w+))?>", name)
    if match is None or match[3] == "1":
        return None
    kernel, _, width, _, residual, activation = match.groups()
    has_residual = residual == "true"
    computes_mask = residual == "false" and activation in ("RELU", "LEAKY_RELU")
    # walk's UNROLL, and the tensors that are read and written: see the kernels.
    vectors = 4 if kernel == "statistics" or (kernel == "normalize" and not has_residual) else 2
    reads = {"statistics": 1, "normalize": 1 + has_residual}.get(kernel, 2)
    writes = {"statistics": 0, "reduce_gradients": int(has_residual)}.get(kernel, 1)
    adds = 1 + (computes_mask and kernel in ("reduce_gradients", "input_gradient"))
    columns = match[4] == "true"
    stages = {
        "statistics": 0,
        "normalize": 3,
        "reduce_gradients": 2 + computes_mask,
        "input_gradient": 2 + computes_mask + 2,
    }[kernel]
    entries = int(width) if columns else 1
    return Round(
        kernel, vectors, vectors * reads, vectors * writes, vectors * int(width) * adds, stages, entries
    )


def counts(cubin: bytes, names: dict[str, str]) -> Iterator[tuple[str, Counts | None]]:
    """Yield the counts of kernels, which are given by their mangled names."""
    functions = disassemble(cubin)
    for mangled, name in names.items():
        full = round_of(name)
        yield name, None if full is None else count(functions[mangled], full)
