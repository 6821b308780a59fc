"""The flushing of a database's log: when, for whom, beside whom, and what a failure means."""

import contextlib
import errno
import os
import sqlite3
import sys
import threading
from pathlib import Path

import pytest

import dramalite
from dramalite import BrokerError

from helpers import DEADLINE, wait_until

class Disk:
    """Stands for the disk: counts flushes, and holds them up or fails them where a test says so."""

    def __init__(self, flush):
        self._flush = flush
        self.flushed = []  # Files, by their names.
        self.errors = []  # One for each flush to come that fails.
        self.is_free = threading.Event()
        self.is_free.set()
        self.waiting = 0
        self.on_flush = lambda: None

    def __call__(self, descriptor):
        self.waiting += 1
        self.on_flush()
        assert self.is_free.wait(DEADLINE)
        self.waiting -= 1
        self.flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        if self.errors:
            raise self.errors.pop(0)
        self._flush(descriptor)


@pytest.fixture
def disk(monkeypatch):
    if sys.platform != "linux":
        pytest.skip("Flushes are counted, and their files known, as Linux has them.")
    disk = Disk(os.fdatasync)
    monkeypatch.setattr(os, "fdatasync", disk)
    return disk


@pytest.fixture
def no_log(monkeypatch):
    """Has SQLite lock by a file beside the database, which leaves it without a log, as on some file systems."""
    if sys.platform == "win32":
        pytest.skip("SQLite locks by a file of its own on Unix only.")
    connect = sqlite3.connect

    def connect_without_log(path, **options):
        return connect(f"{Path(path).as_uri()}?vfs=unix-dotfile", uri=True, **options)

    monkeypatch.setattr(sqlite3, "connect", connect_without_log)


@pytest.fixture
def work(make_file_broker):
    make_file_broker(durability="full")
    return dramalite.actor(print, actor_name="work")


def in_threads(count, fn):
    """Call `fn` in threads; returns them, and what it raised there."""
    raised = []

    def call():
        try:
            fn()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, raised


@contextlib.contextmanager
def held_up(disk, work):
    """The disk is held up, with a send that waits for it; gives what that has raised in the end."""
    disk.is_free.clear()
    threads, raised = in_threads(1, lambda: work.send(0))
    wait_until(lambda: disk.waiting)
    yield raised
    disk.is_free.set()
    threads[0].join(DEADLINE)


def raised_by_sends(disk, work, count, *, messages):
    """What a send that is held up raises, and so many others that join it until so many messages are there."""
    with held_up(disk, work) as first_raised:
        threads, raised = in_threads(count, lambda: work.send(1))
        wait_until(lambda: waiting(work.broker) == messages)
    for thread in threads:
        thread.join(DEADLINE)
    return first_raised, raised


@contextlib.contextmanager
def unmovable_log(broker):
    """Somebody reads meanwhile, so that what the log holds can't all be moved into the database."""
    with contextlib.closing(sqlite3.connect(broker.path, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM dramalite_messages").fetchone()
        yield
        connection.execute("COMMIT")


def waiting(broker):
    """How many messages wait."""
    with contextlib.closing(sqlite3.connect(broker.path)) as connection:
        return connection.execute("SELECT count(*) FROM dramalite_messages").fetchone()[0]


def test_each_send_is_flushed_before_it_returns(disk, work):
    seen = []
    for number in range(3):
        work.send(number)
        seen.append(list(disk.flushed))

    assert seen == [["queue.db-wal"] * count for count in (1, 2, 3)]


def test_many_messages_that_are_sent_together_share_a_flush(disk, work):
    dramalite.group(work.message(number) for number in range(50)).run()

    assert disk.flushed == ["queue.db-wal"]


def test_normal_durability_flushes_nothing(disk, make_file_broker):
    make_file_broker(durability="normal")
    dramalite.actor(print, actor_name="work").send(1)

    assert disk.flushed == []


def test_what_is_flushed_is_the_log_that_a_link_leads_to(disk, make_file_broker, tmp_path):
    (tmp_path / "link.db").symlink_to(tmp_path / "real.db")
    make_file_broker("real.db", durability="normal").declare_queue("default")
    make_file_broker("real.db", durability="full")
    dramalite.actor(print, actor_name="first").send(1)
    make_file_broker("link.db", durability="full")
    dramalite.actor(print, actor_name="work").send(1)

    assert disk.flushed == ["real.db-wal", "real.db-wal"]


def test_threads_that_send_during_a_flush_share_the_next_one(disk, work):
    with held_up(disk, work):
        threads, raised = in_threads(6, lambda: work.send(1))
        wait_until(lambda: waiting(work.broker) == 7)
    for thread in threads:
        thread.join(DEADLINE)

    assert raised == []
    assert 2 <= len(disk.flushed) < 1 + 6  # One may be late: what it sent is seen before it waits.


def test_a_flush_keeps_nobody_from_the_database(disk, work, make_file_broker):
    with held_up(disk, work):
        make_file_broker(durability="normal")
        dramalite.actor(print, actor_name="other").send(1)
        flushed_by_then = list(disk.flushed)

    assert flushed_by_then == []
    assert waiting(work.broker) == 2


def test_a_worker_runs_a_message_whose_sender_still_waits_for_the_disk(disk, worker, make_file_broker):
    broker = make_file_broker(durability="full")
    received = []
    work = dramalite.actor(received.append, actor_name="work")
    worker(broker)
    with held_up(disk, work) as raised:
        wait_until(lambda: received)

    assert raised == []


def broken(count=1):
    """Errors of a broken disk."""
    return [OSError(errno.EIO, "the disk is broken") for _ in range(count)]


def test_what_cannot_be_flushed_is_moved_into_the_database_instead(disk, work):
    work.send(0)
    disk.errors = broken()
    work.send(1)
    log_size = os.stat(f"{work.broker.path}-wal").st_size
    work.send(2)

    assert log_size == 0
    assert waiting(work.broker) == 3
    assert len(disk.flushed) == 3


def test_what_can_neither_be_flushed_nor_moved_fails_the_send_and_says_that_it_may_be_there(disk, work):
    work.send(0)
    disk.errors = broken()
    with unmovable_log(work.broker), pytest.raises(BrokerError) as raised:
        work.send(1)

    assert "queue.db" in str(raised.value)
    assert "may not be on its disk" in str(raised.value)
    assert "the disk is broken" in str(raised.value)
    assert waiting(work.broker) == 2


def test_after_a_failed_flush_nothing_counts_as_flushed_until_the_log_was_moved(disk, work):
    # A system tells of such an error once: the next flush would succeed, behind a hole in the log.
    work.send(0)
    disk.errors = broken()
    with unmovable_log(work.broker):
        for number in range(3):
            with pytest.raises(BrokerError, match="may not be on its disk"):
                work.send(number)
    work.send(3)
    log_size = os.stat(f"{work.broker.path}-wal").st_size

    assert log_size == 0
    assert waiting(work.broker) == 5


def test_a_failed_flush_fails_the_sends_of_others_too_until_the_log_was_moved(disk, work, make_file_broker):
    work.send(0)
    other = make_file_broker(durability="full")
    message = dramalite.actor(print, actor_name="other", broker=other).message()
    with dramalite.Worker(other):  # They hear of each other where there was a worker.
        pass
    disk.errors = broken()
    with unmovable_log(work.broker):
        with pytest.raises(BrokerError, match="may not be on its disk"):
            work.send(1)
        with pytest.raises(BrokerError, match="by another process has failed"):
            other.enqueue(message)
    other.enqueue(message)
    flushes = len(disk.flushed)
    other.enqueue(message)

    assert len(disk.flushed) == flushes + 1
    assert os.stat(f"{work.broker.path}-wal").st_size > 0  # The last one was flushed, and no more.


def test_threads_that_send_while_one_moves_the_log_after_a_failed_flush_wait_for_it(disk, work):
    work.send(0)
    disk.errors = broken()
    first_raised, raised = raised_by_sends(disk, work, 6, messages=8)

    assert first_raised == raised == []


def test_a_failed_flush_fails_all_that_wait_for_it(disk, work):
    work.send(0)
    with unmovable_log(work.broker):
        disk.errors = broken()
        first_raised, raised = raised_by_sends(disk, work, 3, messages=5)

    assert [len(first_raised), len(raised)] == [1, 3]
    assert all("may not be on its disk" in str(error) for error in first_raised + raised)


def test_a_flush_that_a_signal_handler_ended_counts_for_nobody(disk, work):
    disk.errors = [KeyboardInterrupt()]
    first_raised, raised = raised_by_sends(disk, work, 2, messages=3)

    assert [type(error) for error in first_raised] == [KeyboardInterrupt]
    assert raised == []
    assert len(disk.flushed) >= 2


def test_a_full_disk_that_shows_at_the_flush_fails_the_send(disk, work):
    work.send(0)
    disk.errors = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]
    with unmovable_log(work.broker), pytest.raises(BrokerError, match="No space left"):
        work.send(1)


def test_a_broker_can_be_closed_while_others_wait_for_the_disk(disk, work):
    with held_up(disk, work) as first_raised:
        threads, raised = in_threads(1, lambda: work.send(1))
        wait_until(lambda: waiting(work.broker) == 2)
        work.broker.close()
    for thread in threads:
        thread.join(DEADLINE)

    assert (first_raised, raised) == ([], [])
    assert len(disk.flushed) == 2
    assert [name for name in os.listdir("/proc/self/fd") if leads_to_log(name)] == []


def leads_to_log(name):
    with contextlib.suppress(FileNotFoundError):
        return os.readlink(f"/proc/self/fd/{name}").endswith("queue.db-wal")


def test_a_signal_handler_may_send_while_another_thread_closes_and_this_one_flushes(disk, work):
    work.send(0)
    closing = threading.Thread(target=work.broker.close)

    def close_and_send():
        if not closing.ident:
            closing.start()
            closing.join(0.1)  # Long enough to be inside; to come too early proves nothing.
            work.send("within")

    disk.on_flush = close_and_send
    work.send(1)
    closing.join(DEADLINE)

    assert not closing.is_alive()
    assert waiting(work.broker) == 3


def test_a_send_within_a_flush_of_the_same_thread_is_flushed_too(disk, work):
    sent = []

    def send_once():
        if not sent:
            sent.append(1)
            work.send("within")

    disk.on_flush = send_once
    work.send("first")

    assert waiting(work.broker) == 2
    assert len(disk.flushed) == 2


@pytest.mark.parametrize("act", ["flush", "result"])
def test_other_writes_of_a_program_are_flushed_too(disk, make_file_broker, act):
    broker = make_file_broker(durability="full")
    results = dramalite.SQLiteResultBackend(broker=broker)
    work = dramalite.actor(print, actor_name="work")
    message = work.send(1)
    before = len(disk.flushed)
    if act == "flush":
        broker.flush("default")
    else:
        results.store_result(message, "done", ttl=60_000)

    assert len(disk.flushed) == before + 1


def test_a_forked_child_flushes_through_a_file_of_its_own(disk, work):
    work.send(0)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work.send(1)
            status = 0 if disk.flushed == ["queue.db-wal"] * 2 else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    work.send(2)

    assert os.waitstatus_to_exitcode(status) == 0
    assert waiting(work.broker) == 3
    assert disk.flushed == ["queue.db-wal"] * 2


def send_within_a_write(work):
    """Send while this very thread writes to the database, as a signal handler may."""

    def keys():
        work.send("within")
        return []

    limits = dramalite.SQLiteRateLimiterBackend(broker=work.broker)
    return limits.incr_and_sum("limit", keys, 1, 1, 60_000)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="There is no fork here.")
def test_a_child_that_was_forked_in_the_middle_of_a_write_is_told_so_at_once(work):
    work.send(0)

    def fork():
        if os.fork() == 0:
            forked.append(1)
        return []

    forked = []
    limits = dramalite.SQLiteRateLimiterBackend(broker=work.broker)
    try:
        limits.incr_and_sum("limit", fork, 1, 1, 60_000)
        if forked:
            try:
                work.send(1)
            except BrokerError as error:
                if os.fork() == 0:  # Nor can a child of that child.
                    forked.append(2)
                    with pytest.raises(BrokerError, match="forked by a signal handler"):
                        work.send(1)
                    os._exit(0)
                status = os.waitstatus_to_exitcode(os.wait()[1])
                os._exit(status if "forked by a signal handler" in str(error) else 1)
    finally:
        if forked:
            os._exit(2)
    _pid, status = os.wait()
    work.send(2)

    assert os.waitstatus_to_exitcode(status) == 0
    assert waiting(work.broker) == 2


def test_a_database_of_two_names_is_warned_of(work, caplog, make_file_broker):
    work.send(0)
    work.broker.close()
    os.link(work.broker.path, f"{work.broker.path}-2")
    make_file_broker("queue.db-2")
    dramalite.actor(print, actor_name="other").send(1)

    assert "another name, a hard link" in caplog.text


def test_what_a_signal_handler_sent_is_flushed_by_the_write_it_interrupted(disk, work):
    work.send(0)
    is_written = send_within_a_write(work)

    assert is_written
    assert waiting(work.broker) == 2
    assert len(disk.flushed) == 2


@pytest.mark.parametrize("trouble", ["store", "flush"])
def test_a_signal_handlers_send_that_fails_later_is_logged(disk, work, caplog, trouble):
    work.send(0)
    if trouble == "store":
        with contextlib.closing(sqlite3.connect(work.broker.path)) as connection:
            refuse = "BEFORE INSERT ON dramalite_messages BEGIN SELECT RAISE(ABORT, 'refused'); END"
            connection.execute(f"CREATE TRIGGER refuse {refuse}")
    else:
        disk.errors = broken()
    with unmovable_log(work.broker):
        is_written = send_within_a_write(work)

    assert is_written
    assert ["A send in a signal handler or finalizer failed" in text for text in caplog.messages] == [True]


def test_the_log_is_closed_without_harm_to_a_lock_of_sqlite(disk, work, run_python):
    work.send(0)
    with contextlib.closing(sqlite3.connect(work.broker.path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("DELETE FROM dramalite_messages")
        with open(f"{work.broker.path}-wal", "rb+"):
            pass
        other = "c = sqlite3.connect('queue.db', timeout=0, isolation_level=None)"
        refused = run_python(f"import sqlite3; {other}; c.execute('BEGIN IMMEDIATE')")
        connection.execute("ROLLBACK")

    assert "database is locked" in refused.stderr


def test_messages_are_sent_and_worked_where_there_can_be_no_log(no_log, make_file_broker, worker, tmp_path):
    done, broker = [], make_file_broker(durability="full")
    dramalite.actor(done.append, actor_name="work").send(1)
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert done == [1]
    assert not (tmp_path / "queue.db-wal").exists()
