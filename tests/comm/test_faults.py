"""One rank's failure is every rank's error, and no rank waits without an end.

fault_cases.py does what is wrong, on real ranks, and says what every rank must raise. Here that is compared
with what they raised, how soon, and with what left unchanged. Mostly the ranks go on afterwards, and train as
if nothing had happened, or in a new group. Then all cases share one launch for each MPI library and number of
ranks, and for each way to place them on nodes, where all sums go by lanes.
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

import fault_cases
import pytest
from fault_cases import CASES, FATAL, GIVEN_UP, timeout

from support.launcher import launch, other_python, vendor_of
from support.nodes import NODES

pytestmark = [pytest.mark.launch, pytest.mark.mpi_skip]

PROGRAM = fault_cases.__file__
PLACES = {"lanes": "0011", "lanes, 3 + 1": "0001", "lanes, round robin": "0101"}
"""The nodes of four ranks of this library."""
DEADLINE = 120
MARGIN = 2.0
"""Seconds that an error may come after the timeout, or after the fault where no rank is late."""
LAUNCHER_MARGIN = 5.0
"""Seconds that a launcher may take to notice the end of the ranks, and to end itself."""


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


def run_cases(python, ranks, name=None, *, runner=False, options=(), **variables):
    """Launch the cases that the ranks survive, or a fatal one."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["-W", "error", *(["-m", "mpi4py"] if runner else []), PROGRAM, folder]
        arguments += [] if name is None else [name]
        command, status, output = launch(python, ranks, arguments, DEADLINE, *options, **variables)
        ended = time.time()
        files = [Path(folder, f"{rank}.jsonl") for rank in range(ranks)]
        lines = [file.read_text().splitlines() if file.exists() else [] for file in files]
    return Run(command, status, output, ended, [[json.loads(line) for line in own] for own in lines])


@pytest.fixture(scope="module")
def world_of(request):
    """Return a function of library and number of ranks that returns what came of all cases tried there.

    The launches that the chosen tests need run two at a time, as they mostly wait.
    """
    needed = {}  # in their order
    for item in request.session.items:
        if "world_of" in getattr(item, "fixturenames", ()):
            given = item.callspec.params
            for key in given.get("columns") or [(given["library"], given.get("ranks", 4))]:
                needed[key] = None
    with ThreadPoolExecutor(2) as pool:
        runs = {
            (library, ranks): pool.submit(
                run_cases,
                python_of(library),
                ranks,
                "pairs" if (library, ranks) == ("other", 2) else None,
                **variables_of(library),
            )
            for library, ranks in needed
        }
        yield lambda library, ranks: runs[library, ranks].result()


def python_of(library):
    return other_python() if library == "other" else sys.executable


def variables_of(library):
    return {NODES: PLACES[library]} if library in PLACES else {}


def assert_error(error, expected, last):
    """Compare what a rank reports with what it should."""
    if expected is ...:
        return
    if expected is None:
        assert error["error"] is None, error["message"]
        return
    assert error["error"] == expected.kind, error["message"]
    pattern = expected.pattern.replace("{last}", str(last))
    assert re.search(pattern, error["message"], re.DOTALL), error["message"]


def limit(report, expected):
    """Return the seconds within which a rank must have raised this."""
    waits = expected not in (None, ...) and expected.kind == "CollectiveTimeoutError" and expected != GIVEN_UP
    waits = waits or "did not hear" in report["message"]
    return MARGIN + (report["timeout"] if waits else 0)


COLUMNS = [*((library, ranks) for library in ("this", "other") for ranks in (2, 4)), ("lanes", 4)]


def is_tried(case, ranks, library):
    """Tell whether a case is run on some ranks: on two of the other library only if it is for two alone."""
    return ranks in case.ranks and (library == "this" or ranks > 2 or case.is_for_two_alone)


@pytest.mark.parametrize(
    ("ranks", "case", "library"),
    [
        (ranks, name, library)
        for library, ranks in COLUMNS
        for name, case in CASES.items()
        if is_tried(case, ranks, library)
    ],
)
def test_every_rank_hears_of_it(world_of, case, ranks, library):
    check_case(world_of(library, ranks), case, ranks)


@pytest.mark.long
@pytest.mark.parametrize("library", [place for place in PLACES if place != "lanes"])
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if 4 in case.ranks])
def test_every_rank_hears_of_it_wherever_it_is(world_of, case, library):
    check_case(world_of(library, 4), case, 4)


def check_case(run, case, ranks):
    for rank, lines in enumerate(run.reports):
        reports = [line for line in lines if line["case"] == case]
        attempts = [report for report in reports if "error" in report]
        assert len(attempts) == len(CASES[case].attempts), run.explain(f"rank {rank} did not come to the end")
        for report, attempt in zip(attempts, CASES[case].attempts, strict=True):
            expected = getattr(attempt, report["role"])
            assert_error(report, expected, ranks - 1)
            assert expected is ... or report["seconds"] < limit(report, expected) or not CASES[case].prompt
            assert expected in (None, ...) or attempt.after_changes or not report["changed"]
        assert "new_group" in reports[-1], run.explain(f"rank {rank} did not come to the end")
        assert reports[-1]["goes_on"] in (None, "fine")
        assert reports[-1]["new_group"] == "fine"


@pytest.mark.parametrize("library", ["this", "other", "lanes"])
def test_one_exchange_has_one_timeout(world_of, library):
    """A rank that waits for one rank, which is late, and then for another waits no longer in all."""
    run = world_of(library, 4)
    waits = [
        report["seconds"] / report["timeout"]
        for lines in run.reports
        for report in lines
        if (report["case"], report["role"]) == ("absent_and_another_late", "other") and "error" in report
    ]
    assert len(waits) == 2
    assert max(waits) < 1.6


@pytest.mark.parametrize(("library", "ranks"), COLUMNS)
def test_world_ends_in_peace(world_of, ranks, library):
    """What was given up does not keep MPI from ending, and every case was run."""
    run = world_of(library, ranks)
    assert run.status == 0, run.explain("")
    cases = {name for name, case in CASES.items() if is_tried(case, ranks, library)}
    for lines in run.reports:
        assert {line["case"] for line in lines} == cases


# How to launch, so that others live on when a rank is killed; Hydra's option for this kills some of them.
LETS_LIVE = {"Open MPI": ("--enable-recovery", "--continuous")}

ENDINGS = {(name, ending.runner): ending for name, (_, endings) in FATAL.items() for ending in endings}
"""Where a rank dies, the others are told so by the timeout, and then mpi4py's runner ends them: without it
MPI_Finalize may wait for ever for the dead one, as Open MPI's does at times."""


def is_run(ending, ranks, library):
    """Tell whether an ending is run on some ranks: on four of the other library only if it takes four."""
    if library in PLACES:
        return ranks == 4 and ending.runner
    return ranks >= ending.ranks and (library == "this" or ranks in (2, ending.ranks))


@functools.cache
def run_fatal_cases(library, ranks):
    """Launch all, some at once, as they mostly wait."""
    python = python_of(library)
    lets_live = LETS_LIVE.get(vendor_of(python), ())
    with ThreadPoolExecutor(3) as pool:
        runs = {}
        for (name, runner), ending in ENDINGS.items():
            if is_run(ending, ranks, library):
                options = lets_live if ending.other is ... else ()
                runs[name, runner] = pool.submit(
                    run_cases, python, ranks, name, runner=runner, options=options, **variables_of(library)
                )
        return {key: run.result() for key, run in runs.items()}


@pytest.mark.parametrize(
    ("ranks", "case", "runner", "library"),
    [
        pytest.param(ranks, *key, library, marks=[pytest.mark.long] * (ranks == 4 and library != "this"))
        for library, ranks in COLUMNS
        for key, ending in ENDINGS.items()
        if is_run(ending, ranks, library)
    ],
)
def test_all_ranks_end(case, runner, ranks, library):
    python = python_of(library)
    run = run_fatal_cases(library, ranks)[case, runner]
    assert run.status is not None, run.explain("some rank waits for ever")
    own, others = ENDINGS[case, runner][:2]
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


@pytest.mark.long
@pytest.mark.parametrize("library", ["this", "other"])
def test_nothing_changes_for_long_after_a_timeout(library):
    run = run_cases(python_of(library), 2, CUPY_SYNCBN_TEST_REST="10")
    for lines in run.reports:
        reports = [line for line in lines if line["case"] == "comes_late" and "error" in line]
        assert reports[-1]["message"] == "rested", run.explain("it did not come to its rest")
        assert not reports[-1]["changed"]


@pytest.mark.long
@pytest.mark.parametrize(
    "columns", [[*COLUMNS, *((place, 4) for place in PLACES if place != "lanes")]], ids=["all"]
)
def test_table_of_what_came_of_each_case(world_of, columns):
    """Print it, kind by kind: whether every rank raised what it should, by library and number of ranks."""
    names = {"this": vendor_of(sys.executable), "other": vendor_of(python_of("other"))}
    print("", *(f"{names.get(library, library)} {ranks}" for library, ranks in columns), sep=" | ")
    wrong = []
    for name, case in CASES.items():
        row = []
        for library, ranks in columns:
            if not is_tried(case, ranks, library):
                row.append("")
                continue
            try:
                check_case(world_of(library, ranks), name, ranks)
                row.append("as promised")
            except AssertionError:
                row.append("not so")
                wrong.append((name, library, ranks))
        print(name, *row, sep=" | ")
    assert not wrong
