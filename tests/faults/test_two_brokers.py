"""Two brokers on one file in one process: neither takes anything away from the other."""

from __future__ import annotations

import threading
from collections import Counter

import dramalite
import pytest
from helpers import DEADLINE, wait_until

JOBS = """
    from pathlib import Path

    HERE = Path(JOURNAL).parent

    @dramalite.actor(max_retries=0)
    def job(number):
        note("ran", number, os.getpid())

    @dramalite.actor(max_retries=0)
    def held(number):
        note("start", number)
        until(lambda: (HERE / "release").exists(), 60)
        note("end", number)
"""


def same(folder):
    return folder / "queue.db"


def through_a_link(folder):
    (folder / "link.db").symlink_to(folder / "queue.db")
    return folder / "link.db"


def around_a_corner(folder):
    (folder / "corner").mkdir()
    return folder / "corner" / ".." / "queue.db"


@pytest.fixture(params=[same, through_a_link, around_a_corner])
def brokers(request, tmp_path, clean_state):
    """Two brokers on one file, which call it by the same name or by two, at two durabilities."""
    first = dramalite.SQLiteBroker(tmp_path / "queue.db", durability="full")
    clean_state.callback(first.close)
    (tmp_path / "queue.db").touch(mode=0o600)
    second = dramalite.SQLiteBroker(request.param(tmp_path), durability="normal")
    clean_state.callback(second.close)
    return first, second


def test_two_brokers_on_one_file_send_and_work_side_by_side(brokers, worker):
    ran = Counter()
    jobs = [dramalite.actor(lambda number: ran.update([number]), actor_name="job", broker=broker) for broker in brokers]
    for broker in brokers:
        worker(broker, worker_threads=2)

    def send(index):
        for number in range(40):
            jobs[index % 2].send(f"{index}-{number}")

    senders = [threading.Thread(target=send, args=(index,)) for index in range(4)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(DEADLINE)
    for broker in brokers:
        broker.join("default", timeout=DEADLINE * 1000)

    assert len(ran) == 160
    assert set(ran.values()) == {1}


def test_each_is_woken_by_what_the_other_sends(brokers, worker):
    first, second = brokers
    ran = threading.Event()
    dramalite.actor(ran.set, actor_name="job", broker=first)
    sender = dramalite.actor(lambda: None, actor_name="job", broker=second)
    worker(first)
    sender.send()

    assert ran.wait(DEADLINE)


def test_closing_one_leaves_the_other_at_work(brokers, worker):
    first, second = brokers
    started, release, ran = threading.Event(), threading.Event(), []

    def job(number):
        if number == 0:
            started.set()
            assert release.wait(DEADLINE)
        ran.append(number)

    actor = dramalite.actor(job, broker=first)
    other = dramalite.actor(job, broker=second)
    worker(first)
    actor.send(0)
    assert started.wait(DEADLINE)
    with dramalite.Worker(second, worker_threads=1):
        other.send(1)
        wait_until(lambda: ran == [1])
    for number in (2, 3):
        other.send(number)
        second.close()
    release.set()
    first.join("default", timeout=DEADLINE * 1000)

    assert ran == [1, 0, 2, 3]


@pytest.mark.torture
@pytest.mark.parametrize("name", ["queue.db", "link.db"])
def test_what_one_brokers_worker_runs_is_not_given_away_when_the_other_is_closed(place, name):
    # The lock that proves a worker's life goes with any descriptor of its file that is closed.
    (place.folder / "link.db").symlink_to(place.db)
    place.jobs(JOBS)
    tree = place.start_script(
        """
        import gc, sys
        import dramalite
        import jobs

        jobs.held.send(1)
        worker = dramalite.Worker(jobs.broker, worker_threads=1)
        worker.start()
        jobs.until(lambda: jobs.noted("start"))
        for number in range(4):
            other = dramalite.SQLiteBroker(sys.argv[1])
            job = dramalite.actor(jobs.job.fn, actor_name="job", broker=other)
            with dramalite.Worker(other, worker_threads=1):
                job.send(number)
                jobs.until(lambda: jobs.noted("ran") > number)
            other.consume("default").close()
            other.close()
            del other, job
            gc.collect()
        jobs.note("closed")
        worker.join()
        worker.stop()
        """,
        str(place.folder / name),
    )
    place.wait_until(lambda: place.notes("closed") or not tree.alive(), "the other brokers come and go")
    place.worker(threads=2)
    place.send("job", "late", delay=2200)  # When this one runs, that worker had time to take over.
    place.wait_until(lambda: place.notes("ran", "late"), "the other process works")
    (place.folder / "release").touch()
    assert tree.wait() == 0, tree.tail()
    place.drained()

    assert place.runs("start") == place.runs("end") == {"1": 1}
    assert place.runs("ran") == {key: 1 for key in ("0", "1", "2", "3", "late")}
