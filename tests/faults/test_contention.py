"""Many processes on one file, and programs that are not ours: no lock error reaches anyone."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import time

import pytest

JOBS = """
    @dramalite.actor(max_retries=0)
    def job(number):
        note("ran", number, time.monotonic())
"""

PRODUCER = """
    import sys
    import threading
    import time
    import jobs

    first, count, threads = map(int, sys.argv[1:4])

    def produce(start, stop):
        for number in range(start, stop):
            before = time.monotonic()
            jobs.job.send(number)
            jobs.note("accepted", number, time.monotonic() - before)

    share = count // threads
    workers = [
        threading.Thread(target=produce, args=(first + index * share, first + (index + 1) * share))
        for index in range(threads)
    ]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
"""

HOLDER = """
    import os, sqlite3, sys, time
    import jobs

    connection = sqlite3.connect(os.environ["JOBS_DB"], isolation_level=None, timeout=30)
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("CREATE TABLE IF NOT EXISTS foreign_table (x)")
    jobs.note("holding")
    jobs.until(lambda: jobs.noted("sending"))
    time.sleep(float(sys.argv[1]))  # The work of a program that is not ours.
    connection.execute("COMMIT")
    jobs.note("released", time.monotonic())
"""

LOCKED = re.compile(r"locked|SQLITE_BUSY|OperationalError", re.IGNORECASE)


@pytest.fixture
def place(place):
    place.jobs(JOBS)
    return place


def say(place, word):
    """Write a line to the journal, which processes wait for."""
    with open(place.journal, "a") as journal:
        journal.write(f"{word}\n")


def crowd(place, *, producers, messages, threads, workers):
    """Run producer processes and worker processes on one file until all is done."""
    senders = [
        place.start_script(PRODUCER, str(index * 100_000), str(messages), str(threads)) for index in range(producers)
    ]
    place.worker(processes=workers, threads=2)
    for sender in senders:
        assert sender.wait(120) == 0, sender.tail()
    place.drained(120)


def assert_nobody_met_a_lock(place):
    assert [tree.tail() for tree in place.trees if LOCKED.search(tree.output())] == []
    assert place.runs("ran") == place.runs("accepted")
    assert place.dead() == 0
    assert place.sound()


@pytest.mark.parametrize("durability", ["full", pytest.param("normal", marks=pytest.mark.torture)])
def test_eight_producers_and_four_workers_meet_no_lock_error(place, durability):
    place.durability = durability
    crowd(place, producers=8, messages=100, threads=2, workers=4)

    assert len(place.runs("accepted")) == 800
    assert_nobody_met_a_lock(place)


@pytest.mark.torture
def test_a_long_crush_meets_no_lock_error_and_starves_no_sender(place):
    crowd(place, producers=8, messages=4000, threads=4, workers=4)

    assert_nobody_met_a_lock(place)
    assert max(float(note[2]) for note in place.notes("accepted")) < 2.0


def test_processes_that_create_the_file_at_the_same_moment_agree(place):
    source = """
        import os
        import jobs

        jobs.note("here")
        jobs.until(lambda: jobs.noted("here") == 6)
        jobs.job.send(os.getpid())
        jobs.note("accepted", os.getpid())
    """
    trees = [place.start_script(source) for _ in range(6)]
    codes = [tree.wait() for tree in trees]

    assert codes == [0] * 6, place.story()
    assert place.waiting() == 6
    assert [tree.output() for tree in trees] == [""] * 6


@pytest.mark.parametrize("seconds", [2, pytest.param(10, marks=pytest.mark.torture)])
def test_senders_and_workers_wait_while_a_foreign_program_writes_for_seconds(place, seconds):
    worker = place.ready_worker()
    holder = place.start_script(HOLDER, str(seconds))
    place.wait_until(lambda: place.notes("holding"), "the foreign program holds the write lock")
    newcomers = [place.start_script("import jobs; jobs.job.send(2); jobs.broker.close()"), place.worker(threads=1)]
    before = time.monotonic()
    say(place, "sending")
    place.send("job", 1)
    waited = time.monotonic() - before
    assert holder.wait() == 0
    place.wait_until(lambda: place.notes("ran", 1) and place.notes("ran", 2), "the workers go on afterwards")

    assert seconds <= waited < seconds + 15
    assert place.runs("ran") == {"1": 1, "2": 1}
    assert worker.alive() and newcomers[1].alive()
    assert [tree.tail() for tree in (worker, *newcomers) if LOCKED.search(tree.output())] == []


@pytest.mark.torture
def test_a_foreign_program_that_never_lets_go_is_named_in_a_clear_error(place):
    import dramalite

    place.ready_worker()
    place.start_script(HOLDER, "40")
    place.wait_until(lambda: place.notes("holding"), "the foreign program holds the write lock")
    say(place, "sending")
    with pytest.raises(dramalite.BrokerError) as caught:
        place.send("job", 1)

    assert str(place.db) in str(caught.value)
    assert re.search(r"another|other|foreign|lock", str(caught.value))
    place.wait_until(lambda: place.notes("released"), "it lets go at last", 90)
    place.send("job", 2)
    place.wait_until(lambda: place.notes("ran", 2), "the worker goes on afterwards")
    assert place.runs("ran") == {"2": 1}


def test_a_foreign_reader_that_stays_stops_nobody(place):
    place.worker()
    place.send("job", -1)
    place.wait_until(lambda: place.notes("ran", -1), "the worker works")
    with contextlib.closing(sqlite3.connect(place.db, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM dramalite_messages").fetchall()
        for number in range(300):
            place.send("job", number)
        place.wait_until(lambda: len(place.notes("ran")) == 301, "all run while the reader reads")
        reader.execute("COMMIT")

    assert place.runs("ran") == {str(number): 1 for number in range(-1, 300)}


def test_a_foreign_program_that_checkpoints_and_vacuums_disturbs_nobody(place):
    meddler = place.start_script(
        """
        import os, sqlite3
        import jobs

        connection = sqlite3.connect(os.environ["JOBS_DB"], isolation_level=None, timeout=20)
        while not jobs.noted("finished"):
            try:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                connection.execute("VACUUM")
                connection.execute("PRAGMA optimize")
            except sqlite3.OperationalError:
                jobs.note("meddler_waits")  # The foreign program may meet a lock; we may not.
        """
    )
    crowd(place, producers=2, messages=200, threads=2, workers=2)
    say(place, "finished")
    assert meddler.wait() == 0, meddler.tail()

    place.trees.remove(meddler)
    assert_nobody_met_a_lock(place)


def test_the_applications_own_tables_in_the_same_file_are_left_alone(place):
    with contextlib.closing(sqlite3.connect(place.db)) as connection, connection:
        connection.execute("CREATE TABLE invoices (number INTEGER PRIMARY KEY, total REAL)")
        connection.executemany("INSERT INTO invoices VALUES (?, ?)", [(n, n / 4) for n in range(100)])
        connection.execute("PRAGMA user_version = 7")
        connection.execute("PRAGMA application_id = 4242")
    place.ready_worker()
    place.send("job", 1)
    place.drained()

    assert place.query("PRAGMA user_version") == [(7,)]
    assert place.query("PRAGMA application_id") == [(4242,)]
    assert place.query("SELECT count(*), sum(total) FROM invoices") == [(100, sum(n / 4 for n in range(100)))]
    names = {name for (name,) in place.query("SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")}
    assert {name for name in names if not name.startswith("dramalite_")} == {"invoices"}


def test_a_worker_that_comes_while_another_one_begins_does_not_wipe_it_out(place):
    place.jobs(
        """
        @dramalite.actor(max_retries=0)
        def held(number):
            note("start", number)
            until(lambda: os.path.exists("release"))
            note("end", number)
        """
    )
    begin = """
        import os, jobs, dramalite
        with dramalite.Worker(jobs.broker, worker_threads=1):
            jobs.note("began")
            jobs.until(lambda: os.path.exists("release"))
            jobs.broker.join("default", timeout=100_000)
    """
    late = f"""
        import os, jobs
        real_fstat = os.fstat

        def fstat(descriptor):
            status = real_fstat(descriptor)
            if status.st_size == 0 and os.readlink(f"/proc/self/fd/{{descriptor}}").endswith("-lock"):
                jobs.note("saw it empty")
                jobs.until(lambda: jobs.noted("start"))
            return status

        os.fstat = fstat
        {begin.strip()}
    """
    latecomer = place.start_script(late)
    place.wait_until(lambda: place.notes("saw"), "one process sees the side file empty")
    first = place.start_script(begin)
    place.send("held", 1)
    place.wait_until(lambda: len(place.notes("began")) == 2, "both workers run")
    place.send("held", 2)
    place.wait_until(lambda: place.notes("start", 2), "the latecomer works, too")
    (place.folder / "release").touch()

    assert first.wait() == latecomer.wait() == 0
    assert place.runs("start") == {"1": 1, "2": 1}
