"""A power cut at any moment: what send() had returned for by then is there afterwards.

The system calls of a sending process are recorded, and the files rebuilt from the record as a
disk may hold them after a cut: what was synced, and of what was written since nothing, all, or
an arbitrary part.  A new file's name, too, is only sure to be there once its folder was synced.
"""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import sqlite3
import sys
from dataclasses import dataclass, field

import dramalite
import pytest

SENDER = """
    import sys, threading
    import dramalite
    import jobs

    first, count, size, works = map(int, sys.argv[1:5])

    def send(start):
        for number in range(start, start + count):
            jobs.job.send(number, "x" * (size * (number % 3)))
            jobs.note("accepted", number)

    threads = [threading.Thread(target=send, args=(first + index * 1000,)) for index in range(2)]
    worker = dramalite.Worker(jobs.broker, worker_threads=1)
    if works:
        worker.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    worker.stop()
    jobs.broker.close()
"""

JOBS = """
    @dramalite.actor(max_retries=0)
    def job(number, load):
        note("end", number)
"""

CALLS = "openat,pwrite64,write,ftruncate,fdatasync,fsync,unlink"


@pytest.fixture
def place(place):
    if shutil.which("strace") is None:
        pytest.skip("Recording system calls needs strace.")
    place.durability = "full"
    place.jobs(JOBS)
    return place


# The record


@dataclass
class Call:
    """A recorded system call on a file of the place."""

    name: str
    path: str
    data: bytes = b""
    number: int = 0  # An offset or a length.


CALL = re.compile(
    rb"""^\d+\s+(?P<name>\w+)\(
    (?: (?:AT_FDCWD(?:<[^>]*>)?,\s)? "(?P<named>[^"]*)" (?P<flags>[^)]*)   # A path: openat, unlink.
      | \d+<(?P<open>[^>]*)> (?:,\s"(?P<data>[^"]*)",\s\d+)? (?:,\s(?P<number>\d+))? )""",
    re.VERBOSE,
)


def recorded(place, *arguments, seconds=120):
    """Run a sender and return the calls on its files, in their order."""
    log = place.folder / "calls.log"
    command = ["strace", "-f", "--seccomp-bpf", "-qq", "-y", "-xx", "-s", "1000000", "-e", "signal=none"]
    command += ["-e", f"trace={CALLS}", "-o", str(log)]
    script = place.folder / "sender.py"
    lines = [line.removeprefix("    ") for line in SENDER.splitlines()]
    script.write_text("\n".join(lines), "utf-8")
    tree = place.start([*command, sys.executable, str(script), *map(str, arguments)])
    code = tree.wait(seconds)
    if "PTRACE" in tree.output() or "Operation not permitted" in tree.output():
        pytest.skip("strace may not trace here.")
    assert code == 0, tree.tail()
    with open(log, "rb") as lines:
        calls = [call for call in map(parsed, lines) if call is not None]
    log.unlink()
    folder = str(place.folder)
    return [call for call in calls if call.path.rstrip("/") == folder or call.path.startswith(folder + "/")]


def parsed(line):
    found = CALL.match(line)
    if found is None or b"resumed>" in line or b") = -1 " in line:
        return None
    name, path = found["name"].decode(), unescaped(found["named"] or found["open"]).decode()
    if name == "openat":
        name = "create" if b"O_CREAT" in found["flags"] else "open"
    return Call(name, path, unescaped(found["data"] or b""), int(found["number"] or 0))


def unescaped(text):
    return bytes.fromhex(text.replace(b"\\x", b"").decode()) if text.startswith(b"\\x") else text


# The disk


@dataclass
class File:
    """What is safe of a file, and what was done to it since its last sync."""

    safe: bytearray = field(default_factory=bytearray)
    since: list[Call] = field(default_factory=list)
    has_safe_name: bool = False

    def sync(self):
        for call in self.since:
            apply(call, self.safe)
        self.since.clear()


def apply(call, content):
    if call.name == "ftruncate":
        del content[call.number :]
        content.extend(bytes(call.number - len(content)))
    else:
        content.extend(bytes(max(0, call.number + len(call.data) - len(content))))
        content[call.number : call.number + len(call.data)] = call.data


class Disk:
    """The files of a place as the calls so far have left them."""

    def __init__(self, place):
        self._folder = str(place.folder)
        self._names = {str(place.db) + suffix for suffix in ("", "-wal", "-journal")}
        self._files: dict[str, File] = {}
        self._doomed: dict[str, File] = {}  # Deleted, which is not safe yet either.
        self.accepted: set[int] = set()
        self.ended: set[int] = set()

    def see(self, call):
        if call.path == self._folder + "/journal.txt" and call.name == "write":
            self._see_note(*call.data.decode().split()[:2])
        elif call.path.rstrip("/") == self._folder and call.name in ("fsync", "fdatasync"):
            self._doomed.clear()
            for file in self._files.values():
                file.has_safe_name = True
        elif call.path in self._names:
            self._see_file(call)

    def _see_note(self, word, number):
        if word in ("accepted", "end"):
            (self.accepted if word == "accepted" else self.ended).add(int(number))

    def _see_file(self, call):
        if call.name == "create":
            self._files.setdefault(call.path, File())
        elif call.name == "unlink":
            self._doomed[call.path] = self._files.pop(call.path)
        elif call.name in ("fsync", "fdatasync"):
            self._files[call.path].sync()
        elif call.name in ("pwrite64", "ftruncate"):
            self._files[call.path].since.append(call)

    def write_to(self, folder, part, draw):
        """Write the files as they may be after a cut, with this part of what was not synced."""
        folder.mkdir()
        files = {**(self._doomed if part < 1 else {}), **self._files}
        for path, file in files.items():
            if file.has_safe_name or draw.random() < part:
                content = bytearray(file.safe)
                for call in file.since:
                    if draw.random() < part:
                        apply(torn(call, draw) if part < 1 else call, content)
                (folder / path.rpartition("/")[2]).write_bytes(content)


def torn(call, draw):
    """A write, or now and then only some whole sectors of its beginning."""
    if draw.random() < 0.7 or call.name == "ftruncate":
        return call
    return Call(call.name, call.path, call.data[: draw.randrange(0, len(call.data) + 512, 512)], call.number)


def cut_again_and_again(place, calls, cuts, seed):
    """Cut the power after drawn calls, mostly right after a send was accepted; what was lost."""
    draw = random.Random(seed)
    after_notes = [n for n, call in enumerate(calls) if call.data.startswith(b"accepted")]
    chosen = {*draw.sample(after_notes, min(cuts // 2, len(after_notes))), *draw.sample(range(len(calls)), cuts // 2)}
    disk = Disk(place)
    losses = []
    for number, call in enumerate(calls):
        disk.see(call)
        if number in chosen:
            for part in (0.0, 0.5, 1.0):
                folder = place.folder / f"cut-{number}-{part}"
                disk.write_to(folder, part, draw)
                losses += [f"call {number}, {part} of what is not synced: {loss}" for loss in losses_in(folder, disk)]
                shutil.rmtree(folder)
    return losses


def losses_in(folder, disk):
    """What is wrong with the files after a cut."""
    try:
        with contextlib.closing(dramalite.SQLiteBroker(folder / "queue.db")) as broker:
            stored = {message.args[0] for message in broker.pending()}
        with contextlib.closing(sqlite3.connect(folder / "queue.db")) as connection:
            if connection.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
                yield "the file is damaged"
    except dramalite.BrokerError as error:
        yield f"the file can't be used: {error}"
    else:
        lost = disk.accepted - disk.ended - stored
        if lost:
            yield f"lost {sorted(lost)}"


def test_what_was_sent_survives_a_power_cut_at_any_moment(place):
    calls = recorded(place, 0, 10, 3000, 0)

    assert sum(call.data.startswith(b"accepted") for call in calls) == 20
    assert cut_again_and_again(place, calls, 24, seed=1) == []


@pytest.mark.torture
@pytest.mark.parametrize("works", [0, 1], ids=["sender", "sender and worker"])
def test_what_was_sent_survives_a_power_cut_while_the_log_is_moved(place, works):
    calls = recorded(place, 0, 35, 120_000, works)

    assert sum(call.data.startswith(b"accepted") for call in calls) == 70
    assert sum(call.name == "pwrite64" and call.path == str(place.db) for call in calls) > 1000
    assert cut_again_and_again(place, calls, 24, seed=2) == []


@pytest.mark.torture
def test_the_record_shows_what_a_broker_that_does_not_sync_would_lose(place):
    place.durability = "normal"
    calls = recorded(place, 0, 10, 3000, 0)

    assert cut_again_and_again(place, calls, 24, seed=1) != []
