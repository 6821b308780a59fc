"""Worker trees, scripts and a journal for the tests that need real processes.

A Place is a folder with a database, a module of jobs (`jobs.py`) and a journal.  Jobs write
what they do to the journal, one appended line a note, so that a test knows what ran even
when the process that ran it was killed.  Everything a Place starts carries a mark in its
environment; Place.close() ends exactly those processes, by their ids.

wait_until() is the only place that polls; each wait has a deadline.
"""

from __future__ import annotations

import contextlib
import json
import os
import py_compile
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import urllib.parse
import uuid
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "dramalite.py"
MARK = "DRAMALITE_TEST_TREE"

#: Seconds after which a test that waits for something has failed.
DEADLINE = 150.0

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# Compiled once, where that can be written, and not again by each of some hundred processes.
COMPILED = py_compile.compile(str(MODULE), quiet=2)


def copy_module(folder: Path) -> Path:
    """Put a copy of dramalite.py into a folder, compiled already: each process would take a second for that."""
    copy = Path(shutil.copy2(MODULE, folder))
    if COMPILED is not None:
        (folder / "__pycache__").mkdir(exist_ok=True)
        shutil.copy(COMPILED, folder / "__pycache__")
    return copy


#: What every jobs.py begins with: a broker on the place's file, and note().
PRELUDE = '''\
import os
import signal
import sys
import threading
import time

import dramalite

broker = dramalite.SQLiteBroker(os.environ["JOBS_DB"], durability=os.environ["JOBS_DURABILITY"])
dramalite.set_broker(broker)
JOURNAL = os.environ["JOBS_JOURNAL"]


def note(*words):
    """Append one line to the journal; what is noted survives a kill of this process."""
    line = " ".join(map(str, words)) + "\\n"
    descriptor = os.open(JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def noted(word):
    """How many lines of the journal begin with `word`."""
    with open(JOURNAL) as journal:
        return sum(line.split()[:1] == [word] for line in journal)


def until(condition, seconds=200.0):
    """Simulate work that ends when `condition` holds, or fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("The condition did not come true in time.")
        time.sleep(0.005)


@dramalite.actor(max_retries=0)
def ping(number):
    note("ping", number, os.getpid(), time.monotonic())

'''


#: Runs the command line with each list of arguments, and prints the exit codes and what was said.
COMMANDS = """
    import json, os, sys, tempfile
    import dramalite

    for arguments in json.loads(sys.argv[1]):
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if child == 0:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                sys.exit(dramalite.main(arguments))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            output.seek(0)
            print(json.dumps([code, output.read().decode()]))
"""


def wait_until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
    """Return the first true value of `condition`; fail with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"Waited {seconds} s in vain: {what}")
        time.sleep(0.01)


def let_pass(seconds: float) -> None:
    """Let a drawn time pass, so that a fault strikes at a random moment (never to wait for something)."""
    threading.Event().wait(seconds)


class Tree:
    """A process with its descendants, known by the mark in their environment."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str], log: Path):
        self.mark = uuid.uuid4().hex
        self.log = log
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**environment, MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self.process.pid

    def alive(self) -> bool:
        return self.process.poll() is None

    def pids(self) -> list[int]:
        """Living processes of the tree, orphans included."""
        self.process.poll()  # Reaps the root, so that it does not stay a zombie.
        wanted = f"{MARK}={self.mark}".encode()
        return [pid for pid in _all_pids() if wanted in _environment_of(pid)]

    def children(self) -> list[int]:
        """Living direct children of the root."""
        return [pid for pid in self.pids() if _parent_of(pid) == self.pid]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill_all(self) -> None:
        """SIGKILL for the whole tree at once, then for whatever was born meanwhile."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        wait_until(self._none_left, "the killed processes end")

    def _none_left(self) -> bool:
        left = self.pids()
        for pid in left:
            kill(pid)
        return not left

    def wait(self, seconds: float = DEADLINE) -> int:
        """The exit code of the root."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"Process {self.pid} did not end in {seconds} s.\n{self.tail()}") from None

    def output(self) -> str:
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""

    def tail(self) -> str:
        return f"--- {self.log.name}\n{self.output()[-3000:]}"


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Signal `pid`; a process that is gone already is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _environment_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()  # Empty for a zombie.
    except OSError:
        return b""


def _parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


class Place:
    """A folder with a database, a jobs module and a journal; ends what it started."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.db = folder / "queue.db"
        self.journal = folder / "journal.txt"
        self.journal.touch()
        self.durability = "normal"
        self.trees: list[Tree] = []
        self._brokers: list[Any] = []
        self.jobs("")

    # Set-up

    def jobs(self, source: str) -> None:
        """Write jobs.py: the prelude and `source`."""
        self.put("jobs.py", PRELUDE + textwrap.dedent(source))

    def put(self, name: str, text: str) -> None:
        """Write a file of the folder at once: who watches it never sees a part of it."""
        new = self.folder / f"{name}.new"
        new.write_text(text, "utf-8")
        os.replace(new, self.folder / name)

    def environment(self, **extra: str) -> dict[str, str]:
        plain = {key: value for key, value in os.environ.items() if not key.upper().startswith("DRAMA")}
        plain.pop(MARK, None)
        return {
            **plain,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "JOBS_DB": str(self.db),
            "JOBS_JOURNAL": str(self.journal),
            "JOBS_DURABILITY": self.durability,
            **extra,
        }

    # Processes

    def start(self, command: list[str], **extra: str) -> Tree:
        log = self.folder / f"tree-{len(self.trees)}.log"
        tree = Tree(command, self.folder, self.environment(**extra), log)
        self.trees.append(tree)
        return tree

    def worker(self, *arguments: str, processes: int = 1, threads: int = 2, module: str = "jobs", **extra: str) -> Tree:
        """Start `python -m dramalite worker jobs` with these options."""
        command = [sys.executable, "-m", "dramalite", "worker", module]
        command += ["--processes", str(processes), "--threads", str(threads), *arguments]
        return self.start(command, **extra)

    def ready_worker(self, *arguments: str, **options: Any) -> Tree:
        """A worker that has run a ping, so that it is known to be up."""
        tree = self.worker(*arguments, **options)
        number = uuid.uuid4().hex
        self.send("ping", number)
        self.wait_until(lambda: self.notes("ping", number), "the new worker runs a ping")
        return tree

    def start_script(self, source: str, *arguments: str, **extra: str) -> Tree:
        """Start Python code that may import jobs."""
        path = self.folder / f"script_{len(self.trees)}.py"
        path.write_text(textwrap.dedent(source), "utf-8")
        return self.start([sys.executable, str(path), *arguments], **extra)

    def script(self, source: str, *arguments: str, seconds: float = DEADLINE, **extra: str) -> Tree:
        """Run Python code to its end, which must come in time and with exit code 0."""
        tree = self.start_script(source, *arguments, **extra)
        code = tree.wait(seconds)
        assert code == 0, f"The script ended with {code}.\n{tree.tail()}"
        return tree

    def endings(self, commands: list[list[str]]) -> list[tuple[int, str]]:
        """How each of these command lines ends and what it says, all in forks of one process that has imported us."""
        tree = self.script(COMMANDS, json.dumps(commands))
        return [tuple(json.loads(line)) for line in tree.output().splitlines()]

    def wait_until(self, condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
        """wait_until(), with the logs and the journal in the failure."""
        try:
            return wait_until(condition, what, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story()}") from None

    def story(self) -> str:
        tails = "\n".join(tree.tail() for tree in self.trees[-4:])
        return f"--- journal\n{self.journal.read_text()[-2000:]}\n{tails}"

    # Messages

    def broker(self, **options: Any) -> Any:
        """A broker of this process on the place's file; closed with the place."""
        import dramalite

        options.setdefault("durability", self.durability)
        broker = dramalite.SQLiteBroker(str(self.db), **options)
        self._brokers.append(broker)
        return broker

    def send(self, actor: str, *args: Any, queue: str = "default", delay: int | None = None, **options: Any) -> Any:
        """Send to an actor of jobs.py by its name, without importing jobs here."""
        import dramalite

        broker = self._brokers[0] if self._brokers else self.broker()
        broker.declare_queue(queue)
        message = dramalite.Message(queue, actor, args, {}, options)
        return broker.enqueue(message, delay=delay)

    def notes(self, *words: Any) -> list[list[str]]:
        """The journal's complete lines, split, that begin with `words`."""
        start = [str(word) for word in words]
        lines = self.journal.read_bytes().decode().split("\n")[:-1]
        return [split for split in map(str.split, lines) if split[: len(start)] == start]

    def runs(self, word: str) -> Counter[str]:
        """How often each number was noted after `word`."""
        return Counter(note[1] for note in self.notes(word))

    # The file, read through a connection of its own

    def connect(self) -> sqlite3.Connection:
        """A connection that never creates the file."""
        address = f"file:{urllib.parse.quote(str(self.db))}?mode=rw"
        return sqlite3.connect(address, uri=True, timeout=DEADLINE)

    def query(self, statement: str, *values: Any) -> list[tuple]:
        with contextlib.closing(self.connect()) as connection:
            return connection.execute(statement, values).fetchall()

    def change(self, statement: str, *values: Any) -> int:
        """Run a statement that writes; the number of rows it changed."""
        with contextlib.closing(self.connect()) as connection, connection:
            return connection.execute(statement, values).rowcount

    def count(self, table: str) -> int:
        """Rows of a table; 0 where the file or the table is not there yet."""
        try:
            return self.query(f"SELECT count(*) FROM {table}")[0][0]
        except sqlite3.OperationalError as error:
            if "no such table" in str(error) or "unable to open" in str(error):
                return 0
            raise

    def waiting(self) -> int:
        """Messages that are not finished: ready, delayed or claimed."""
        return self.count("dramalite_messages")

    def dead(self) -> int:
        return self.count("dramalite_dead")

    def sound(self) -> bool:
        return self.query("PRAGMA integrity_check") == [("ok",)]

    def drained(self, seconds: float = DEADLINE) -> None:
        """Wait until no message is waiting, delayed or claimed."""
        self.wait_until(lambda: self.waiting() == 0, "all messages are finished", seconds)

    def dead_letters(self) -> list[Any]:
        return self.broker().dead_letters

    # The end

    def close(self) -> None:
        for broker in self._brokers:
            broker.close()
        for tree in self.trees:
            tree.kill_all()
            tree.process.wait(DEADLINE)


@contextlib.contextmanager
def new_place(folder: Path) -> Iterator[Place]:
    """A Place that is closed at the end, whatever happens."""
    place = Place(folder)
    try:
        yield place
    finally:
        place.close()
