"""What the scenarios share: figures, processes, waits with deadlines, and watching a queue."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

#: Seconds after which a wait for anything gives up.
PATIENCE_S = 120.0

#: Seconds a process gets to end after SIGTERM before it is killed.
_GRACE_S = 15.0

#: Microseconds that json.dumps of a message took on the machine that the targets were set on.
TARGET_DUMPS_US = 4.2


class BenchError(Exception):
    """A scenario could not be measured; the text says why."""


class Unseen(BenchError):
    """Nobody looked while it went on: it was too fast, or the machine paused."""


class Skipped(Exception):
    """A scenario cannot run on this machine; the text says what is missing."""


# ------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """How much of everything a run measures.

    `meet_s` is the time that senders and a worker that start together get to find each other,
    `settle_s` that which a worker gets to come to rest.
    """

    sends_full: int
    sends_normal: int
    thread_sends: int
    bulk: int
    drain: int
    memory_drain: int
    coroutines: int
    produced_full: int
    produced_normal: int
    latency_samples: int
    meet_s: float
    idle_s: float
    settle_s: float
    memory_jobs: int
    imports: int
    refills: int
    window: int
    backlogs: tuple[int, ...]
    late: int
    urgent: int
    urgent_naps: int
    urgent_noops: int
    simulated: int
    peer_sends: int
    peer_drain: int


FULL_SIZES = Sizes(
    sends_full=3_000,
    sends_normal=20_000,
    thread_sends=1_500,
    bulk=20_000,
    drain=100_000,
    memory_drain=50_000,
    coroutines=1_000,
    produced_full=12_000,
    produced_normal=40_000,
    latency_samples=300,
    meet_s=1.5,
    idle_s=20.0,
    settle_s=5.0,
    memory_jobs=100,
    imports=15,
    refills=30,
    window=30_000,
    backlogs=(100_000, 1_000_000),
    late=20_000,
    urgent=150,
    urgent_naps=4_000,
    urgent_noops=200_000,
    simulated=2_000,
    peer_sends=3_000,
    peer_drain=6_000,
)

QUICK_SIZES = Sizes(
    sends_full=50,
    sends_normal=300,
    thread_sends=10,
    bulk=1_000,
    drain=3_000,
    memory_drain=2_000,
    coroutines=100,
    produced_full=60,
    produced_normal=300,
    latency_samples=10,
    meet_s=0.0,
    idle_s=1.0,
    settle_s=0.5,
    memory_jobs=20,
    imports=3,
    refills=3,
    window=3_000,
    backlogs=(5_000, 10_000),
    late=200,
    urgent=10,
    urgent_naps=200,
    urgent_noops=5_000,
    simulated=50,
    peer_sends=200,
    peer_drain=1_000,
)


class Pace:
    """How slow this interpreter is while something is measured, beside that of the targets."""

    def __init__(self) -> None:
        self._readings: list[float] = []

    def read(self) -> None:
        """Measure json.dumps; call it before and after what is measured."""
        self._readings.append(dumps_us() / TARGET_DUMPS_US)

    def slowness(self) -> float:
        """The mean of the readings since the last call, and of the one before; 2 is half as fast."""
        mean = statistics.mean(self._readings)
        del self._readings[:-1]
        return mean


@dataclass(frozen=True)
class Run:
    """What a scenario is given: its sizes, how often to measure everything, and the pace."""

    sizes: Sizes
    repeat: int
    pace: Pace = field(default_factory=Pace)

    def repeats(self) -> Iterator[int]:
        """The numbers of the repeats; reads the pace before each and after the last."""
        self.pace.read()
        for number in range(self.repeat):
            yield number
            self.pace.read()


# ------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What a figure's median is held against: `at_least` or `at_most`, whichever is set."""

    at_least: float | None = None
    at_most: float | None = None

    def reached_by(self, value: float) -> bool:
        """Whether `value` is good enough."""
        low_enough = self.at_most is None or value <= self.at_most
        return low_enough and (self.at_least is None or value >= self.at_least)


@dataclass(frozen=True)
class Figure:
    """One line of the output: the same quantity measured once per repeat."""

    name: str
    unit: str
    values: Sequence[float]
    target: Target | None = None
    note: str = ""
    slowness: float = 1.0

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def at_target_pace(self) -> float:
        """The median as it would be where json.dumps takes what it took for the targets."""
        return self.median * self.slowness ** _BY_SLOWNESS.get(self.unit, 0)

    @property
    def reached(self) -> bool | None:
        """Whether the median reaches the target; None without a target."""
        return None if self.target is None else self.target.reached_by(self.median)

    @property
    def reached_at_target_pace(self) -> bool | None:
        """Whether the target is reached, the machine's pace allowed for; None without a target."""
        return None if self.target is None else self.target.reached_by(self.at_target_pace)

    def as_dict(self) -> dict[str, object]:
        """The figure as JSON has it."""
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "values": list(self.values),
            "at_least": self.target.at_least if self.target else None,
            "at_most": self.target.at_most if self.target else None,
            "reached": self.reached,
            "slowness": self.slowness,
            "at_target_pace": self.at_target_pace,
            "reached_at_target_pace": self.reached_at_target_pace,
            "note": self.note,
        }

    def as_line(self) -> str:
        """The figure as a line of text: median, spread, target, verdict."""
        spread = f"({_number(min(self.values), self.unit)}..{_number(max(self.values), self.unit)})"
        line = f"  {self.name:<58} {_number(self.median, self.unit):>9} {self.unit:<6} {spread:<22}"
        return f"{line} {self._verdict()}{self._remark()}".rstrip()

    def _verdict(self) -> str:
        if self.target is None:
            return ""
        bound, sign = self.target.at_least, ">="
        if bound is None:
            bound, sign = self.target.at_most, "<="
        assert bound is not None  # A Target has one of the two.
        text = f"target {sign} {_number(bound, self.unit)}: {'reached' if self.reached else 'MISSED'}"
        if self.reached == self.reached_at_target_pace:
            return text
        word = "reached" if self.reached_at_target_pace else "MISSED"
        return f"{text}, at the targets' pace {_number(self.at_target_pace, self.unit)}: {word}"

    def _remark(self) -> str:
        return f"  [{self.note}]" if self.note else ""


#: Digits after the decimal point, by unit; rates get none.
_DIGITS = {"x": 2, "s": 2, "ms": 2, "%": 3, "MB": 1, "/s": 0, "files": 0}

#: How a figure goes with the interpreter's slowness, by unit: others don't.
_BY_SLOWNESS = {"/s": 1, "s": -1, "ms": -1, "%": -1}


def _number(value: float, unit: str) -> str:
    return f"{value:,.{_DIGITS[unit]}f}"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours over theirs, pair by pair: each pair was measured in succession."""
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of `values`."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


# ------------------------------------------------------------------------------------------
# Waiting
# ------------------------------------------------------------------------------------------


def wait_until(
    condition: Callable[[], bool], what: str, *, pause_s: float = 0.01, limit_s: float = PATIENCE_S
) -> None:
    """Look at `condition` every `pause_s` until it is true; BenchError after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"Gave up after {limit_s:.0f} s waiting for {what}.")
        time.sleep(pause_s)


@dataclass(frozen=True)
class Sight:
    """How many messages were done when somebody looked."""

    done: int
    at: float


def watch(done: Callable[[], int], count: int, *, pause_s: float = 0.01) -> Sight:
    """Wait until at least `count` messages are done; returns what was seen then."""
    seen: list[Sight] = []

    def look() -> bool:
        now = time.perf_counter()
        seen[:] = [Sight(done(), now)]
        return seen[0].done >= count

    wait_until(look, f"{count:,} messages to be done", pause_s=pause_s)
    return seen[0]


def rate_between(first: Sight, last: Sight) -> float:
    """Messages a second from one sight to the other."""
    if last.done <= first.done:
        raise Unseen("The queue drained between two looks: too few messages to measure.")
    return (last.done - first.done) / (last.at - first.at)


def drain_rate(done: Callable[[], int], total: int, *, pause_s: float = 0.01) -> float:
    """Messages a second between 5 % and 95 % of `total` done; returns when all are done."""
    first = watch(done, total // 20, pause_s=pause_s)
    last = watch(done, total - total // 20, pause_s=pause_s)
    watch(done, total, pause_s=pause_s)
    return rate_between(first, last)


def dumps_us() -> float:
    """Microseconds that json.dumps takes for what a message looks like."""
    strings = {"queue_name": "default", "actor_name": "noop", "message_id": "0" * 36}
    message = {**strings, "args": [], "kwargs": {}, "options": {}, "message_timestamp": 1 << 40}
    taken = timeit.repeat(lambda: json.dumps(message), number=2_000, repeat=5)
    return percentile(taken, 50) / 2_000 * 1e6


class Progress:
    """How far a SQLite queue has drained, seen through a read connection of its own.

    Work is taken in the order of the rows' keys, which are noted here before a worker starts;
    so the lowest key that is left says how many are done, at a few microseconds a look
    whatever the backlog.  Rows below `first` (such as delayed ones that stay) don't count.
    """

    def __init__(self, path: Path, total: int, *, first: int = 0) -> None:
        self._connection = _read_connection(path)
        self._first = first
        query = "SELECT rowid FROM dramalite_messages WHERE rowid >= ? ORDER BY rowid"
        self._keys = array("q", (row[0] for row in self._connection.execute(query, (first,))))
        if len(self._keys) != total:
            raise BenchError(f"{len(self._keys):,} messages are queued, and not {total:,}.")

    def done(self) -> int:
        """How many of the messages are gone."""
        query = "SELECT min(rowid) FROM dramalite_messages WHERE rowid >= ?"
        lowest = self._connection.execute(query, (self._first,)).fetchone()[0]
        return len(self._keys) if lowest is None else bisect_left(self._keys, lowest)

    def close(self) -> None:
        self._connection.close()


@contextlib.contextmanager
def progress(path: Path, total: int, *, first: int = 0) -> Iterator[Progress]:
    """A Progress that is closed at the end."""
    with contextlib.closing(Progress(path, total, first=first)) as watched:
        yield watched


@contextlib.contextmanager
def small_progress(path: Path, total: int) -> Iterator[Callable[[], int]]:
    """How many of `total` messages are done, by counting what is left: for small queues."""
    query = "SELECT count(*) FROM dramalite_messages"
    with contextlib.closing(_read_connection(path)) as connection:
        yield lambda: total - int(connection.execute(query).fetchone()[0])


def next_key(path: Path) -> int:
    """A key below that of every message sent from now on, and above every other."""
    with contextlib.closing(_read_connection(path)) as connection:
        query = "SELECT max(rowid) FROM dramalite_messages"
        return (connection.execute(query).fetchone()[0] or 0) + 1


def wait_until_empty(path: Path) -> None:
    """Wait until the table of messages is empty."""
    with contextlib.closing(_read_connection(path)) as connection:
        query = "SELECT 1 FROM dramalite_messages LIMIT 1"
        wait_until(
            lambda: connection.execute(query).fetchone() is None,
            "the table of messages to be empty",
            pause_s=0.002,
        )


def _read_connection(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=30)


# ------------------------------------------------------------------------------------------
# Processes
# ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A temporary folder, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder).resolve()


@dataclass(frozen=True)
class Started:
    """A process that the benchmark runs, with its output in `log`."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def check(self) -> None:
        """BenchError with the end of its output if the process has ended by itself."""
        if self.process.poll() is not None:
            raise BenchError(f"{self.log.stem} ended with {self.process.returncode}: {self.tail()}")

    def tail(self) -> str:
        """The last lines of its output."""
        return self.log.read_text(errors="replace")[-1500:]


@contextlib.contextmanager
def started(
    command: Sequence[str | os.PathLike[str]], folder: Path, name: str, **environment: str
) -> Iterator[Started]:
    """Run `command` in `folder` for as long as the block lasts, then end it and its children."""
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=_environment(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    running = Started(process, log)
    try:
        yield running
    except BenchError as error:
        raise BenchError(f"{error}\n    {name} said: {running.tail()}") from error
    finally:
        _end(process)


@contextlib.contextmanager
def dramalite_worker(
    path: Path, *, processes: int = 1, threads: int = 8, samples: Path | None = None
) -> Iterator[Started]:
    """`python -m dramalite worker` on the database `path`."""
    command = [sys.executable, "-m", "dramalite", "worker", "bench_worker:broker"]
    command += ["--processes", str(processes), "--threads", str(threads), "--path", str(HERE)]
    environment = {"BENCH_DB": str(path)}
    if samples is not None:
        environment["BENCH_SAMPLES"] = str(samples)
    with started(command, path.parent, "worker", **environment) as worker:
        yield worker


@dataclass
class Producer:
    """A process of bench_producer.py, ready to send at a word."""

    process: subprocess.Popen[str]
    _went: bool = field(default=False)

    def go(self) -> None:
        """Let it send."""
        assert self.process.stdin is not None  # Opened with a pipe.
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self._went = True

    def wait(self) -> float:
        """Wait until it has sent everything; returns the seconds it took."""
        output, _ = self.process.communicate(timeout=PATIENCE_S)
        if self.process.returncode != 0:
            raise BenchError(f"A producer ended with {self.process.returncode}.")
        return float(output)


@contextlib.contextmanager
def producer(path: Path, durability: str, kind: str, count: int) -> Iterator[Producer]:
    """A producer process that has opened the database and waits for go()."""
    command = [sys.executable, str(HERE / "bench_producer.py"), str(path)]
    command += [durability, kind, str(count)]
    process = subprocess.Popen(
        command,
        cwd=path.parent,
        env=_environment({}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None  # Opened with a pipe.
        if process.stdout.readline() != "ready\n":
            raise BenchError("A producer did not become ready.")
        yield Producer(process)
    finally:
        _end(process)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def free_port() -> int:
    """A TCP port on 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _environment(extra: dict[str, str]) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(HERE)])
    inherited = dict(os.environ)
    # Without bytecode each process compiles for itself, which takes time and memory.
    inherited.pop("PYTHONDONTWRITEBYTECODE", None)
    return {**inherited, "PYTHONPATH": path, **extra}


def _end(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """End a process by its own pid, gently first, and its children if they outlive it."""
    children = descendants(process.pid)
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    # A child counts as ours only while it is the process that it was, not a reused pid.
    for child in children:
        if child.start_time and _start_time(child.pid) == child.start_time:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)


# ------------------------------------------------------------------------------------------
# /proc
# ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Child:
    """A process below another one; its start time tells it from a later one of that pid."""

    pid: int
    start_time: str


def need_proc() -> None:
    """Skip the scenario where there is no /proc to read."""
    if not Path("/proc/self/status").exists():
        raise Skipped("needs /proc")


def descendants(pid: int) -> list[Child]:
    """The children of a process, and theirs; empty where there is no /proc."""
    below: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        fields = _stat_fields(int(entry.name))
        if fields:
            below.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    pending = [pid]
    while pending:
        children = below.get(pending.pop(), [])
        found += children
        pending += children
    return [Child(child, _start_time(child)) for child in found]


def worker_pids(parent: Started) -> list[int]:
    """The processes below `parent` that run actors: not helpers of multiprocessing."""
    pids = [child.pid for child in descendants(parent.pid)]
    return [pid for pid in pids if b"resource_tracker" not in _command_line(pid)] or [parent.pid]


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = _stat_fields(pid)
    if not fields:
        raise BenchError(f"Process {pid} is gone.")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int) -> float:
    """Resident memory of a process in units of 1024 * 1024 bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


def _stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _start_time(pid: int) -> str:
    fields = _stat_fields(pid)
    return fields[19] if fields else ""


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
