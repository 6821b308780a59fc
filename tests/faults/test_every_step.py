"""Every statement, every crash: each operation is killed, or meets an error, at each of its steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import strike_scenarios
import strikes

HERE = Path(__file__).resolve().parent

NAMES = list(strike_scenarios.SCENARIOS)
STATEMENT_FAULTS = [fault.name for fault in strikes.STATEMENT_FAULTS]
CALL_FAULTS = [fault.name for fault in strikes.CALL_FAULTS]

#: These are met at every statement, the others at some.
COMPLETE = STATEMENT_FAULTS[:3]

#: Their steps come in an order of their own each time, or are slow, or are among another's: only some are struck.
DRAWN = {"checkpoint": 10, "pipeline": 20, "stop": 20, "worker": 60}


@pytest.fixture
def struck_calls(compiled):
    """The library to preload that fails system calls."""
    return compiled("struck_calls.c")


def harms(place, names, faults, points, **environment):
    """Strike scenarios; what was wrong afterwards."""
    folder = place.folder / f"struck-{len(place.trees)}"
    command = [sys.executable, str(HERE / "strikes.py"), str(folder), ",".join(names), ",".join(faults), str(points), "1"]
    tree = place.start(command, **environment)
    assert tree.wait(600) == 0, tree.tail()
    reports = [json.loads(line) for line in tree.output().splitlines() if line.startswith('{"scenario"')]
    assert [report["scenario"] for report in reports] == list(names)
    return [harm for report in reports for harm in report["harms"]]


def test_at_drawn_statements_nothing_is_lost_and_nothing_breaks(place):
    names = [name for name in NAMES if name not in DRAWN]

    assert harms(place, names, STATEMENT_FAULTS, 1) == []


def test_at_drawn_system_calls_nothing_is_lost_and_nothing_breaks(place, struck_calls):
    names = [name for name in NAMES if name not in DRAWN]

    assert harms(place, names, CALL_FAULTS, 1, LD_PRELOAD=struck_calls) == []


@pytest.mark.torture
@pytest.mark.parametrize("name", NAMES)
def test_at_every_statement_nothing_is_lost_and_nothing_breaks(place, name):
    if name in DRAWN:
        assert harms(place, [name], STATEMENT_FAULTS, DRAWN[name]) == []
    else:
        assert harms(place, [name], COMPLETE, "all") == []
        assert harms(place, [name], STATEMENT_FAULTS[3:], 12) == []


@pytest.mark.torture
@pytest.mark.parametrize("name", NAMES)
def test_at_many_system_calls_nothing_is_lost_and_nothing_breaks(place, struck_calls, name):
    points = "all" if name == "send" else DRAWN.get(name, 24) // 2

    assert harms(place, [name], CALL_FAULTS, points, LD_PRELOAD=struck_calls) == []


@pytest.mark.torture
def test_a_worker_that_once_had_too_many_files_open_goes_on_by_itself(place, struck_calls):
    assert harms(place, ["worker"], ["EMFILE"], "all", LD_PRELOAD=struck_calls) == []
