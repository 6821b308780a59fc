"""The brokers in a file and in memory: storing, order, delays, join, flush and dead letters."""

import asyncio
import contextlib
import gc
import logging
import os
import queue
import sqlite3
import stat
import sys
import threading
import time
import weakref

import pytest

import dramalite
from dramalite import Message, QueueJoinTimeout

from helpers import DEADLINE, wait_until

PATIENCE = DEADLINE * 1000
HOUR = 3_600_000
DAY = 24 * HOUR


def fail_with(error):
    """A function for an actor that always fails with `error`."""

    def fail(*args):
        raise error

    return fail


def tables(path):
    """The names of the tables in the SQLite file at `path`."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        return {name for (name,) in rows if not name.startswith("sqlite_")}


# The file


def test_constructing_a_broker_opens_no_file(make_file_broker, tmp_path):
    broker = make_file_broker()
    dramalite.actor(print, actor_name="work").message(1)
    broker.close()

    assert list(tmp_path.iterdir()) == []


def test_the_file_appears_at_the_first_send(make_file_broker, tmp_path):
    make_file_broker()
    work = dramalite.actor(print, actor_name="work")
    before = (tmp_path / "queue.db").exists()
    work.send(1)

    assert (before, (tmp_path / "queue.db").exists()) == (False, True)


def test_the_path_may_be_text(tmp_path, clean_state):
    broker = dramalite.SQLiteBroker(str(tmp_path / "text.db"))
    clean_state.callback(broker.close)
    dramalite.actor(print, actor_name="work", broker=broker).send(1)

    assert (tmp_path / "text.db").exists()


def test_the_path_may_be_bytes(tmp_path, clean_state):
    broker = dramalite.SQLiteBroker(os.fsencode(tmp_path / "bytes.db"))
    clean_state.callback(broker.close)
    dramalite.actor(print, actor_name="work", broker=broker).send(1)

    assert (tmp_path / "bytes.db").exists()


@pytest.mark.parametrize(
    "path",
    [
        "sqlite:///queue.db",
        "redis://localhost/0",
        pytest.param("\ud800.db", marks=pytest.mark.skipif(sys.platform == "win32", reason="Windows can name it")),
    ],
)
def test_a_path_that_names_no_file_is_refused_and_shown(path):
    with pytest.raises(ValueError) as raised:
        dramalite.SQLiteBroker(path)

    assert repr(path) in str(raised.value)


@pytest.mark.skipif(sys.platform == "win32", reason="makes a symbolic link")
def test_a_path_that_leaves_a_linked_folder_names_the_file_that_sqlite_would_open(tmp_path, clean_state):
    (tmp_path / "releases" / "5").mkdir(parents=True)
    (tmp_path / "current").symlink_to("releases/5")
    broker = dramalite.SQLiteBroker("current/../queue.db")
    clean_state.callback(broker.close)
    dramalite.actor(print, actor_name="work", broker=broker).send(1)

    assert "dramalite_messages" in tables("current/../queue.db")
    assert not (tmp_path / "queue.db").exists()


@pytest.mark.parametrize("size", [None, "1MB", 1.5])
def test_a_largest_size_that_is_no_number_of_bytes_is_refused_by_name(tmp_path, size):
    with pytest.raises(TypeError, match="max_message_size"):
        dramalite.SQLiteBroker(tmp_path / "queue.db", max_message_size=size)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX file modes")
def test_the_files_belong_to_their_owner_alone(make_file_broker, worker, tmp_path):
    mask = os.umask(0o000)
    try:
        broker = make_file_broker()
        dramalite.actor(lambda: None, actor_name="work").send()
        worker(broker)
        broker.join("default", timeout=PATIENCE)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(mask)

    assert "queue.db" in modes
    assert set(modes.values()) == {0o600}


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX file modes")
@pytest.mark.parametrize(("mode", "is_told"), [(0o700, False), (0o770, False), (0o777, True), (0o1777, True)], ids=oct)
def test_a_folder_where_every_user_may_write_is_told_of_once(tmp_path, caplog, clean_state, mode, is_told):
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(mode)
    broker = dramalite.SQLiteBroker(folder / "queue.db")
    clean_state.callback(broker.close)
    work = dramalite.actor(print, actor_name="work", broker=broker)
    work.send(1)
    broker.close()
    work.send(2)

    assert ["every user" in record.getMessage() for record in caplog.records] == [True] * is_told


def side_file_of(database, worker):
    """Have a worker work on the application's database; the side file that it makes."""
    broker = dramalite.SQLiteBroker(database)
    dramalite.actor(lambda: None, actor_name="work", broker=broker).send()
    started = worker(broker)
    broker.join("default", timeout=PATIENCE)
    started.stop()
    broker.close()
    return database.with_name(database.name + "-lock").stat()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX file modes")
@pytest.mark.parametrize("mode", [0o660, 0o666], ids=oct)
def test_the_side_file_is_for_those_who_may_use_the_database(tmp_path, worker, mode):
    (tmp_path / "app.db").touch()
    (tmp_path / "app.db").chmod(mode)

    assert stat.S_IMODE(side_file_of(tmp_path / "app.db", worker).st_mode) == mode


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="gives a file away, as root can")
def test_the_side_file_that_root_makes_belongs_to_the_databases_owner(tmp_path, worker):
    (tmp_path / "app.db").touch()
    os.chown(tmp_path / "app.db", 12345, 12346)
    side_file = side_file_of(tmp_path / "app.db", worker)

    assert (side_file.st_uid, side_file.st_gid) == (12345, 12346)


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="gives a file away, as root can")
@pytest.mark.parametrize("is_link", [False, True])
def test_a_strangers_file_in_a_folder_where_every_user_may_write_is_refused(tmp_path, is_link):
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o777)
    path = folder / "queue.db"
    if is_link:
        path.symlink_to(tmp_path / "mine.db")
        (tmp_path / "mine.db").touch()
    else:
        path.touch()
    os.lchown(path, 12345, 12345)
    work = dramalite.actor(print, actor_name="work", broker=dramalite.SQLiteBroker(path))
    with pytest.raises(dramalite.ConnectionFailed, match="another user"):
        work.send(1)
    size = path.stat().st_size
    folder.chmod(0o755)
    work.send(2)
    work.broker.close()

    assert size == 0
    assert path.stat().st_size > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's table of mounts")
@pytest.mark.parametrize(("kind", "is_told"), [("ext4", False), ("nfs4", True), ("9p", True)])
def test_a_network_file_system_is_told_of(tmp_path, caplog, clean_state, monkeypatch, kind, is_told):
    number = tmp_path.stat().st_dev
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "21 1 0:999 / /proc rw - cifs proc rw\n"
        f"22 1 {os.major(number)}:{os.minor(number)} / /with\\040space rw,noatime shared:1 master:2 - {kind} server:/x rw\n"
    )
    real_open = open
    monkeypatch.setattr(
        "builtins.open",
        lambda path, *args, **kwargs: real_open(
            mounts if path == "/proc/self/mountinfo" else path, *args, **kwargs
        ),
    )
    broker = dramalite.SQLiteBroker(tmp_path / "queue.db")
    clean_state.callback(broker.close)
    dramalite.actor(print, actor_name="work", broker=broker).send(1)

    assert [f"of type {kind}" in record.getMessage() for record in caplog.records] == [True] * is_told


def test_all_tables_have_the_prefix(make_file_broker, tmp_path):
    make_file_broker()
    dramalite.actor(print, actor_name="work").send(1)
    names = tables(tmp_path / "queue.db")

    assert names
    assert {name for name in names if not name.startswith("dramalite_")} == set()


def test_an_applications_database_is_shared_and_left_alone(make_file_broker, worker, tmp_path):
    path = tmp_path / "queue.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "PRAGMA user_version = 42;"
            "PRAGMA application_id = 4711;"
            "CREATE TABLE notes (text);"
            "INSERT INTO notes VALUES ('mine');"
        )
    broker = make_file_broker()
    done = []
    dramalite.actor(done.append, actor_name="work").send(1)
    worker(broker)
    broker.join("default", timeout=PATIENCE)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        kept = [
            connection.execute(query).fetchall()
            for query in ("PRAGMA user_version", "PRAGMA application_id", "SELECT * FROM notes")
        ]

    assert done == [1]
    assert kept == [[(42,)], [(4711,)], [("mine",)]]


def test_the_log_beside_an_applications_database_of_large_pages_stays_short(make_file_broker, tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as connection:
        connection.execute("PRAGMA page_size = 65536")
        connection.execute("CREATE TABLE application (x)")
    make_file_broker()
    work = dramalite.actor(print, actor_name="work")
    longest = 0
    for number in range(60):
        work.send(number)
        longest = max(longest, (tmp_path / "queue.db-wal").stat().st_size)

    assert longest < 3 << 20


def test_a_file_that_is_no_database_is_refused_by_name_and_left_alone(make_file_broker, tmp_path):
    path = tmp_path / "queue.db"
    content = b"This is a letter to my aunt.\n" * 200
    path.write_bytes(content)
    make_file_broker()
    work = dramalite.actor(print, actor_name="work")
    with pytest.raises(dramalite.BrokerError) as raised:
        work.send(1)

    assert "queue.db" in str(raised.value)
    assert path.read_bytes() == content


def test_a_folder_that_is_not_there_is_a_broker_error_with_the_path(make_file_broker):
    make_file_broker("no/such/folder/queue.db")
    work = dramalite.actor(print, actor_name="work")
    with pytest.raises(dramalite.BrokerError) as raised:
        work.send(1)

    assert "folder" in str(raised.value)


def test_messages_wait_in_the_file_for_another_broker(make_file_broker, worker):
    sender = make_file_broker()
    dramalite.actor(print, actor_name="work", broker=sender).send("stored")
    sender.close()
    receiver = make_file_broker()
    received = []
    dramalite.actor(received.append, actor_name="work", broker=receiver)
    worker(receiver)
    receiver.join("default", timeout=PATIENCE)

    assert received == ["stored"]


def test_messages_wait_in_the_file_for_another_process(make_file_broker, worker, run_python):
    done = run_python(
        "import dramalite\n"
        "broker = dramalite.SQLiteBroker('queue.db')\n"
        "@dramalite.actor(broker=broker)\n"
        "def work(value): pass\n"
        "work.send('from afar')\n"
    )
    broker = make_file_broker()
    received = []
    dramalite.actor(received.append, actor_name="work")
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert (done.returncode, done.stderr) == (0, "")
    assert received == ["from afar"]


def test_a_worker_is_woken_by_a_send_through_another_broker_on_the_file(make_file_broker, worker):
    sender, receiver = make_file_broker(), make_file_broker()
    received = threading.Event()
    dramalite.actor(lambda: received.set(), actor_name="work", broker=receiver)
    remote = dramalite.actor(lambda: None, actor_name="work", broker=sender)
    worker(receiver)
    remote.send()

    assert received.wait(DEADLINE)


def test_a_closed_broker_opens_again_at_the_next_use(make_file_broker, worker):
    broker = make_file_broker()
    received = []
    work = dramalite.actor(received.append, actor_name="work")
    work.send(1)
    broker.close()
    work.send(2)
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert received == [1, 2]


@pytest.mark.parametrize("durability", ["full", "normal"])
def test_work_is_done_at_either_durability(make_file_broker, worker, durability):
    broker = make_file_broker(durability=durability)
    received = []
    dramalite.actor(received.append, actor_name="work").send(1)
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert received == [1]


def test_an_unknown_durability_is_refused(tmp_path):
    with pytest.raises(ValueError) as raised:
        dramalite.SQLiteBroker(tmp_path / "queue.db", durability="eternal")

    assert "'eternal'" in str(raised.value)


def test_two_files_are_two_queues(make_file_broker, worker):
    one, two = make_file_broker("one.db"), make_file_broker("two.db")
    received = []
    dramalite.actor(lambda: received.append("one"), actor_name="work", broker=one).send()
    dramalite.actor(lambda: received.append("two"), actor_name="work", broker=two).send()
    worker(two)
    two.join("default", timeout=PATIENCE)

    assert received == ["two"]


def test_memory_brokers_share_nothing(clean_state, worker):
    brokers = [dramalite.MemoryBroker(), dramalite.MemoryBroker()]
    received = []
    for number, broker in enumerate(brokers):
        clean_state.callback(broker.close)
        dramalite.actor(
            lambda number=number: received.append(number), actor_name="work", broker=broker
        ).send()
    worker(brokers[1])
    brokers[1].join("default", timeout=PATIENCE)

    assert received == [1]


def test_a_memory_broker_writes_no_file(clean_state, worker, tmp_path):
    broker = dramalite.MemoryBroker()
    clean_state.callback(broker.close)
    dramalite.actor(lambda: None, actor_name="work", broker=broker).send()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert list(tmp_path.iterdir()) == []


def test_a_stub_broker_is_a_memory_broker(stub_broker):
    assert isinstance(stub_broker, dramalite.MemoryBroker)
    assert isinstance(stub_broker, dramalite.Broker)


def test_a_file_broker_and_a_memory_broker_have_dramatiqs_middleware_and_results(broker):
    types = [type(item) for item in broker.middleware]

    assert [item for item in types if item in dramalite.default_middleware] == (
        dramalite.default_middleware
    )
    assert dramalite.Results in types


# Order


def test_messages_are_worked_in_the_order_they_were_sent(broker, worker):
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    for number in range(50):
        work.send(number)
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert done == list(range(50))


def test_a_lower_priority_number_goes_first(broker, worker):
    done = []
    low = dramalite.actor(lambda: done.append("low"), actor_name="low", priority=10)
    urgent = dramalite.actor(lambda: done.append("urgent"), actor_name="urgent", priority=-1)
    usual = dramalite.actor(lambda: done.append("usual"), actor_name="usual")
    for actor in [low, usual, urgent, usual, low, urgent]:
        actor.send()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert done == ["urgent", "urgent", "usual", "usual", "low", "low"]


def test_a_messages_own_priority_overrides_its_actors(broker, worker):
    done = []
    work = dramalite.actor(done.append, actor_name="work", priority=5)
    work.send_with_options(args=("usual",))
    work.send_with_options(args=("later",), priority=6)
    work.send_with_options(args=("zero",), priority=0)
    work.send_with_options(args=("urgent",), priority=-3)
    work.send_with_options(args=("usual too",), priority=5)
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert done == ["urgent", "zero", "usual", "usual too", "later"]


def test_priority_holds_across_queues(broker, worker):
    done = []
    slow = dramalite.actor(
        lambda: done.append("slow"), actor_name="slow", queue_name="a", priority=9
    )
    fast = dramalite.actor(
        lambda: done.append("fast"), actor_name="fast", queue_name="b", priority=1
    )
    for actor in [slow, fast, slow, fast]:
        actor.send()
    worker(broker)
    broker.join("a", timeout=PATIENCE)
    broker.join("b", timeout=PATIENCE)

    assert done == ["fast", "fast", "slow", "slow"]


def test_an_urgent_message_overtakes_a_backlog_while_a_worker_runs(broker, worker):
    done = []
    running, go_on = threading.Event(), threading.Event()

    def block():
        running.set()
        go_on.wait(DEADLINE)

    first = dramalite.actor(block, actor_name="first")
    slow = dramalite.actor(lambda: done.append("backlog"), actor_name="slow", priority=5)
    urgent = dramalite.actor(lambda: done.append("urgent"), actor_name="urgent", priority=0)
    first.send()
    worker(broker)
    running.wait(DEADLINE)
    for _ in range(20):
        slow.send()
    urgent.send()
    go_on.set()
    broker.join("default", timeout=PATIENCE)

    assert done == ["urgent"] + ["backlog"] * 20


# Delays


def test_a_delayed_message_runs_at_its_time_and_not_before(broker, worker):
    started, late_ms = [], []
    clock = dramalite.Clock()
    work = dramalite.actor(lambda: started.append(clock.time_ms()), actor_name="work")
    worker(broker)
    for _ in range(5):  # The best of five counts, for the machine may be busy.
        eta = work.send_with_options(delay=60).options["eta"]
        broker.join("default", timeout=PATIENCE)
        late_ms.append(started[-1] - eta)

    assert len(started) == 5
    assert 0 <= min(late_ms) < 500


def test_a_message_delayed_by_a_day_waits_until_the_day_is_over(make_broker, clock, worker):
    broker = make_broker(clock=clock)
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    work.send_with_options(args=("tomorrow",), delay=DAY)
    work.send("today")
    clock.advance(DAY - 1)
    first = worker(broker)
    wait_until(lambda: done)
    with pytest.raises(QueueJoinTimeout):
        broker.join("default", timeout=30)
    first.stop()
    before = list(done)
    clock.advance(1)
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert before == ["today"]
    assert done == ["today", "tomorrow"]


def test_delayed_messages_run_in_the_order_of_their_times(make_broker, clock, worker):
    broker = make_broker(clock=clock)
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    for delay in [3 * HOUR, HOUR, 2 * HOUR]:
        work.send_with_options(args=(delay // HOUR,), delay=delay)
    for hours in [1, 2, 3]:
        clock.advance(HOUR)
        started = worker(broker)
        wait_until(lambda: len(done) == hours)
        started.stop()

    assert done == [1, 2, 3]


def test_delayed_messages_that_are_due_together_run_in_the_order_of_their_times(
    make_broker, clock, worker
):
    broker = make_broker(clock=clock)
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    for hours in [3, 1, 2]:
        work.send_with_options(args=(hours,), delay=hours * HOUR)
    clock.advance(DAY)
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert done == [1, 2, 3]


def test_the_most_urgent_of_many_messages_that_are_due_together_runs_first(make_broker, clock, worker):
    broker = make_broker(clock=clock)
    done = []
    work = dramalite.actor(lambda: done.append("work"), actor_name="work", priority=10)
    urgent = dramalite.actor(lambda: done.append("urgent"), actor_name="urgent", priority=0)
    soon, later = clock.time_ms() + 1000, clock.time_ms() + 2000
    broker.enqueue_many([work.message_with_options(eta=soon) for _ in range(1500)])
    broker.enqueue(urgent.message_with_options(eta=later))
    clock.advance(HOUR)
    worker(broker)
    wait_until(lambda: done)

    assert done[0] == "urgent"


def test_times_apart_by_real_milliseconds_are_kept_in_order_too(broker, worker):
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    worker(broker)
    now = dramalite.Clock().time_ms()
    # At once: what a sender stores late, for it was held up, can only run late.
    broker.enqueue_many([work.message_with_options(args=(delay,), eta=now + delay) for delay in (90, 30, 60, 0)])
    broker.join("default", timeout=PATIENCE)

    assert done == [0, 30, 60, 90]


def test_far_messages_do_not_hide_near_ones(make_broker, clock, worker):
    broker = make_broker(clock=clock)
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    for _ in range(300):
        work.send_with_options(args=("far",), delay=DAY)
    work.send_with_options(args=("near",), delay=HOUR)
    clock.advance(HOUR)
    worker(broker)
    wait_until(lambda: done)

    assert done == ["near"]


def test_a_message_with_a_time_is_honoured_on_its_own_queue_too(make_broker, clock, worker):
    broker = make_broker(clock=clock)
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    eta = clock.time_ms() + HOUR
    broker.enqueue(work.message_with_options(args=("later",), eta=eta))
    broker.enqueue(work.message_with_options(args=("now",), eta=None))
    first = worker(broker)
    wait_until(lambda: done)
    with pytest.raises(QueueJoinTimeout):
        broker.join("default", timeout=30)
    first.stop()
    before = list(done)
    clock.advance(HOUR)
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert before == ["now"]
    assert done == ["now", "later"]


def test_a_message_whose_time_is_no_number_runs_at_once_with_a_warning(broker, worker, caplog):
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    message = work.message(1)
    broker.enqueue(message.copy(options={"eta": "soon"}))
    worker(broker)
    broker.join("default", timeout=PATIENCE)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]

    assert done == [1]
    assert ["soon" in text and "eta" in text for text in warnings] == [True]


def test_a_delayed_message_runs_under_its_id_on_its_own_queue(broker, worker):
    seen = []

    class Peek(dramalite.Middleware):
        def before_process_message(self, broker, message):
            seen.append((message.message_id, message.message_timestamp, message.queue_name))

    broker.add_middleware(Peek())
    work = dramalite.actor(lambda: None, actor_name="work", queue_name="q")
    sent = work.send_with_options(delay=1)
    worker(broker)
    broker.join("q", timeout=PATIENCE)

    assert seen == [(sent.message_id, sent.message_timestamp, "q")]


def test_a_due_message_carries_no_time_any_more(broker, worker):
    seen = []

    class Peek(dramalite.Middleware):
        def before_process_message(self, broker, message):
            seen.append(message.options)

    broker.add_middleware(Peek())
    dramalite.actor(lambda: None, actor_name="work").send_with_options(delay=1, colour="red")
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert seen == [{"colour": "red"}]


# Names of queues


@pytest.mark.parametrize("name", ["default", "default.DQ", "default.XQ"])
def test_the_names_for_delayed_and_dead_messages_mean_their_queue(broker, name):
    work = dramalite.actor(print, actor_name="work")
    sent = broker.enqueue(work.message(1)._replace(queue_name=name))
    consumer = broker.consume(name, timeout=0)
    taken = next(consumer)
    consumer.close()
    waiting = [queue.qsize() for queue in broker.queues.values()]
    broker.flush(name)

    assert (sent.queue_name, taken.queue_name) == (name, "default")
    assert waiting == [1]
    assert broker.join(name, timeout=PATIENCE) is None


@pytest.mark.parametrize("name", ["default", "default.DQ", "default.XQ"])
def test_a_message_is_delayed_in_the_one_delay_queue_of_its_queue(broker, name):
    message = dramalite.actor(print, actor_name="work").message(1)
    sent = broker.enqueue(message._replace(queue_name=name), delay=HOUR)

    assert sent.queue_name == "default.DQ"
    assert broker.get_declared_queues() == {"default"}
    assert broker.get_declared_delay_queues() == {"default.DQ"}


# Join


def test_join_returns_at_once_if_nothing_waits(broker):
    broker.declare_queue("default")

    assert broker.join("default", timeout=PATIENCE) is None


def test_join_waits_until_the_work_is_done(broker, worker):
    done = []
    running, go_on = threading.Event(), threading.Event()

    def work():
        running.set()
        go_on.wait(DEADLINE)
        done.append(1)

    dramalite.actor(work).send()
    worker(broker)
    running.wait(DEADLINE)
    threading.Timer(0.02, go_on.set).start()
    broker.join("default", timeout=PATIENCE)

    assert done == [1]


def test_join_times_out_while_work_waits(broker):
    dramalite.actor(print, actor_name="work").send(1)
    before = time.monotonic()
    with pytest.raises(QueueJoinTimeout):
        broker.join("default", timeout=50)
    waited = time.monotonic() - before

    assert 0.045 <= waited < DEADLINE


def test_join_waits_for_delayed_messages(broker, worker):
    done = []
    dramalite.actor(done.append, actor_name="work").send_with_options(args=(1,), delay=50)
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert done == [1]


def test_join_waits_for_retries(broker, worker):
    attempts = []

    def work():
        attempts.append(1)
        if len(attempts) < 4:
            raise ValueError("again")

    dramalite.actor(work, min_backoff=5, max_backoff=5).send()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert len(attempts) == 4


def test_a_join_is_not_disturbed_where_another_thread_closes_the_broker_at_any_step(make_file_broker, monkeypatch):
    broker, steps = make_file_broker(), queue.SimpleQueue()
    dramalite.actor(print, actor_name="work").send()

    def close():
        for is_closed in iter(steps.get, None):
            broker.close()
            is_closed.set()

    def have_it_closed(frame, event, _argument):
        callers = (frame.f_back, frame.f_back.f_back)
        if event == "call" and any(caller.f_code is dramalite.MemoryBroker.join.__code__ for caller in callers):
            is_closed = threading.Event()
            steps.put(is_closed)
            is_closed.wait(0.05)  # Or it needs what this thread holds, and is done later.

    closing = threading.Thread(target=close)
    closing.start()
    # None that listens for other processes, or it would keep open what join() asks for a worker.
    monkeypatch.setattr(threading.Thread, "start", fail_with(RuntimeError("can't start new thread")))
    sys.setprofile(have_it_closed)
    try:
        with pytest.raises(QueueJoinTimeout):
            broker.join("default", timeout=1)
    finally:
        sys.setprofile(None)
        steps.put(None)
        closing.join(DEADLINE)


def test_join_does_not_wait_for_other_queues(broker, worker):
    done = []
    dramalite.actor(print, actor_name="other", queue_name="unserved").send(1)
    dramalite.actor(done.append, actor_name="work").send(1)
    worker(broker, queues={"default"})
    broker.join("default", timeout=PATIENCE)

    assert done == [1]


def test_joining_a_queue_that_nobody_declared_is_an_error_on_the_stub_broker(stub_broker):
    with pytest.raises(dramalite.QueueNotFound):
        stub_broker.join("nowhere")


def test_joins_that_time_out_leave_no_threads_behind(stub_broker):
    dramalite.actor(print, actor_name="work").send()
    before = threading.active_count()
    for _ in range(5):
        with pytest.raises(QueueJoinTimeout):
            stub_broker.join("default", timeout=2)

    assert threading.active_count() <= before


def test_a_stub_broker_raises_an_old_dead_letters_error_until_all_is_flushed(stub_broker, worker):
    dramalite.actor(fail_with(ValueError("no")), actor_name="work", max_retries=0).send()
    worker(stub_broker)
    for _ in range(2):
        with pytest.raises(ValueError):
            stub_broker.join("default", timeout=PATIENCE)
    stub_broker.flush_all()

    assert stub_broker.join("default", timeout=PATIENCE) is None


def test_a_stub_broker_raises_the_jobs_own_error_from_join(stub_broker, worker):
    error = ValueError("no")
    dramalite.actor(fail_with(error), max_retries=0).send()
    worker(stub_broker)
    with pytest.raises(ValueError) as raised:
        stub_broker.join("default", timeout=PATIENCE)

    assert raised.value is error


def test_a_stub_broker_raises_an_error_that_is_false_too(stub_broker, worker):
    class Falsy(Exception):
        def __len__(self):
            return 0

    dramalite.actor(fail_with(Falsy("no")), max_retries=0).send()
    worker(stub_broker)

    with pytest.raises(Falsy):
        stub_broker.join("default", timeout=PATIENCE, fail_fast=True)


def test_a_stub_broker_raises_the_error_of_each_of_many_jobs(stub_broker, worker):
    work = dramalite.actor(fail_with(ValueError("no")), max_retries=0)
    raised = 0
    worker(stub_broker)
    for _ in range(150):
        work.send()
        try:
            stub_broker.join("default", timeout=PATIENCE)
        except ValueError:
            raised += 1
        stub_broker.flush_all()

    assert raised == 150


def test_a_stub_broker_can_be_told_not_to_raise(stub_broker, worker):
    dramalite.actor(fail_with(ValueError("no")), max_retries=0).send()
    worker(stub_broker)
    stub_broker.join("default", timeout=PATIENCE, fail_fast=False)

    assert len(stub_broker.dead_letters) == 1


def test_a_stub_broker_can_be_made_not_to_raise(make_stub_broker, worker):
    broker = make_stub_broker(fail_fast_default=False)
    dramalite.actor(fail_with(ValueError("no")), max_retries=0).send()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    with pytest.raises(ValueError):
        broker.join("default", timeout=PATIENCE, fail_fast=True)


def test_a_stub_broker_raises_for_an_unknown_actor(stub_broker, worker):
    stub_broker.declare_queue("default")
    stub_broker.enqueue(Message("default", "nobody", (), {}, {}))
    worker(stub_broker)

    with pytest.raises(dramalite.ActorNotFound):
        stub_broker.join("default", timeout=PATIENCE)


# Flush


@pytest.mark.parametrize("flush_all", [False, True])
def test_flush_drops_what_waits(broker, worker, flush_all):
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    work.send("dropped")
    broker.flush_all() if flush_all else broker.flush("default")
    work.send("kept")
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert done == ["kept"]


def test_flush_leaves_other_queues_alone(broker, worker):
    done = []
    dramalite.actor(lambda: done.append("a"), actor_name="a", queue_name="a").send()
    dramalite.actor(lambda: done.append("b"), actor_name="b", queue_name="b").send()
    broker.flush("a")
    worker(broker)
    broker.join("a", timeout=PATIENCE)
    broker.join("b", timeout=PATIENCE)

    assert done == ["b"]


def test_flush_all_drops_delayed_messages_too(make_broker, clock, worker):
    broker = make_broker(clock=clock)
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    work.send_with_options(args=("dropped",), delay=HOUR)
    broker.flush_all()
    clock.advance(HOUR)
    work.send("kept")
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert done == ["kept"]


def test_flush_does_not_disturb_what_runs(broker, worker):
    done = []
    running, go_on = threading.Event(), threading.Event()

    def work(value):
        running.set()
        go_on.wait(DEADLINE)
        done.append(value)

    actor = dramalite.actor(work)
    actor.send("running")
    worker(broker)
    running.wait(DEADLINE)
    actor.send("dropped")
    broker.flush("default")
    go_on.set()
    broker.join("default", timeout=PATIENCE)
    actor.send("later")
    broker.join("default", timeout=PATIENCE)

    assert done == ["running", "later"]


def test_a_flushed_stub_queue_has_no_unfinished_tasks(stub_broker):
    work = dramalite.actor(print, actor_name="work")
    work.send(1)
    work.send(2)
    before = stub_broker.queues["default"].unfinished_tasks
    stub_broker.flush_all()

    assert (before, stub_broker.queues["default"].unfinished_tasks) == (2, 0)


def test_a_stub_brokers_queues_hold_encoded_messages(stub_broker, worker):
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    sent = work.send(1)
    size = stub_broker.queues["default"].qsize()
    data = stub_broker.queues["default"].get()
    stub_broker.queues["default"].put(work.message(2).encode())
    worker(stub_broker)
    wait_until(lambda: done)

    assert size == 1
    assert data == sent.encode()
    assert done == [2]


@pytest.mark.parametrize("kind", ["MemoryBroker()", "SQLiteBroker('queue.db')"])
def test_a_copy_of_a_broker_that_failed_leaves_nothing_behind_that_complains(run_python, kind):
    done = run_python(
        "import copy, gc\n"
        "import dramalite\n"
        f"broker = dramalite.{kind}\n"
        "dramalite.actor(print, broker=broker, actor_name='work').send()\n"
        "try:\n"
        "    copy.deepcopy(broker)\n"
        "except TypeError as error:\n"
        "    print(type(error).__name__)\n"
        "gc.collect()\n"
        "print(len(broker.pending()))\n"
    )

    assert (done.stdout.split(), done.stderr) == (["TypeError", "1"], "")


# Dead letters


def fail_for_good(broker, worker, queue_name="default"):
    """Send a message that fails for good; return what was sent once it did."""
    fail = dramalite.actor(
        fail_with(ValueError("no")),
        actor_name=f"fail_{queue_name}",
        queue_name=queue_name,
        max_retries=0,
    )
    sent = fail.send(1)
    worker(broker)
    broker.join(queue_name, timeout=PATIENCE)
    return sent


def test_a_message_that_failed_for_good_is_a_dead_letter(broker, worker):
    sent = fail_for_good(broker, worker)

    assert [letter.message_id for letter in broker.dead_letters] == [sent.message_id]
    assert [letter.args for letter in broker.dead_letters] == [(1,)]


def test_dead_letters_are_kept_by_queue(broker, worker):
    a = fail_for_good(broker, worker, "a")
    b = fail_for_good(broker, worker, "b")
    by_queue = broker.dead_letters_by_queue

    assert [letter.message_id for letter in by_queue["a"]] == [a.message_id]
    assert [letter.message_id for letter in by_queue["b"]] == [b.message_id]
    assert len(by_queue["c"]) == 0
    assert len(broker.dead_letters) == 2


def test_dead_letters_sort_as_their_messages_do(broker, worker):
    fail = dramalite.actor(fail_with(ValueError("no")), actor_name="fail", max_retries=0)
    for number in (3, 1, 2):
        fail.send(number)
    worker(broker)
    broker.join("default", timeout=PATIENCE)
    letters = sorted(broker.dead_letters)

    assert [letter.args for letter in letters] == [(1,), (2,), (3,)]
    assert letters[0] < letters[2] and not letters[2] < letters[0]


def test_a_dead_letter_equals_the_message_as_it_ended(stub_broker, worker):
    stub_broker.declare_queue("default")
    message = Message("default", "nobody", (1,), {"a": 2}, {"colour": "red"})
    stub_broker.enqueue(message)
    worker(stub_broker)
    stub_broker.join("default", timeout=PATIENCE, fail_fast=False)

    assert stub_broker.dead_letters == [message]


def test_a_dead_letter_tells_its_attempts_and_its_traceback(broker, worker):
    fail_for_good(broker, worker)
    (letter,) = broker.dead_letters

    assert letter.options["retries"] == 1
    assert "ValueError: no" in letter.options["traceback"]


def test_dead_letters_are_seen_by_another_broker_on_the_file(make_file_broker, worker):
    first = make_file_broker()
    sent = fail_for_good(first, worker)
    second = make_file_broker()

    assert [letter.message_id for letter in second.dead_letters] == [sent.message_id]


def test_dead_letters_are_kept_for_seven_days(make_file_broker, clock, worker):
    broker = make_file_broker(clock=clock)
    fail_for_good(broker, worker)
    clock.advance(7 * DAY - HOUR)
    first = worker(broker)
    kept = len(broker.dead_letters)
    first.stop()
    clock.advance(2 * HOUR)
    worker(broker)
    wait_until(lambda: len(broker.dead_letters) == 0)

    assert kept == 1


class Data:
    """Something that a failing actor has in its variables."""


def fail_twice(data):
    """Raise an error that comes of another one, with data in the variables."""
    try:
        raise KeyError
    except KeyError as error:
        raise ValueError from error


def fail_with_data(broker, worker, count, kind="sync"):
    """Let an actor of some kind fail so often; returns weak references to what it had in its variables."""
    seen = []

    def begin():
        data = Data()
        seen.append(weakref.ref(data))
        return data

    def fail():
        data = begin()
        fail_twice(data)

    async def fail_async():
        data = begin()
        fail_twice(data)

    def generate():
        data = begin()
        yield fail_twice(data)

    def fail_in_a_generator():
        next(generate())

    fn = {"sync": fail, "async": fail_async, "generator": fail_in_a_generator}[kind]
    actor = dramalite.actor(fn, actor_name="fail", max_retries=0)
    for _ in range(count):
        actor.send()
    worker(broker)
    wait_until(lambda: len(broker.dead_letters) == count)
    return seen


@pytest.fixture
def no_logging():
    """For pytest keeps the records, with what they tell of."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def test_dead_letters_in_a_file_keep_nothing_of_what_failed(make_file_broker, worker, no_logging):
    gc.disable()
    try:
        seen = fail_with_data(make_file_broker(), worker, 20)
        wait_until(lambda: sum(ref() is not None for ref in seen) <= 1)  # The worker's last job.
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["sync", "async", "generator"])
def test_dead_letters_in_memory_keep_the_variables_of_the_last_ones_only(clean_state, worker, kind, no_logging):
    broker = dramalite.MemoryBroker()
    clean_state.callback(broker.close)
    dramalite.set_broker(broker)
    seen = fail_with_data(broker, worker, 150, kind)
    gc.collect()
    alive = [ref() is not None for ref in seen]

    assert sum(alive) in (100, 101)  # With the worker's last job.
    assert alive[0]  # join() raises what that one died of.
    assert not any(alive[1:40])
    assert alive[-1]


def test_a_job_that_waits_outlives_dead_letters_with_the_error_that_it_has_met(clean_state, worker):
    broker = dramalite.MemoryBroker()
    clean_state.callback(broker.close)
    dramalite.set_broker(broker)
    shared, ended = [], []
    go_on = threading.Event()

    @dramalite.actor(max_retries=0)
    async def survive():
        try:
            raise ConnectionError("the one connection is gone")
        except ConnectionError as error:
            shared.append(error)
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        ended.append(1)

    @dramalite.actor(max_retries=0)
    def fail():
        raise shared[0]

    worker(broker)
    survive.send()
    wait_until(lambda: shared)
    for _ in range(120):
        fail.send()
    wait_until(lambda: len(broker.dead_letters) == 120)
    go_on.set()

    wait_until(lambda: ended)


@pytest.mark.parametrize("inner", [{"host": "refused"}, 3, "refused", ["refused"]], ids=repr)
def test_many_errors_that_only_look_like_groups_keep_no_message_from_being_done(
    clean_state, worker, inner, no_logging
):
    broker = dramalite.MemoryBroker()
    clean_state.callback(broker.close)
    done = []

    class BulkError(Exception):
        exceptions = inner

    @dramalite.actor(broker=broker, max_retries=0)
    def work(number):
        if number < 110:
            raise BulkError
        done.append(number)

    broker.enqueue_many([work.message(number) for number in range(120)])
    worker(broker)
    broker.join("default", timeout=PATIENCE, fail_fast=False)

    assert done == list(range(110, 120))
    assert [letter.args for letter in broker.dead_letters] == [(number,) for number in range(110)]


def test_flush_all_forgets_dead_letters_and_later_ones_are_kept(broker, worker):
    fail_for_good(broker, worker)
    broker.flush_all()
    after_flush = list(broker.dead_letters)
    broker.get_actor("fail_default").send(2)
    broker.join("default", timeout=PATIENCE)

    assert after_flush == []
    assert [letter.args for letter in broker.dead_letters] == [(2,)]


def test_what_a_hook_dropped_by_leaving_is_a_dead_letter(broker, worker):
    class Leave(dramalite.Middleware):
        def after_process_message(self, broker, message, *, result=None, exception=None):
            raise SystemExit("no")

    broker.add_middleware(Leave())
    sent = dramalite.actor(lambda: None, actor_name="work").send()
    worker(broker)
    with pytest.raises(Exception, match="A hook"):
        broker.join("default", timeout=PATIENCE, fail_fast=True)

    assert [letter.message_id for letter in broker.dead_letters] == [sent.message_id]


# Queues, as Dramatiq's tests look into them


def test_a_delay_queue_is_found_by_its_name_and_gives_what_is_delayed_in_the_order_of_its_time(broker):
    work = dramalite.actor(print, actor_name="work")
    for delay in (20_000, 10_000):
        work.send_with_options(args=(delay,), delay=delay)
    work.send(0)
    ready, delayed = broker.queues["default"], broker.queues["default.DQ"]

    assert (ready.qsize(), delayed.qsize(), len(broker.queues)) == (1, 2, 1)
    assert [Message.decode(delayed.get()).args for _ in range(2)] == [(10_000,), (20_000,)]
    assert (ready.empty(), delayed.empty()) == (False, True)
    with pytest.raises(queue.Empty):
        delayed.get_nowait()
    for name in ("other.DQ", "default.XQ", "other"):
        with pytest.raises(KeyError):
            broker.queues[name]


def test_a_queue_lists_the_messages_that_wait_in_it_in_their_order_and_keeps_them(broker):
    work = dramalite.actor(print, actor_name="work")
    second, first = work.send(2), work.send_with_options(args=(1,), priority=-1)
    later, sooner = [work.send_with_options(args=(delay,), delay=delay) for delay in (20_000, 10_000)]
    listed = {name: [list(broker.queues[name].queue) for _ in range(2)] for name in ("default", "default.DQ")}

    assert listed["default"] == [[first.encode(), second.encode()]] * 2
    assert listed["default.DQ"] == [[sooner.encode(), later.encode()]] * 2


def test_a_queue_takes_and_gives_as_one_of_the_standard_library(broker):
    work = dramalite.actor(print, actor_name="work")
    default = broker.queues["default"]
    default.put_nowait(work.message(1).encode())
    default.put(work.message(2).encode(), block=False)
    default.put(work.message(3).encode(), True, 1.0)
    taken = [Message.decode(default.get_nowait()).args for _ in range(3)]
    default.task_done()

    assert taken == [(1,), (2,), (3,)]
    assert default.empty() and not default.full()


@pytest.mark.parametrize("name", ["two", "two.DQ"])
def test_what_is_put_into_a_queue_is_in_that_queue_whatever_queue_it_was_made_for(broker, name):
    one = dramalite.actor(print, actor_name="a", queue_name="one")
    dramalite.actor(print, actor_name="b", queue_name="two")
    eta = {"eta": broker.clock.time_ms() + HOUR} if name == "two.DQ" else {}
    broker.queues[name].put(one.message_with_options(args=(1,), **eta).encode())

    assert (broker.queues[name].qsize(), broker.queues["one"].qsize(), broker.queues["one.DQ"].qsize()) == (1, 0, 0)
    assert Message.decode(broker.queues[name].get()).args == (1,)


# Consumers, for code that does without Worker


def test_a_consumer_gives_messages_in_order_and_none_when_there_are_none(broker):
    work = dramalite.actor(print, actor_name="work")
    for number in range(2):
        work.send(number)
    consumer = broker.consume("default", prefetch=5, timeout=10)
    first, second, nothing = next(consumer), next(consumer), next(consumer)
    consumer.close()

    assert iter(consumer) is consumer
    assert [first.args, second.args] == [(0,), (1,)]
    assert isinstance(first, dramalite.MessageProxy)
    assert nothing is None


def test_a_consumer_holds_no_more_than_its_prefetch_until_it_acknowledges(broker):
    work = dramalite.actor(print, actor_name="work")
    for number in range(3):
        work.send(number)
    consumer = broker.consume("default", prefetch=2, timeout=10)
    first, second, nothing = next(consumer), next(consumer), next(consumer)
    consumer.ack(first)
    third = next(consumer)
    consumer.close()

    assert nothing is None
    assert third.args == (2,)


def test_what_a_consumer_acknowledged_is_gone_and_what_it_refused_is_a_dead_letter(broker):
    work = dramalite.actor(print, actor_name="work")
    for number in range(2):
        work.send(number)
    consumer = broker.consume("default", prefetch=2, timeout=10)
    consumer.ack(next(consumer))
    consumer.nack(next(consumer))
    broker.join("default", timeout=PATIENCE)
    consumer.close()

    assert [letter.args for letter in broker.dead_letters] == [(1,)]


@pytest.mark.parametrize("verb", ["ack", "nack"])
def test_acknowledging_twice_does_no_harm(broker, verb):
    dramalite.actor(print, actor_name="work").send(1)
    consumer = broker.consume("default", prefetch=2, timeout=10)
    message = next(consumer)
    consumer.ack(message)
    getattr(consumer, verb)(message)
    broker.join("default", timeout=PATIENCE)
    consumer.close()

    assert list(broker.dead_letters) == []


def test_what_a_closed_consumer_held_goes_back_to_its_place(broker):
    work = dramalite.actor(print, actor_name="work")
    for number in range(3):
        work.send(number)
    consumer = broker.consume("default", prefetch=2, timeout=10)
    next(consumer)
    next(consumer)
    consumer.close()
    another = broker.consume("default", prefetch=3, timeout=10)
    order = [next(another).args for _ in range(3)]
    another.close()

    assert order == [(0,), (1,), (2,)]


@pytest.fixture
def failing(monkeypatch):
    """What is put into this list is raised, once, in place of the next write."""
    connect, errors = sqlite3.connect, []

    class Connection(sqlite3.Connection):
        def execute(self, statement, *values):
            if errors and statement.lstrip().startswith(("BEGIN", "UPDATE")):
                raise errors.pop()
            return super().execute(statement, *values)

    monkeypatch.setattr("sqlite3.connect", lambda *args, **options: connect(*args, factory=Connection, **options))
    return errors


@pytest.mark.parametrize(
    ("verb", "rest"), [("ack", (0, 0, False)), ("nack", (0, 1, False)), ("requeue", (1, 0, True))]
)
def test_what_a_consumer_could_not_write_it_can_write_later(failing, make_broker, verb, rest):
    broker = make_broker()
    dramalite.actor(print, actor_name="work").send()
    consumer = broker.consume("default", timeout=10)
    message = next(consumer)
    what = [message] if verb == "requeue" else message
    failing.append(sqlite3.OperationalError("database or disk is full"))
    with pytest.raises(dramalite.BrokerError, match="full"):
        getattr(consumer, verb)(what)
    getattr(consumer, verb)(what)
    another = broker.consume("default", timeout=10)
    is_there = next(another) is not None
    another.close()
    consumer.close()

    assert (len(broker.pending()), len(broker.dead_letters), is_there) == rest


def test_what_a_consumer_could_not_give_back_as_it_was_closed_is_run_by_a_worker(
    failing, make_broker, worker, monkeypatch
):
    monkeypatch.setattr("dramalite._UNKNOWN_S", 0.0, raising=False)  # The consumer is known to be gone.
    broker, done = make_broker(), []
    dramalite.actor(done.append, actor_name="work").send(1)
    consumer = broker.consume("default", timeout=10)
    next(consumer)
    failing.append(sqlite3.OperationalError("database or disk is full"))
    with pytest.raises(dramalite.BrokerError, match="full"):
        consumer.close()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert done == [1]


def test_a_closed_consumer_claims_nothing(broker, worker):
    done = []
    dramalite.actor(done.append, actor_name="work").send(1)
    consumer = broker.consume("default", timeout=10)
    consumer.close()
    with pytest.raises(dramalite.ConnectionClosed):
        next(consumer)
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert done == [1]


def test_a_consumer_of_an_empty_queue_looks_a_few_times_only(make_broker, monkeypatch):
    connect, begun = sqlite3.connect, []

    class Connection(sqlite3.Connection):
        def execute(self, statement, *values):
            if statement.startswith("BEGIN"):
                begun.append(statement)
            return super().execute(statement, *values)

    monkeypatch.setattr("sqlite3.connect", lambda *args, **options: connect(*args, factory=Connection, **options))
    broker = make_broker()
    dramalite.actor(print, actor_name="work")
    consumer = broker.consume("default", timeout=100)
    begun.clear()
    nothing = next(consumer)
    looks = len(begun)
    consumer.close()

    assert nothing is None
    assert looks < 20


def test_consuming_a_queue_that_nobody_declared_is_an_error_on_the_stub_broker(stub_broker):
    with pytest.raises(dramalite.QueueNotFound):
        stub_broker.consume("nowhere")


# A message that cannot be read


class Garbler(dramalite.JSONEncoder):
    """Writes `garbage` in place of any message, and reads as usual."""

    def __init__(self, garbage):
        self.garbage = garbage

    def encode(self, data):
        return self.garbage


GARBAGE = {
    "no json": b"{",
    "empty": b"",
    "not utf-8": b"\xff\xfe\x00",
    "a number": b"1",
    "an array": b"[]",
    "no fields": b"{}",
    "unknown field": b'{"queue_name":"default","actor_name":"work","args":[],"kwargs":{},'
    b'"options":{},"message_id":"x","message_timestamp":1,"extra":1}',
    "args are a number": b'{"queue_name":"default","actor_name":"work","args":5,"kwargs":{},'
    b'"options":{},"message_id":"x","message_timestamp":1}',
    "kwargs are a list": b'{"queue_name":"default","actor_name":"work","args":[],"kwargs":[1],'
    b'"options":{},"message_id":"x","message_timestamp":1}',
    "options are text": b'{"queue_name":"default","actor_name":"work","args":[],"kwargs":{},'
    b'"options":"x","message_id":"x","message_timestamp":1}',
    "actor is a list": b'{"queue_name":"default","actor_name":[],"args":[],"kwargs":{},'
    b'"options":{},"message_id":"x","message_timestamp":1}',
    "deep": b"[" * 200_000,
}


@pytest.mark.parametrize("kind", sorted(GARBAGE))
def test_a_message_that_cannot_be_read_is_put_aside_and_the_rest_goes_on(broker, worker, kind):
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    work.send("before")
    dramalite.set_encoder(Garbler(GARBAGE[kind]))
    work.send("garbage")
    dramalite.set_encoder(dramalite.JSONEncoder())
    work.send("after")
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert done == ["before", "after"]
    assert len(broker.dead_letters) == 1
    assert len(broker.dead_letters_by_queue["default"]) == 1


def test_garbage_put_into_a_stub_queue_does_not_hang_join(stub_broker, worker):
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    stub_broker.queues["default"].put(b"garbage")
    work.send("after")
    worker(stub_broker)
    stub_broker.join("default", timeout=PATIENCE, fail_fast=False)

    assert done == ["after"]


@pytest.mark.parametrize("kind", ["no json", "args are a number"])
def test_a_message_that_a_consumer_cannot_read_is_a_dead_letter_with_the_reason_that_a_worker_gives(
    broker, worker, kind
):
    dramalite.actor(print, actor_name="work")
    broker.queues["default"].put(GARBAGE[kind])
    worker(broker)
    broker.join("default", timeout=PATIENCE, fail_fast=False)
    (of_a_worker,) = broker.dead_letters_by_queue["default"]
    broker.flush_all()
    broker.declare_queue("other")
    broker.queues["other"].put(GARBAGE[kind])
    consumer = broker.consume("other", timeout=10)
    taken = next(consumer)
    consumer.close()
    by_queue = broker.dead_letters_by_queue

    assert taken is None
    assert [letter.reason for letter in by_queue["other"]] == [of_a_worker.reason]
    assert [letter.reason for letter in broker.dead_letters] == [of_a_worker.reason]


def test_a_group_is_sent_through_a_brokers_own_enqueue():
    class Noting(dramalite.StubBroker):
        def enqueue(self, message, *, delay=None):
            noted.append(message.args)
            return super().enqueue(message, delay=delay)

    noted = []
    broker = Noting()
    work = dramalite.actor(print, actor_name="work", broker=broker)
    dramalite.group([work.message(1), work.message(2)]).run()

    assert noted == [(1,), (2,)]
    assert [message.args for message in broker.pending()] == noted


def test_a_dead_letter_whose_bytes_are_no_message_cannot_be_sent_again(make_file_broker, worker):
    broker, ran = make_file_broker(), []
    wipe = dramalite.actor(lambda path="/": ran.append(path), actor_name="wipe")
    wipe.send("/tmp/one")
    with contextlib.closing(sqlite3.connect(broker.path)) as connection, connection:
        connection.execute("UPDATE dramalite_messages SET body = x'7b7d'")
    worker(broker)
    broker.join("default", timeout=PATIENCE, fail_fast=False)
    (letter,) = broker.dead_letters

    for message in (letter, letter.copy(options={"retries": 0})):
        for use in (
            broker.enqueue,
            lambda message: dramalite.pipeline([wipe.message(), message]),
            lambda message: dramalite.group([]).add_completion_callback(message),
        ):
            with pytest.raises(ValueError, match="can't be decoded"):
                use(message)
    assert letter.is_damaged
    assert ran == []


@pytest.mark.parametrize(
    "changes",
    [{"message_timestamp": 1.5}, {"kwargs": None}, {"options": None}, {"actor_name": None}, {"queue_name": 3}],
    ids=str,
)
def test_a_message_made_by_hand_that_could_not_be_read_back_is_refused(broker, changes):
    broker.declare_queue("default")
    fields = {**Message("default", "work", (), {}, {}).asdict(), **changes}
    with pytest.raises(TypeError, match=next(iter(changes))):
        broker.enqueue(Message(**fields))
    assert broker.pending() == []


def test_a_consumer_belongs_to_the_process_that_made_it(make_file_broker, monkeypatch):
    broker = make_file_broker()
    dramalite.actor(print, actor_name="work").send_with_options(args=(1,))
    consumer = broker.consume("default", timeout=0)
    message = next(consumer)
    own = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: own + 1)  # As in a forked child.
    for use in (lambda: next(consumer), lambda: consumer.ack(message), lambda: consumer.requeue([message])):
        with pytest.raises(dramalite.ConnectionClosed, match="after the fork"):
            use()
    consumer.close()
    monkeypatch.undo()
    consumer.ack(message)
    consumer.close()

    assert broker.pending() == []
