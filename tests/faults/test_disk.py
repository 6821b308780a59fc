"""A disk that is full: send() says so, what was accepted stays, and the worker comes back by itself."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess

import pytest

FULL = re.compile(r"full|space|disk|too large|quota", re.IGNORECASE)

FILL = """
    import errno

    def fill(folder):
        \"\"\"Write until not one byte more fits.\"\"\"
        with open(os.path.join(folder, "filler"), "ab", buffering=0) as filler:
            for size in (65536, 4096, 512, 1):
                try:
                    while True:
                        filler.write(b"x" * size)
                except OSError as error:
                    assert error.errno == errno.ENOSPC, error

    @dramalite.actor(max_retries=0)
    def job(number, load=""):
        note("start", number)
        note("end", number)

    @dramalite.actor(max_retries=0)
    def fill_the_disk(number):
        note("start", number)
        fill(os.path.dirname(os.environ["JOBS_DB"]))
        note("end", number)
"""


@pytest.fixture
def place(place):
    place.jobs(FILL)
    return place


@contextlib.contextmanager
def mounted(place, folder, options):
    """Have a file system of its own in a folder until all of the place has ended."""
    folder.mkdir()
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
    ) if os.geteuid() == 0 else None
    if mounting is None or mounting.returncode != 0:
        pytest.skip("Mounting a small file system needs root and the right to mount.")
    yield folder
    place.close()
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(place):
    """The place's database on a small file system of its own."""
    with mounted(place, place.folder / "disk", "size=24m") as disk:
        place.db = disk / "queue.db"
        yield disk


@pytest.fixture
def full_folder(place):
    """A folder where there is room for what a supervisor needs to start, and for no more files."""
    with mounted(place, place.folder / "temporary", "size=64k,nr_inodes=4") as folder:
        yield folder


def test_a_file_that_may_not_grow_makes_send_fail_clearly_and_keeps_what_was_accepted(place):
    tree = place.script(
        """
        import resource
        import dramalite
        import jobs

        jobs.job.send(-1, "")
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
        accepted = 1
        try:
            while accepted < 1000:
                jobs.job.send(accepted, "x" * 5_000)
                accepted += 1
        except dramalite.BrokerError as error:
            print("error:", error)
        print("accepted:", accepted)
        try:
            jobs.job.send(accepted, "x" * 5_000)
            accepted += 1
        except dramalite.BrokerError as error:
            print("again:", type(error).__name__)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        jobs.job.send("later", "")
        print("in all:", accepted + 1)
        """
    )
    told = dict(line.split(": ", 1) for line in tree.output().splitlines() if ": " in line)

    assert 5 < int(told["accepted"]) < 1000
    assert str(place.db) in told["error"]
    assert FULL.search(told["error"])
    assert place.waiting() == int(told["in all"])
    assert place.sound()
    place.worker()
    place.drained()
    assert len(place.runs("end")) == int(told["in all"])


def test_a_full_disk_makes_send_fail_clearly_and_heals_when_space_returns(place, small_disk):
    tree = place.script(
        """
        import os
        import dramalite
        import jobs

        accepted = 0
        try:
            while accepted < 20_000:
                jobs.job.send(accepted, "x" * 20_000)
                accepted += 1
        except dramalite.BrokerError as error:
            print("error:", error)
        print("accepted:", accepted)
        jobs.fill(os.path.dirname(os.environ["JOBS_DB"]))
        for attempt in range(3):
            try:
                jobs.job.send("while full", "x" * 5_000)
                accepted += 1  # A checkpoint may have made room.
            except dramalite.BrokerError:
                pass
        print("in all:", accepted)
        """
    )
    told = dict(line.split(": ", 1) for line in tree.output().splitlines() if ": " in line)

    assert str(place.db) in told["error"]
    assert FULL.search(told["error"])
    (small_disk / "filler").unlink(missing_ok=True)
    assert place.waiting() == int(told["in all"])
    assert place.sound()


def test_a_file_cannot_be_created_on_a_full_disk_and_the_error_says_why(place, small_disk):
    place.script("import jobs; jobs.fill(jobs.os.path.dirname(jobs.os.environ['JOBS_DB']))")
    tree = place.script(
        """
        import dramalite
        import jobs

        try:
            jobs.job.send(1)
        except dramalite.BrokerError as error:
            print("error:", error)
        """
    )

    assert str(place.db) in tree.output()
    (small_disk / "filler").unlink()
    place.worker()
    place.send("job", 2)
    place.wait_until(lambda: place.notes("end", 2), "all is well once there is space")


def test_a_worker_with_a_full_disk_repeats_nothing_and_recovers_when_space_returns(place, small_disk):
    for number in range(60):
        place.send("job", number, "x" * 200)
    place.send("fill_the_disk", 60)
    for number in range(61, 90):
        place.send("job", number, "x" * 200)
    tree = place.worker(threads=2)
    place.wait_until(lambda: place.notes("end", 60), "the disk is full")
    place.wait_until(lambda: FULL.search(tree.output()) or len(place.notes("end")) == 90, "the worker says so")
    (small_disk / "filler").unlink()
    place.drained()
    place.send("job", 90)
    place.wait_until(lambda: place.notes("end", 90), "the worker works again")

    assert place.runs("start") == {str(number): 1 for number in range(91)}
    assert place.dead() == 0
    assert tree.output().count("\n") < 200
    assert place.sound()


def test_a_worker_stops_in_time_while_the_disk_is_full(place, small_disk):
    place.send("fill_the_disk", 0)
    tree = place.worker(threads=2)
    place.wait_until(lambda: place.notes("end", 0), "the disk is full")
    tree.signal(signal.SIGTERM)

    assert tree.wait() == 0, tree.tail()  # 1, had it been killed in the end.
    assert tree.pids() == []


def test_closing_a_broker_on_a_full_disk_raises_nothing(place, small_disk):
    place.script(
        """
        import os
        import jobs

        jobs.job.send(1)
        jobs.fill(os.path.dirname(os.environ["JOBS_DB"]))
        jobs.broker.close()
        """
    )
    (small_disk / "filler").unlink()

    assert place.waiting() == 1


def test_worker_processes_live_and_work_though_the_temporary_folder_is_full(place, full_folder):
    tree = place.worker(processes=2, TMPDIR=str(full_folder))
    place.wait_until(lambda: tree.output().count("ready for action") >= 2, "both processes are ready")
    for number in range(5):
        place.send("job", number)
    place.drained()
    with pytest.raises(OSError):  # As it was for them.
        [(full_folder / f"{number}").touch() for number in range(4)]
    tree.signal(signal.SIGTERM)

    assert tree.wait() == 0, tree.tail()
    assert tree.output().count("ready for action") == 2
    assert "Traceback" not in tree.output()
