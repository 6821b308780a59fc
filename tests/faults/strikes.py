"""Runs an operation of dramalite again and again, struck each time at another of its steps.

    python strikes.py FOLDER SCENARIOS FAULTS POINTS SEED

A step is a statement, executed by any connection, or (with struck_calls.c preloaded) a system
call on the database's files.  Each time one process does what the scenario says and meets the
fault at its k-th step: for k = 1, 2, ... until it gets through unharmed, if POINTS is "all", else
at so many drawn steps.  Then another process looks at what is left, lets a worker finish it and
looks again.  What is wrong is printed at the end, one line of JSON for each scenario.

This process itself has no threads and opens no database, so that it may fork.
"""

from __future__ import annotations

import array  # noqa: F401  (What the processes would import one by one.)
import contextlib
import ctypes
import hashlib  # noqa: F401
import itertools
import json
import logging
import mmap  # noqa: F401
import os
import random
import select
import shutil
import signal
import socket  # noqa: F401
import sqlite3
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator

#: Seconds within which any of the processes must be done.
PATIENCE_S = 30

#: Steps that an operation may have at most: a loop that finds more does not end.
MOST_STEPS = 20_000

NEVER = 10**9
HUNG = -1


# Faults


@dataclass(frozen=True)
class Fault:
    """What happens at a step."""

    name: str
    kills: bool = False
    after: bool = False  # Once the step is done, and not before; where that leaves no transaction open.
    error: str = ""  # What sqlite3 says.
    rolls_back: bool = False  # As SQLite does by itself on some errors.
    calls: int = 0  # Kinds of system calls that count; 0 for statements.
    action: int = 0  # What struck_calls.c is to do: an error number, or less than 0.
    lasts: bool = False  # From the step on, until disarmed.
    is_seen: bool = True  # Whether anybody may notice.


WRITE, READ, SYNC, TRUNCATE, OPEN, MAP, LOCK, UNLINK = (1 << bit for bit in range(8))
KILL_BEFORE, KILL_AFTER, KILL_HALFWAY, HALF_THEN_FULL = -1, -2, -3, -4
ENOMEM, EIO, EAGAIN, EMFILE, ENOSPC = 12, 5, 11, 24, 28

STATEMENT_FAULTS = (
    Fault("kill before statement", kills=True),
    Fault("kill after statement", kills=True, after=True),
    Fault("statement finds disk full", error="database or disk is full", rolls_back=True),
    Fault("statement meets I/O error", error="disk I/O error"),
    Fault("statement finds lock", error="database is locked"),
)
CALL_FAULTS = (
    Fault("kill before call", kills=True, calls=WRITE | SYNC | TRUNCATE | UNLINK, action=KILL_BEFORE),
    Fault("kill after call", kills=True, calls=WRITE | SYNC | TRUNCATE | UNLINK, action=KILL_AFTER),
    Fault("kill halfway through write", kills=True, calls=WRITE, action=KILL_HALFWAY),
    Fault("EIO", calls=WRITE | SYNC | TRUNCATE, action=EIO),
    Fault("EIO for good", calls=WRITE | SYNC | TRUNCATE, action=EIO, lasts=True),
    Fault("EIO from read", calls=READ, action=EIO),
    Fault("ENOSPC", calls=WRITE, action=ENOSPC),
    Fault("ENOSPC halfway and for good", calls=WRITE, action=HALF_THEN_FULL, lasts=True),
    Fault("EMFILE", calls=OPEN, action=EMFILE),
    Fault("EMFILE for good", calls=OPEN, action=EMFILE, lasts=True),
    Fault("ENOMEM", calls=MAP, action=ENOMEM),
    Fault("lock is taken", calls=LOCK, action=EAGAIN, is_seen=False),
)
FAULTS = {fault.name: fault for fault in (*STATEMENT_FAULTS, *CALL_FAULTS)}


class Strike:
    """Counts steps once it is armed, and does what the fault says at the k-th."""

    def __init__(self, fault: Fault, at: int, journal: Journal):
        self._fault = fault
        self._at = at
        self._journal = journal
        self._numbers = itertools.count(1)
        self._is_armed = False
        self._seen = 0
        if not fault.calls:
            connect = sqlite3.connect
            sqlite3.connect = lambda *args, **options: connect(  # type: ignore[assignment]
                *args, factory=lambda *a, **o: _StruckConnection(self, *a, **o), **options
            )

    def arm(self) -> None:
        if self._fault.calls:
            fault = self._fault
            ctypes.CDLL(None).struck_arm(fault.calls, self._at, fault.action, int(fault.lasts))
        self._is_armed = True

    def disarm(self) -> None:
        if self._is_armed and self._fault.calls:
            self._seen = ctypes.CDLL(None).struck_disarm()
        self._is_armed = False

    @property
    def seen(self) -> int:
        """How many steps there were."""
        return self._seen

    def around(self, connection: sqlite3.Connection, what: str, step: Callable[[], Any]) -> Any:
        """Do a step of a connection, which may be the one."""
        if not self._is_armed or self._fault.calls:
            return step()
        if self._fault.after and (what.startswith("BEGIN") or (connection.in_transaction and what != "COMMIT")):
            return step()  # Killed after it is killed before the next.
        number = self._seen = next(self._numbers)
        if number != self._at:
            return step()
        self._journal.note("struck", " ".join(what.split())[:100])
        if self._fault.kills:
            if self._fault.after:
                step()
            os.kill(os.getpid(), signal.SIGKILL)
        if self._fault.rolls_back and connection.in_transaction:
            sqlite3.Connection.execute(connection, "ROLLBACK")
        raise sqlite3.OperationalError(self._fault.error)


class _StruckConnection(sqlite3.Connection):
    def __init__(self, strike: Strike, *args: Any, **options: Any):
        self._strike = strike
        super().__init__(*args, **options)

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        step = super().execute
        return self._strike.around(self, statement, lambda: step(statement, *values))

    def executemany(self, statement: str, rows: Any) -> sqlite3.Cursor:
        step = super().executemany
        return self._strike.around(self, statement, lambda: step(statement, rows))

    def close(self) -> None:
        return self._strike.around(self, "close", super().close)


# Processes and what they tell


class Journal:
    """Lines that survive the end of whoever writes them."""

    def __init__(self, path: Path):
        self._path = path
        path.touch()

    def note(self, *words: Any) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, ("\t".join(map(str, words)) + "\n").encode())
        finally:
            os.close(descriptor)

    def lines(self) -> list[list[str]]:
        return [line.split("\t") for line in self._path.read_text("utf-8").splitlines()]

    def noted(self, word: str) -> list[str]:
        """What was noted after a word, in order."""
        return [line[1] for line in self.lines() if line[0] == word]


def in_child(work: Callable[[], object]) -> int:
    """Do some work in a forked process; its status as os.waitpid() gives it, HUNG if it took too long."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    descriptor = os.pidfd_open(child)
    try:
        is_done = bool(select.select([descriptor], [], [], PATIENCE_S)[0])
        if not is_done:
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        return status if is_done else HUNG
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    logging.getLogger().addHandler(handler)
    yield
    logging.getLogger().removeHandler(handler)
    handler.close()


# The loop


class Runner:
    """Strikes one scenario, each time in a copy of what it prepared."""

    def __init__(self, folder: Path, scenario: Any):
        self._place = folder / "place"
        self._scenario = scenario
        self._template = folder / "template"
        self._template.mkdir(parents=True)
        status = in_child(lambda: scenario.make(self._template))
        if status != (signal.SIGKILL if scenario.is_killed_first else 0):
            raise SystemExit(f"{scenario.name} could not be prepared: status {status}.")
        self.points = 0
        self.harms: list[str] = []

    def run_all(self, fault: Fault) -> None:
        """Strike at each step, until there is no further one."""
        for at in range(1, MOST_STEPS):
            if self._strike(fault, at) < at:
                return
        raise SystemExit(f"{self._scenario.name} has no end.")

    def run_some(self, faults: list[Fault], points: int, draw: random.Random) -> None:
        """Strike at so many steps, drawn with their faults."""
        steps: dict[Any, int] = {}
        for _ in range(points):
            fault = draw.choice(faults)
            what_counts = (fault.calls, fault.after)
            if what_counts not in steps:
                steps[what_counts] = self._strike(fault, NEVER)
            self._strike(fault, draw.randint(1, max(1, steps[what_counts])))

    def _strike(self, fault: Fault, at: int) -> int:
        """Strike once; how many steps there were, `at` if the process was killed there."""
        self.points += 1
        shutil.copytree(self._template, self._place)
        journal = Journal(self._place / "journal")
        with logging_to(self._place / "log"):
            struck = in_child(lambda: self._scenario.do(self._place, fault, at))
            steps = [int(number) for number in journal.noted("steps")]
            was_killed = fault.kills and struck == signal.SIGKILL
            if struck and not was_killed:
                journal.note("harm", f"the struck process ended with status {struck}")
            finished = in_child(lambda: self._scenario.finish(self._place, fault))
            if finished:
                journal.note("harm", f"the process that finished its work ended with status {finished}")
        self._tell(fault, at, journal)
        shutil.rmtree(self._place)
        return at if was_killed else sum(steps)

    def _tell(self, fault: Fault, at: int, journal: Journal) -> None:
        where = "".join(f" ({what})" for what in journal.noted("struck"))
        point = "unharmed" if at == NEVER else f"{fault.name} {at}{where}"
        self.harms += [f"{self._scenario.name}, {point}: {harm}" for harm in journal.noted("harm")]


def main(folder: str, names: str, wanted: str, points: str, seed: str) -> None:
    import strike_scenarios  # Which imports this module by its name.

    draw = random.Random(seed)
    faults = [FAULTS[name] for name in wanted.split(",")]
    for name in names.split(","):
        runner = Runner(Path(folder) / name.replace(" ", "_"), strike_scenarios.SCENARIOS[name])
        if points == "all":
            for fault in faults:
                runner.run_all(fault)
        else:
            runner.run_some(faults, int(points), draw)
        print(json.dumps({"scenario": name, "points": runner.points, "harms": runner.harms}), flush=True)


if __name__ == "__main__":
    sys.modules["strikes"] = sys.modules["__main__"]
    main(*sys.argv[1:])
