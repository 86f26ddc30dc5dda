"""One rank's failure is every rank's error, and no rank waits without an end.

fault_cases.py does what is wrong, on real ranks; here is what every rank must raise, how soon, and with what
left unchanged. Mostly the ranks go on afterwards, and train as if nothing had happened, or in a new group.
Then all cases share one launch for each MPI library and number of ranks.
"""

import functools
import json
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from support.launcher import launch, other_python, vendor_of

pytestmark = [pytest.mark.launch, pytest.mark.mpi_skip]

CASES = str(Path(__file__).with_name("fault_cases.py"))
DEADLINE = 120
MARGIN = 2.0
"""Seconds that an error may come after the timeout, or after the fault where no rank is late."""
LAUNCHER_MARGIN = 5.0
"""Seconds that a launcher may take to notice the end of the ranks, and to end itself."""


class Error(NamedTuple):
    """What a rank raises; in the pattern, {last} is the number of the last rank."""

    kind: str
    pattern: str = ""


class Attempt(NamedTuple):
    """What the ranks raise in one call, or None, by their role; where they raise, nothing has changed."""

    faulty: Error | None
    other: Error | None
    spared: Error | None = None
    absent: Error | None = None
    late: Error | None = None
    after_changes: bool = False
    """Whether earlier steps of the same attempt have changed something."""


def remote(call):
    return Error("RemoteRankError", rf"^rank {{last}} failed before {call}: see the error there$")


def mismatch(call):
    return Error("RankMismatchError", f"is in {call}, while another rank is in another call")


def timeout(call):
    return Error("CollectiveTimeoutError", f"{call}.*waited .* s for .* a rank ended, is stuck")


GIVEN_UP = Error("CollectiveTimeoutError", "an earlier exchange on this communicator was given up")
NO_MEMORY = Error("MemoryError", "none left")
STEM = r"stem \(4 channels\)"
FORWARD = f"forward 2 of {STEM}"
BACKWARD = f"backward 2 of {STEM}"

# name: the attempts. The faulty rank's own error; what the others hear of it.
WORLD = {
    "channels": [Attempt(Error("ValueError", "expected 4 channels"), remote(FORWARD))],
    "dtype": [Attempt(Error("TypeError", "float64"), remote(FORWARD))],
    "no_array": [Attempt(Error("TypeError", "list"), remote(FORWARD))],
    "one_dimension": [Attempt(Error("ValueError", "1D input"), remote(FORWARD))],
    "gradient_shape": [Attempt(Error("ValueError", "output's size"), remote(BACKWARD))],
    "gradient_dtype": [Attempt(Error("TypeError", "float16"), remote(BACKWARD))],
    "momentum": [Attempt(Error("ValueError", "momentum"), remote(FORWARD))],
    "first_call": [Attempt(Error("ValueError", "expected 4 channels"), remote(f"forward 0 of {STEM}"))],
    "two_ranks": [
        Attempt(Error("ValueError", "channels"), Error("RemoteRankError", "^ranks 0, {last} failed"))
    ],
    "weight_is_a_list": [Attempt(Error("TypeError", "list"), remote("forward 0 of sync_batch_norm .*"))],
    # Its own error, though nobody hears of it
    "bad_input_and_the_others_absent": [
        Attempt(Error("ValueError", "expected 4 channels.*\nThe other ranks did not hear.*waited"), None)
    ],
    "bad_input_in_one_of_two_groups": [
        Attempt(Error("ValueError", "4 channels"), Error("RemoteRankError", "^rank 1 failed"))
    ],
    "memory_in_statistics": [Attempt(NO_MEMORY, remote(FORWARD))],
    "memory_between_two_exchanges": [Attempt(NO_MEMORY, remote(FORWARD))],
    "memory_in_reduce_gradients": [Attempt(NO_MEMORY, remote(BACKWARD))],
    # After its last exchange a rank cannot tell the others, which go on: from the next exchange on all know.
    "memory_in_normalize": [
        Attempt(NO_MEMORY, None),
        Attempt(mismatch(FORWARD), mismatch(f"forward 3 of {STEM}")),
        Attempt(mismatch(FORWARD), mismatch(f"forward 3 of {STEM}")),
    ],
    "memory_in_input_gradient": [
        Attempt(NO_MEMORY, None),
        Attempt(mismatch(f"forward 3 of {STEM}"), mismatch(f"forward 4 of {STEM}")),
    ],
    "memory_in_averaging": [
        Attempt(NO_MEMORY, timeout("")),
        # The construction of DistributedDataParallel lets its layers count anew.
        Attempt(timeout("introduction .* 0 of stem"), GIVEN_UP),
    ],
    "interrupted_in_statistics": [Attempt(Error("KeyboardInterrupt"), timeout(FORWARD))],
    "interrupted_in_an_exchange": [
        Attempt(Error("KeyboardInterrupt"), timeout(FORWARD)),
        # The messages of the first attempt may be enough for one step.
        Attempt(GIVEN_UP, GIVEN_UP, absent=timeout("forward"), after_changes=True),
    ],
    "num_features": [
        Attempt(mismatch(r"introduction .* stem \(5.*"), mismatch(r"introduction .* stem \(4.*"))
    ],
    "layer_dtype": [
        Attempt(mismatch("introduction with float64 .*"), mismatch("introduction with float32 .*"))
    ],
    "skipped_layer_of_equal_size": [Attempt(mismatch(r"forward 2 of head \(4.*"), mismatch(FORWARD))],
    "skipped_layer_of_other_size": [Attempt(mismatch(r"forward 2 of head \(7.*"), mismatch(FORWARD))],
    "skipped_layer_of_large_size": [Attempt(mismatch(r"forward 2 of head \(30000.*"), mismatch(FORWARD))],
    "skipped_layer_of_larger_size": [Attempt(mismatch(r"forward 2 of head \(40000.*"), mismatch(FORWARD))],
    "skipped_backward": [Attempt(mismatch(f"forward 3 of {STEM}"), mismatch(BACKWARD))],
    "skipped_forward": [Attempt(Error("RuntimeError", "needs a forward"), mismatch(FORWARD))],
    "skipped_forward_in_eval": [Attempt(Error("RuntimeError", "needs a forward"), remote(BACKWARD))],
    "swapped_layers": [Attempt(mismatch("forward 2 of head .*"), mismatch(FORWARD))],
    # Nothing tells layers of one size apart that have no names, before their numbers of calls do.
    "swapped_layers_without_names": [Attempt(None, None)],
    "skipped_layer_without_name": [
        Attempt(
            mismatch("forward 2 of SyncBatchNorm .*"),
            mismatch("forward 3 of SyncBatchNorm .*"),
            after_changes=True,
        )
    ],
    "one_layer_in_eval": [Attempt(mismatch("forward 2 of head .*"), mismatch(FORWARD))],
    "all_layers_in_eval": [Attempt(None, timeout(FORWARD))],
    "gradients_reduced_during_a_backward": [
        Attempt(mismatch("gradients 0 of DistributedDataParallel .*"), mismatch(f"backward 0 of {STEM}"))
    ],
    "different_groups": [Attempt(*2 * [Error("RankMismatchError", r"asks for new_group\(.*, but rank")])],
    "different_modules": [
        Attempt(
            Error("RankMismatchError", r"weight: shape \(5,\), .* here, weight: shape \(4,\), .* there"),
            Error("RankMismatchError", "^rank {last} has another module than rank 0"),
        )
    ],
    "different_buckets": [
        Attempt(
            Error("RankMismatchError", "bucket_cap_mb: 1e-06 here, bucket_cap_mb: 25.0 there"),
            Error("RankMismatchError", "^rank {last} has another module than rank 0"),
        )
    ],
    "gradient_of_integers": [
        Attempt(
            Error("TypeError", r"bias\.grad in floating point"),
            remote("gradients 0 of DistributedDataParallel .*"),
        )
    ],
    "no_member": [Attempt(Error("RuntimeError", "not a member of the group"), None)],
    "absent_in_forward": [Attempt(None, timeout(FORWARD)), Attempt(None, GIVEN_UP)],
    "absent_in_backward": [Attempt(None, timeout(BACKWARD))],
    "absent_in_first_call": [Attempt(None, timeout("introduction .* of stem"))],
    "absent_in_construction": [Attempt(None, timeout("construction 0")), Attempt(None, GIVEN_UP)],
    "absent_in_reduce_gradients": [Attempt(None, timeout("gradients 0")), Attempt(None, GIVEN_UP)],
    "absent_in_broadcast": [Attempt(None, timeout("")), Attempt(None, GIVEN_UP)],
    "absent_in_new_group": [Attempt(None, timeout(""))],
    "absent_in_split_group": [Attempt(None, timeout(""))],
    "absent_in_one_of_two_groups": [Attempt(None, timeout(FORWARD))],
    "absent_and_another_late": [Attempt(None, timeout(FORWARD), late=timeout(FORWARD))],
    "leaves_early": [Attempt(None, timeout(f"forward 6 of {STEM}"), after_changes=True)],
    # Legal
    "vectors_of_all_lengths": [Attempt(None, None)],
    "late": [Attempt(None, None)],
    "no_samples": [Attempt(None, None)],
    "not_a_number": [Attempt(None, None)],
    "any_legal_training": [Attempt(None, None)],
}
ONLY_OF_FOUR = {
    "bad_input_in_one_of_two_groups",
    "absent_in_one_of_two_groups",
    "absent_and_another_late",
}
NOT_PROMPT = {"any_legal_training"}


class Run(NamedTuple):
    """What a launch came to."""

    command: str
    status: int | None
    output: str
    ended: float
    reports: list[list[dict]]
    """Lines by rank."""

    def explain(self, text):
        status = f"did not end within {DEADLINE} s" if self.status is None else f"ended with {self.status}"
        return f"{text}\n{self.command} {status}\n{self.output[-5000:]}"


def run_cases(python, ranks, name=None, *, runner=False, options=()):
    """Launch the cases that the ranks survive, or a fatal one."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["-W", "error", *(["-m", "mpi4py"] if runner else []), CASES, folder]
        arguments += [] if name is None else [name]
        command, status, output = launch(python, ranks, arguments, DEADLINE, *options)
        ended = time.time()
        files = [Path(folder, f"{rank}.jsonl") for rank in range(ranks)]
        lines = [file.read_text().splitlines() if file.exists() else [] for file in files]
    return Run(command, status, output, ended, [[json.loads(line) for line in own] for own in lines])


run_world = functools.cache(run_cases)


def python_of(library):
    return sys.executable if library == "this" else other_python()


def assert_error(error, expected, last):
    """Compare what a rank reports with what it should."""
    if expected is None:
        assert error["error"] is None, error["message"]
        return
    assert error["error"] == expected.kind, error["message"]
    pattern = expected.pattern.replace("{last}", str(last))
    assert re.search(pattern, error["message"], re.DOTALL), error["message"]


def limit(report, expected):
    """Return the seconds within which a rank must have raised this."""
    waits = expected is not None and expected.kind == "CollectiveTimeoutError" and expected != GIVEN_UP
    waits = waits or "did not hear" in report["message"]
    return MARGIN + (report["timeout"] if waits else 0)


@pytest.mark.parametrize("library", ["this", "other"])
@pytest.mark.parametrize(
    ("ranks", "case"),
    [(ranks, case) for ranks in (2, 4) for case in WORLD if ranks == 4 or case not in ONLY_OF_FOUR],
)
def test_every_rank_hears_of_it(case, ranks, library):
    run = run_world(python_of(library), ranks)
    for rank, lines in enumerate(run.reports):
        reports = [line for line in lines if line["case"] == case]
        attempts = [report for report in reports if "error" in report]
        assert len(attempts) == len(WORLD[case]), run.explain(f"rank {rank} did not come to the end")
        for report, attempt in zip(attempts, WORLD[case], strict=True):
            expected = getattr(attempt, report["role"])
            assert_error(report, expected, ranks - 1)
            assert report["seconds"] < limit(report, expected) or case in NOT_PROMPT
            assert expected is None or attempt.after_changes or not report["changed"]
        assert "new_group" in reports[-1], run.explain(f"rank {rank} did not come to the end")
        assert reports[-1]["goes_on"] in (None, "fine")
        assert reports[-1]["new_group"] == "fine"


@pytest.mark.parametrize("library", ["this", "other"])
def test_one_exchange_has_one_timeout(library):
    """A rank that waits for one rank, which is late, and then for another waits no longer in all."""
    run = run_world(python_of(library), 4)
    waits = [
        report["seconds"] / report["timeout"]
        for lines in run.reports
        for report in lines
        if (report["case"], report["role"]) == ("absent_and_another_late", "other") and "error" in report
    ]
    assert len(waits) == 2
    assert max(waits) < 1.6


@pytest.mark.parametrize("library", ["this", "other"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_world_ends_in_peace(ranks, library):
    """What was given up does not keep MPI from ending, and no case is missing above."""
    run = run_world(python_of(library), ranks)
    assert run.status == 0, run.explain("")
    cases = {case for case in WORLD if ranks == 4 or case not in ONLY_OF_FOUR}
    for lines in run.reports:
        assert {line["case"] for line in lines} == cases


# How to launch, so that others live on when a rank is killed; Hydra's option for this kills some of them.
LETS_LIVE = {"Open MPI": ("--enable-recovery", "--continuous")}

USER_ERROR = Error("LookupError", "no such file")

# (name, whether by `python -m mpi4py`): what the faulty rank and the others raise before the launcher or
# mpi4py's runner ends them; ... is what may be, as it depends on the launcher.
FATAL = {
    ("error_before_forward", True): (USER_ERROR, None),
    ("error_before_backward", True): (USER_ERROR, None),
    ("error_in_loader", True): (USER_ERROR, None),
    ("error_before_forward", False): (USER_ERROR, timeout("forward 6 of stem")),
    ("error_before_backward", False): (USER_ERROR, timeout("backward 6 of stem")),
    ("error_in_loader", False): (USER_ERROR, timeout("forward 4 of stem")),
    ("sleeps", True): (None, timeout("backward 6 of stem")),
    ("ends", True): (None, ...),
    ("killed", True): (None, ...),
    ("killed_in_an_exchange", True): (None, ...),
}
"""Where a rank dies, the others are told so by the timeout, and then mpi4py's runner ends them: without it
MPI_Finalize may wait for ever for the dead one, as Open MPI's does at times."""


FATAL_OF_FOUR = {key for key in FATAL if key[1] and key[0][:5] == "error"} | {("error_in_loader", False)}
"""To save time: two ranks would show the same."""


@functools.cache
def run_fatal_cases(python, ranks):
    """Launch all, some at once, as they mostly wait."""
    lets_live = LETS_LIVE.get(vendor_of(python), ())
    with ThreadPoolExecutor(3) as pool:
        runs = {}
        for (name, runner), (_, others) in FATAL.items():
            if ranks == 4 or (name, runner) not in FATAL_OF_FOUR:
                options = lets_live if others is ... else ()
                runs[name, runner] = pool.submit(
                    run_cases, python, ranks, name, runner=runner, options=options
                )
        return {key: run.result() for key, run in runs.items()}


@pytest.mark.parametrize("library", ["this", "other"])
@pytest.mark.parametrize(
    ("ranks", "case", "runner"),
    [(ranks, *key) for ranks in (2, 4) for key in FATAL if ranks == 4 or key not in FATAL_OF_FOUR],
)
def test_all_ranks_end(case, runner, ranks, library):
    python = python_of(library)
    run = run_fatal_cases(python, ranks)[case, runner]
    assert run.status is not None, run.explain("some rank waits for ever")
    own, others = FATAL[case, runner]
    if others is not ...:  # launchers differ in what they call a rank that dies
        assert run.status != 0
    if others is ... and vendor_of(python) in LETS_LIVE:
        assert any("error" in line for lines in run.reports for line in lines), run.explain("nobody heard")
    for rank, lines in enumerate(run.reports):
        starts = [line["starts"] for line in lines if "starts" in line]
        reports = [line for line in lines if "error" in line]
        assert starts, run.explain(f"rank {rank} did not start")
        assert run.ended < starts[0] + lines[0]["timeout"] + MARGIN + LAUNCHER_MARGIN
        expected = own if rank == ranks - 1 else others
        if expected is not ...:
            assert len(reports) == (expected is not None), run.explain(f"rank {rank}")
        for report in reports:
            if expected is ...:
                expected = timeout("(forward|backward) .* of stem")
            assert_error(report, expected, ranks - 1)
            assert report["seconds"] < MARGIN + report["timeout"]
