"""What can stand at the path of a database, and what can happen to it: clear errors, nothing harmed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import dramalite
import pytest
from harness import MODULE, wait_until

from helpers import DEADLINE

JOBS = """
    from pathlib import Path

    HERE = Path(JOURNAL).parent

    @dramalite.actor(max_retries=0)
    def job(number, load=""):
        note("ran", number)

    @dramalite.actor(max_retries=0)
    def reader():
        Path(broker.path).read_bytes()
        note("read")

    @dramalite.actor(max_retries=0)
    def held(number):
        note("start", number)
        until(lambda: (HERE / "release").exists(), 60)
        try:
            job.send(number + 1)
        except dramalite.BrokerError:
            note("refused", number + 1)
        note("end", number)
"""

#: Sends and tells what came of it, each time in a fork of its own, so that a hang is an error and no hang.
SENDER = """
    import json, os, select, signal, sys
    import dramalite

    def send(path, number):
        broker = dramalite.SQLiteBroker(path, durability="normal")
        job = dramalite.actor(lambda number, load="": None, actor_name="job", broker=broker, max_retries=0)
        try:
            job.send(number)
        except dramalite.BrokerError as error:
            print("refused:", " ".join(str(error).split()))
        else:
            print("stored")
        broker.close()

    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            os.closerange(3, 100)
            send(*json.loads(line))
            sys.exit()
        os.close(writing)
        said, is_over = b"", False
        while not is_over and select.select([reading], [], [], 10)[0]:
            more = os.read(reading, 65536)
            said, is_over = said + more, not more
        if not is_over:
            os.kill(child, signal.SIGKILL)
        os.close(reading)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.decode().strip()]))
"""


@pytest.fixture(scope="module")
def sender():
    """The process that forks for each send: to import everything anew takes far longer than to send."""
    environment = {**os.environ, "PYTHONPATH": str(MODULE.parent), "PYTHONUNBUFFERED": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(SENDER)], env=environment, text=True, **pipes) as sender:
        yield sender
        sender.stdin.close()


@pytest.fixture
def place(place, sender):
    place.jobs(JOBS)
    place.sender = sender
    return place


def outcome_of_a_send(place, number=1):
    """What a send in a process of its own says; a hang or any other exception fails the test."""
    print(json.dumps([str(place.db), str(number)]), file=place.sender.stdin, flush=True)
    code, said = json.loads(place.sender.stdout.readline())
    assert code == 0, f"The send ended with {code}.\n{said}"
    return said


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def side_files(path):
    return {name for name in (f"{path}-wal", f"{path}-shm", f"{path}-journal") if os.path.exists(name)}


def make_queue(place, messages):
    """A closed database that holds messages; all of it is in the one file."""
    with contextlib.closing(dramalite.SQLiteBroker(place.db, durability=place.durability)) as broker:
        job = dramalite.actor(lambda number, load: None, actor_name="job", broker=broker, max_retries=0)
        broker.enqueue_many([job.message(number, "x" * 1000) for number in range(messages)])
    with contextlib.closing(place.connect()) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


# What is no queue is refused and not touched


def text_file(path):
    path.write_text("Dear diary,\n" * 500)


def program(path):
    path.write_bytes(b"\x7fELF" + bytes(range(256)) * 64)


def nearly_sqlite(path):
    path.write_bytes(b"SQLite format 3\x00" + b"\xff" * 5000)


def short_file(path):
    path.write_bytes(b"x\n")


def single_byte(path):
    path.write_bytes(b"x")  # SQLite itself takes such a file for an empty one.


@pytest.mark.parametrize("make", [text_file, program, nearly_sqlite, short_file, single_byte])
def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(place, make):
    make(place.db)
    before = digest(place.db)
    said = outcome_of_a_send(place)

    assert said.startswith("refused:")
    assert str(place.db) in said
    assert digest(place.db) == before
    assert side_files(place.db) == set()


def folder(path):
    path.mkdir()


def fifo(path):
    os.mkfifo(path)


def dangling_link(path):
    path.symlink_to(path.parent / "nowhere" / "queue.db")


def link_to_itself(path):
    path.symlink_to(path)


@pytest.mark.parametrize("make", [folder, fifo, dangling_link, link_to_itself])
def test_what_cannot_be_a_database_is_a_clear_error_at_once(place, make):
    make(place.db)
    said = outcome_of_a_send(place)

    assert said.startswith("refused:")
    assert str(place.db) in said


@pytest.mark.parametrize(
    "name", ["missing/queue.db", "x" * 300 + ".db", "/dev/null", "/proc/self/status"], ids=["no folder", "too long", "device", "proc"]
)
def test_a_path_where_no_database_can_be_is_a_clear_error(place, name):
    place.db = place.folder / name
    said = outcome_of_a_send(place)

    assert said.startswith("refused:")
    assert str(place.db) in said


def test_a_newer_schema_is_refused_with_both_versions_and_not_touched(place):
    make_queue(place, 3)
    [(mine,)] = place.query("SELECT value FROM dramalite_meta WHERE key = 'schema_version'")
    assert place.change("UPDATE dramalite_meta SET value = '9041' WHERE key = 'schema_version'") == 1
    with contextlib.closing(place.connect()) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    before = digest(place.db)
    said = outcome_of_a_send(place)

    assert said.startswith("refused:")
    assert str(place.db) in said
    assert "9041" in said and re.search(rf"\b{mine}\b", said.replace(str(place.db), ""))
    assert digest(place.db) == before


@pytest.mark.parametrize("version", [0, -1])
def test_a_schema_that_never_was_is_refused_with_its_version(place, version):
    make_queue(place, 3)
    place.change(f"UPDATE dramalite_meta SET value = {version} WHERE key = 'schema_version'")
    with pytest.raises(dramalite.ConnectionFailed, match=rf"schema version {version};"):
        place.broker().pending()

    assert place.query("SELECT value FROM dramalite_meta WHERE key = 'schema_version'") == [(version,)]
    assert place.waiting() == 3


@pytest.mark.parametrize("version", [1, 2])
def test_a_database_of_an_earlier_schema_is_brought_up_to_date_with_what_waits(place, version):
    make_queue(place, 3)
    [(mine,)] = place.query("SELECT value FROM dramalite_meta WHERE key = 'schema_version'")
    tables = "SELECT name, sql FROM sqlite_master WHERE name LIKE 'dramalite_%' ORDER BY name"
    new = {name: sql.split("(")[0] for name, sql in place.query(tables)}
    place.change("DROP TABLE dramalite_members")
    place.change("DROP TABLE dramalite_groups")
    place.change(
        "CREATE TABLE dramalite_groups (uuid TEXT PRIMARY KEY, unsuccessful INTEGER NOT NULL, "
        "unended INTEGER NOT NULL, failed_at INTEGER) WITHOUT ROWID"
    )
    place.change("INSERT INTO dramalite_groups VALUES ('ffff', 3, 2, NULL)")  # Too young to be forgotten.
    if version == 1:
        place.change("DROP TABLE dramalite_results")
        place.change("CREATE TABLE dramalite_results (key TEXT PRIMARY KEY, value BLOB, expires_at INTEGER) WITHOUT ROWID")
    place.change(f"UPDATE dramalite_meta SET value = {version} WHERE key = 'schema_version'")
    place.worker()
    place.drained()

    assert place.query("SELECT value FROM dramalite_meta WHERE key = 'schema_version'") == [(mine,)]
    assert {name: sql.split("(")[0] for name, sql in place.query(tables)} == new
    assert place.query("SELECT message_id, key FROM dramalite_results") == []
    assert place.query("SELECT unsuccessful, unended, ended_at, told, sources FROM dramalite_groups") == [(3, 2, None, 0, None)]
    assert len(place.notes("ran")) == 3
    assert place.sound()


def test_a_worker_refuses_a_newer_schema_too(place):
    make_queue(place, 3)
    place.change("UPDATE dramalite_meta SET value = '9041' WHERE key = 'schema_version'")
    with contextlib.closing(place.connect()) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    before = digest(place.db)
    tree = place.worker()

    assert tree.wait() == 3, tree.tail()
    assert "9041" in tree.output()
    assert place.notes("ran") == []
    assert digest(place.db) == before


# Damage


def damage(path, *, first, last, seed=1):
    """Overwrite pages `first` to `last` (as parts of the whole) with noise."""
    draw = random.Random(seed)
    size = path.stat().st_size
    start, end = (int(size * part) // 4096 * 4096 for part in (first, last))
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(draw.randbytes(end - start))


def truncated(path):
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)


def noise_in_all_pages_but_the_first(path):
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(random.Random(1).randbytes(path.stat().st_size - 4096))


def zeroed_header(path):
    with open(path, "r+b") as file:
        file.write(bytes(100))


@pytest.mark.parametrize("harm", [noise_in_all_pages_but_the_first, zeroed_header])
def test_a_damaged_file_is_reported_with_a_way_out_and_not_deleted(place, harm):
    make_queue(place, 200)
    harm(place.db)
    size = place.db.stat().st_size
    said = outcome_of_a_send(place)

    assert said.startswith("refused:")
    assert str(place.db) in said
    assert re.search(r"damaged|malformed|not a database|corrupt", said)
    assert place.db.stat().st_size == size


def test_a_damaged_file_points_to_sqlites_recovery(place):
    make_queue(place, 200)
    noise_in_all_pages_but_the_first(place.db)

    assert ".recover" in outcome_of_a_send(place)


def test_a_truncated_file_gives_a_clear_error_or_works_but_is_not_silent(place):
    make_queue(place, 200)
    truncated(place.db)
    said = outcome_of_a_send(place, number=777)
    tree = place.worker()
    place.wait_until(
        lambda: not tree.alive() or re.search(r"damaged|malformed|corrupt", tree.output()) or place.notes("ran", 777),
        "the worker works or says what is wrong",
    )

    assert said == "stored" or (said.startswith("refused:") and str(place.db) in said)
    assert "Traceback" not in said


def test_a_worker_on_a_damaged_file_says_so_once_in_a_while_and_not_thousands_of_times(place):
    make_queue(place, 200)
    noise_in_all_pages_but_the_first(place.db)
    tree = place.worker()
    place.wait_until(lambda: not tree.alive() or str(place.db) in tree.output(), "the worker says what is wrong")
    if tree.alive():
        tree.signal(15)
        tree.wait()

    assert re.search(r"damaged|malformed|corrupt", tree.output())
    assert len(tree.output()) < 20_000
    assert place.db.exists()


def test_rubbish_left_in_the_side_files_by_a_crash_does_not_matter(place):
    make_queue(place, 3)
    Path(f"{place.db}-wal").write_bytes(random.Random(3).randbytes(9000))
    Path(f"{place.db}-shm").write_bytes(random.Random(4).randbytes(32768))

    assert outcome_of_a_send(place, 4) == "stored"
    assert place.waiting() == 4
    assert place.sound()


RUBBISH = {"text": b"12345\n", "large numbers": b"\x7f" * 5000, "large numbers to its end": b"\x7f" * (1 << 20)}


@pytest.mark.parametrize("content", RUBBISH.values(), ids=RUBBISH)
def test_a_send_is_no_error_where_the_side_file_holds_something_else(make_file_broker, tmp_path, content):
    make_file_broker()
    (tmp_path / "queue.db-lock").write_bytes(content)
    job = dramalite.actor(print, actor_name="job")
    sent = [job.send(1), job.send(2)]

    assert [message.args for message in sent] == [(1,), (2,)]


@pytest.mark.parametrize("content", RUBBISH.values(), ids=RUBBISH)
def test_a_worker_works_where_the_side_file_holds_something_else(make_file_broker, worker, tmp_path, content):
    broker = make_file_broker()
    (tmp_path / "queue.db-lock").write_bytes(content)
    ran = []

    def fail_at_first():
        ran.append("failed")
        if len(ran) == 1:
            raise ValueError("not yet")

    job = dramalite.actor(ran.append, actor_name="job")
    broker.enqueue_many([dramalite.actor(fail_at_first, min_backoff=0).message(), job.message(1), job.message(2)])
    worker(broker)
    wait_until(lambda: len(ran) == 4, "the worker works")

    assert sorted(map(str, ran)) == ["1", "2", "failed", "failed"]


# Deleted and replaced while in use


#: The same in another queue, and a worker that looks for its side file only when there is no file "late".
LATE_IN_ANOTHER_QUEUE = """
    for actor in (job, held):
        dramalite.actor(actor.fn, actor_name="other_" + actor.actor_name, queue_name="other", max_retries=0)

    check_slot = dramalite._Dispatcher._check_slot

    def check_slot_late(dispatcher):
        until(lambda: "IS_LATE" not in os.environ or not (HERE / "late").exists(), 60)
        check_slot(dispatcher)

    dramalite._Dispatcher._check_slot = check_slot_late
"""


@pytest.mark.parametrize("first", [0, 1], ids=["the older makes another", "the younger makes another"])
def test_a_side_file_deleted_beside_two_workers_gives_nobodys_job_away(place, first):
    place.jobs(JOBS + LATE_IN_ANOTHER_QUEUE)
    workers, late = [], place.folder / "late"
    for number, actor, queue in ((1, "held", "default"), (3, "other_held", "other")):
        is_late = {"IS_LATE": "1"} if len(workers) != first else {}
        workers.append(place.worker("--queues", queue, **is_late))
        place.send(actor, number, queue=queue)
        place.wait_until(lambda: place.notes("start", number), "its job starts")
    late.touch()
    os.remove(f"{place.db}-lock")
    place.wait_until(lambda: "was deleted or replaced" in workers[first].output(), "the first one makes another side file")
    place.send(*[("job", 7), ("other_job", 7)][first], queue=["default", "other"][first], delay=500)
    place.wait_until(lambda: place.notes("ran", 7), "the first one had time to take over")
    late.unlink()
    place.wait_until(lambda: "was deleted or replaced" in workers[1 - first].output(), "the other one comes along")
    (place.folder / "release").touch()
    place.drained()

    assert place.runs("start") == place.runs("end") == {"1": 1, "3": 1}, place.story()


def delete(path):
    for name in (str(path), f"{path}-wal", f"{path}-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(name)


def send_twice(place, broker):
    """Two sends after the fault; the errors they met.  A refusal is fine, silence into the void is not."""
    import dramalite

    errors, stored = [], []
    for number in (101, 102):
        try:
            place.send("job", number)
        except dramalite.BrokerError as error:
            errors.append(str(error))
        else:
            stored.append(number)
    return errors, stored


def numbers_in_the_file(place):
    return {number for number in (101, 102, 103) if any(f"[{number}]" in text for text in stored_texts(place))}


def stored_texts(place):
    if not place.db.exists() or not place.count("dramalite_messages"):
        return []
    rows = place.query("SELECT * FROM dramalite_messages")
    return [value.decode() if isinstance(value, bytes) else value for row in rows for value in row if isinstance(value, (bytes, str))]


def test_a_file_deleted_under_a_broker_is_never_written_to_in_secret(place):
    broker = place.broker()
    place.send("job", 1)
    delete(place.db)
    errors, stored = send_twice(place, broker)

    assert stored, errors  # At most the first says what happened; then there is a new file.
    assert set(stored) == numbers_in_the_file(place)
    assert [error for error in errors if str(place.db) not in error] == []


def test_a_file_deleted_without_its_log_is_an_error_that_says_so_until_those_who_hold_that_let_go(place):
    broker = place.broker()
    place.send("job", 1)  # This process has it open from now on.
    os.remove(place.db)
    said = outcome_of_a_send(place, 2)
    broker.close()

    assert said.startswith("refused:") and "restart all programs that use it. Don't delete FILE-wal" in said
    assert str(place.db) in said
    assert outcome_of_a_send(place, 3) == "stored"


def test_a_file_replaced_under_a_broker_is_noticed(place):
    other = place.folder / "other.db"
    broker = place.broker()
    place.send("job", 1)
    place.script("import jobs; jobs.job.send(55); jobs.broker.close()", JOBS_DB=str(other))
    delete(place.db)
    os.replace(other, place.db)
    errors, stored = send_twice(place, broker)

    assert stored, errors
    assert set(stored) == numbers_in_the_file(place)
    assert any("[55]" in text for text in stored_texts(place))
    assert place.sound()


def test_a_file_replaced_by_rubbish_under_a_broker_is_refused_and_not_touched(place):
    broker = place.broker()
    place.send("job", 1)
    delete(place.db)
    text_file(place.db)
    before = digest(place.db)
    errors, stored = send_twice(place, broker)

    assert (len(errors), stored) == (2, [])
    assert [error for error in errors if str(place.db) not in error] == []
    assert digest(place.db) == before


def test_a_folder_renamed_under_a_broker_is_noticed(place):
    home = place.folder / "home"
    home.mkdir()
    place.db = home / "queue.db"
    broker = place.broker()
    place.send("job", 1)
    home.rename(place.folder / "elsewhere")
    errors, stored = send_twice(place, broker)

    assert (len(errors), stored) == (2, [])
    assert [error for error in errors if str(place.db) not in error] == []


def test_a_worker_whose_file_was_deleted_goes_on_with_the_new_one(place):
    tree = place.ready_worker()
    delete(place.db)
    said = outcome_of_a_send(place, 2)

    assert said == "stored"
    place.wait_until(lambda: place.notes("ran", 2), "the worker finds the new file")
    assert tree.alive()
    assert str(place.db) in tree.output()
    assert tree.output().count("\n") < 200


def vanish(place, other):
    delete(place.db)


def move_away(place, other):
    """With its side files, as a careful hand does it."""
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{place.db}{suffix}", f"{place.db}.old{suffix}")


def be_replaced(place, other):
    delete(place.db)
    os.replace(other, place.db)


def be_overwritten_by_a_backup(place, other):
    """What `sqlite3 FILE ".restore OTHER"` does: the same file, with other content."""
    with contextlib.closing(sqlite3.connect(other)) as backup, contextlib.closing(place.connect()) as connection:
        backup.backup(connection)


@pytest.mark.parametrize(
    "happen",
    [be_replaced, *(pytest.param(one, marks=pytest.mark.torture) for one in (vanish, move_away, be_overwritten_by_a_backup))],
)
def test_a_worker_in_the_middle_of_a_job_outlives_whatever_happens_to_its_file(place, happen):
    other = place.folder / "other.db"
    place.script("import jobs; jobs.job.send(55); jobs.broker.close()", JOBS_DB=str(other))
    tree = place.ready_worker()
    place.send("held", 1)
    place.wait_until(lambda: place.notes("start", 1), "the job starts")
    happen(place, other)
    (place.folder / "release").touch()
    place.wait_until(lambda: place.notes("end", 1), "the job ends")
    assert "stored" in [outcome_of_a_send(place, 3), outcome_of_a_send(place, 4)]
    place.wait_until(lambda: place.notes("ran", 3) or place.notes("ran", 4), "the worker works on the file there now")
    if happen in (be_replaced, be_overwritten_by_a_backup):
        place.wait_until(lambda: place.notes("ran", 55), "what the new file held runs")
    place.drained()

    assert place.runs("start") == {"1": 1}
    assert place.notes("ran", 2) or place.notes("refused", 2)
    assert set(place.runs("ran").values()) == {1}
    assert tree.alive()
    assert place.sound()
    assert tree.output().count("\n") < 200


def test_a_job_whose_folder_was_away_as_it_ended_is_not_run_again(make_file_broker, worker, tmp_path, caplog):
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    broker = make_file_broker("home/queue.db")
    running, go_on, ran = threading.Event(), threading.Event(), []

    @dramalite.actor
    def job(number):
        ran.append(number)
        running.set()
        go_on.wait(DEADLINE)

    job.send(1)
    first = worker(broker)
    running.wait(DEADLINE)
    home.rename(away)
    go_on.set()
    wait_until(lambda: "goes on trying" in caplog.text, "the worker can't write down how the job ended")
    away.rename(home)
    first.stop()
    job.send(2)
    worker(broker)
    wait_until(lambda: 2 in ran, "the next worker works")

    assert ran == [1, 2]


def test_a_job_runs_once_though_its_worker_fails_once_to_move_to_a_new_side_file(
    make_file_broker, worker, tmp_path, monkeypatch
):
    side_file, connect = tmp_path / "queue.db-lock", sqlite3.connect
    maintenance, ran, done, failed = [], [], [], []
    is_deleted, running, go_on = threading.Event(), threading.Event(), threading.Event()

    class Maintenance(dramalite.Middleware):
        def after_consumer_thread_boot(self, broker, thread):
            maintenance.append(thread)

    class Connection(sqlite3.Connection):
        def execute(self, statement, *values):
            if is_deleted.is_set() and not failed:
                if threading.current_thread() in maintenance and statement.startswith(("BEGIN", "UPDATE")):
                    failed.append(statement)
                    raise sqlite3.OperationalError("database or disk is full")
            return super().execute(statement, *values)

    def work():
        ran.append(1)
        running.set()
        go_on.wait(DEADLINE)

    monkeypatch.setattr("sqlite3.connect", lambda *args, **options: connect(*args, factory=Connection, **options))
    broker = make_file_broker()
    broker.add_middleware(Maintenance())
    dramalite.actor(work, max_retries=0).send()
    started = worker(broker, worker_threads=2)
    running.wait(DEADLINE)
    is_deleted.set()
    side_file.unlink()
    wait_until(lambda: failed, "the worker's maintenance fails")
    dramalite.actor(done.append, actor_name="done").send_with_options(args=(1,), delay=1300)
    wait_until(lambda: done, "the worker had time for another look")
    go_on.set()
    started.stop()

    assert ran == [1]


def test_a_file_cut_short_under_a_broker_is_an_error_or_harmless_but_not_silent(place):
    make_queue(place, 100)
    broker = place.broker()
    place.send("job", 1000)
    os.truncate(place.db, place.db.stat().st_size // 2 // 4096 * 4096)
    errors, stored = send_twice(place, broker)
    broker.close()

    assert [error for error in errors if str(place.db) not in error] == []
    if stored:
        said = outcome_of_a_send(place, 7)
        assert said == "stored" or re.search(r"damaged|malformed|corrupt|not a database", said)


#: Deletes the database right before or after its n-th connection is opened: the worst moments there are.
STRIKE = """
    import contextlib, os, sys
    import dramalite
    import jobs

    moment, wanted, opened = sys.argv[1], int(sys.argv[2]), 0

    def strike(event, _):
        global opened
        if event == moment:
            opened += 1
            if opened == wanted:
                for name in ("", "-wal", "-shm"):
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(os.environ["JOBS_DB"] + name)
                jobs.note("struck")

    sys.addaudithook(strike)
"""


MOMENTS = {"before": "sqlite3.connect", "after": "sqlite3.connect/handle"}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("connection", [1, 2])
def test_a_file_deleted_while_it_is_being_opened_is_never_written_to_in_secret(place, moment, connection):
    tree = place.script(
        STRIKE
        + """
    stored = []
    for number in (101, 102, 103, 104):
        try:
            jobs.job.send(number)
        except dramalite.BrokerError as error:
            assert os.environ["JOBS_DB"] in str(error), error
        else:
            stored.append(number)
        if number == 102:
            with contextlib.suppress(dramalite.BrokerError, dramalite.QueueJoinTimeout):
                jobs.broker.join("default", timeout=1)  # Reads, through a connection of its own.
            before = list(stored)
    print("later:", *[number for number in stored if number not in before or wanted == 1])
    jobs.broker.close()
    """,
        MOMENTS[moment],
        str(connection),
    )

    stored = set(map(int, tree.output().partition("later:")[2].split()))
    assert 104 in stored
    assert stored <= {number for number in range(101, 105) if any(f"[{number}]" in text for text in stored_texts(place))}


@pytest.mark.parametrize("moment", ["before"])
@pytest.mark.parametrize("connection", [1, 2, 3])
def test_a_worker_whose_file_was_deleted_while_it_opened_it_finds_the_new_one(place, moment, connection):
    place.script("import jobs; jobs.job.send(1); jobs.broker.close()")
    place.start_script(
        STRIKE
        + """
    worker = dramalite.Worker(jobs.broker, worker_threads=2)
    while True:
        with contextlib.suppress(dramalite.BrokerError):
            worker.start()
            break
    jobs.note("up")
    jobs.until(lambda: False, 60)
    """,
        MOMENTS[moment],
        str(connection),
    )
    place.wait_until(lambda: place.notes("up"), "the worker is up")
    assert outcome_of_a_send(place, 2) == "stored"

    place.wait_until(lambda: place.notes("ran", 2), "the worker finds the new file")


def test_a_worker_whose_file_was_replaced_by_rubbish_says_so_and_waits(place):
    tree = place.ready_worker()
    delete(place.db)
    text_file(place.db)
    before = digest(place.db)
    place.wait_until(lambda: str(place.db) in tree.output(), "the worker says what is wrong")

    assert digest(place.db) == before
    delete(place.db)
    assert outcome_of_a_send(place, 3) == "stored"
    place.wait_until(lambda: place.notes("ran", 3), "the worker goes on once the file is well")
    assert tree.alive()
    assert tree.output().count("\n") < 300


def test_a_broker_whose_side_log_was_deleted_never_loses_in_silence(place):
    broker = place.broker()
    place.send("job", 1)
    with contextlib.suppress(FileNotFoundError):
        os.remove(f"{place.db}-wal")
    errors, stored = send_twice(place, broker)
    broker.close()

    assert set(stored) <= numbers_in_the_file(place)


def test_a_worker_whose_job_reads_the_database_as_a_file_is_not_deaf_afterwards(place):
    # To close such a file drops SQLite's locks: the next sender that leaves would delete the log.
    place.script("import jobs; jobs.reader.send(); jobs.broker.close()").output()
    tree = place.worker()
    place.wait_until(lambda: place.notes("read"), "the job has read the file")
    for number in range(5):
        assert outcome_of_a_send(place, number) == "stored"
        place.wait_until(lambda number=number: place.notes("ran", str(number)), "the worker hears of it")

    assert "was deleted while it was in use" not in tree.output()
    assert place.sound()


@pytest.mark.parametrize("is_forked", [False, True])
def test_nobody_deletes_the_log_of_a_program_that_reads_the_database_as_a_file(place, is_forked):
    place.script(
        """
        import os, subprocess, sys
        from pathlib import Path
        import jobs

        jobs.job.send("here")
        if sys.argv[1] == "other":
            jobs.broker.close()
        elif sys.argv[1] == "True" and (child := os.fork()):
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        else:
            for _ in range(3):
                jobs.job.send("here")
                Path(jobs.broker.path).read_bytes()
                log = os.stat(f"{jobs.broker.path}-wal").st_ino
                subprocess.run([sys.executable, __file__, "other"], check=True)
                assert os.stat(f"{jobs.broker.path}-wal").st_ino == log
                jobs.broker.close()
                assert sys.argv[1] == "True" or not os.path.exists(f"{jobs.broker.path}-wal")
        """,
        str(is_forked),
    )

    assert place.count("dramalite_messages") == 1 + 2 * 3
    assert place.sound()


@pytest.mark.parametrize("end", ["pass", "sys.exit()", "leak = sys._getframe(); raise KeyError"])
def test_a_program_that_just_ends_leaves_one_file(place, end):
    tree = place.start_script(f"import sys, jobs; jobs.job.send(1); {end}")
    tree.wait()

    assert side_files(place.db) == set()
    assert place.count("dramalite_messages") == 1


def test_a_child_of_a_program_with_a_connection_of_its_own_keeps_the_log(place):
    place.script(
        """
        import os, sqlite3, subprocess, sys
        import jobs

        jobs.job.send("parent")
        if sys.argv[1:]:
            sys.exit()
        own = sqlite3.connect(jobs.broker.path)
        own.execute("SELECT count(*) FROM dramalite_messages").fetchone()
        if not os.fork():
            jobs.job.send("child")
            jobs.note("sent")
            jobs.until(lambda: (jobs.HERE / "left").exists(), 60)
            subprocess.run([sys.executable, __file__, "other"], check=True)
            for _ in range(3):
                jobs.job.send("child")
            jobs.broker.close()
            sys.exit()
        jobs.until(lambda: "sent" in open(jobs.JOURNAL).read(), 60)
        jobs.broker.close()
        own.close()
        (jobs.HERE / "left").touch()
        sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
        """
    )

    assert place.count("dramalite_messages") == 1 + 1 + 1 + 3
    assert place.sound()


def test_what_a_program_sends_is_kept_though_it_reads_the_database_as_a_file(place):
    broker = place.broker()
    place.send("job", 101)
    Path(place.db).read_bytes()
    assert outcome_of_a_send(place, "from elsewhere") == "stored"
    place.send("job", 102)
    broker.close()

    assert numbers_in_the_file(place) == {101, 102}
    assert place.sound()


@pytest.mark.parametrize("is_forked", [False, True])
def test_a_lost_log_that_a_connection_of_the_programs_own_still_has_is_not_used_again(place, is_forked):
    tree = place.script(
        """
        import os, sqlite3, subprocess, sys
        from pathlib import Path
        import jobs

        def send():
            try:
                jobs.job.send(1, "x" * 3000)
                jobs.note("stored")
            except jobs.dramalite.BrokerError as error:
                print(error)

        def ask_other():
            print("send", file=other.stdin)
            assert other.stdout.readline() == "sent\\n"

        if sys.argv[1] == "other":
            send()
            print("sent", flush=True)
            for _ in sys.stdin:
                send()
                print("sent", flush=True)
            jobs.broker.close()
            sys.exit()
        send()
        own = sqlite3.connect(jobs.broker.path)
        own.execute("SELECT count(*) FROM dramalite_messages").fetchone()
        if sys.argv[1] == "True":  # For a moment the broker is closed.
            Path(jobs.broker.path).read_bytes()
            if not os.fork():
                os._exit(0)
            os.wait()
        else:
            jobs.broker.close()
            Path(jobs.broker.path).read_bytes()
        command = [sys.executable, __file__, "other"]
        subprocess.run(command, input="", text=True, stdout=subprocess.DEVNULL, check=True)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, text=True, bufsize=1, **pipes) as other:
            other.stdout.readline()
            for _ in range(3):
                send()
                ask_other()
            own.close()
            ask_other()
            send()
        jobs.broker.close()
        """,
        str(is_forked),
    )

    assert tree.output().count("another connection of this process") == 3
    assert place.count("dramalite_messages") == len(place.notes("stored")) == 1 + 1 + 1 + 3 + 2
    assert place.sound()


def lose_log(place, number):
    """Delete the log, moved into the database as far as it goes, and have another process begin a new one."""
    place.script(
        """
        import sqlite3, sys
        from contextlib import closing
        with closing(sqlite3.connect(sys.argv[1])) as connection:
            assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
        """,
        str(place.db),
    )
    for name in side_files(place.db):
        os.remove(name)
    assert outcome_of_a_send(place, number) == "stored"


def test_a_broker_that_begins_after_the_log_was_lost_does_not_write_into_what_another_connection_has_of_it(place):
    first, second = place.broker(), place.broker()
    job = dramalite.actor(print, broker=second, actor_name="job")
    place.send("job", 101)
    with contextlib.closing(sqlite3.connect(place.db)) as own:
        own.execute("SELECT count(*) FROM dramalite_messages").fetchone()
        lose_log(place, 102)
        errors, stored = send_twice(place, first)
        for _ in range(3):
            with pytest.raises(dramalite.BrokerError, match="another connection of this process"):
                job.send(1)
            assert outcome_of_a_send(place, 103) == "stored"
    assert job.send(104) is not None
    first.close()
    second.close()

    assert (len(errors), stored) == (2, [])
    assert place.count("dramalite_messages") == 1 + 1 + 3 + 1
    assert place.sound()


def test_brokers_of_one_file_that_have_lost_its_log_open_it_anew_once(place, caplog):
    brokers = [place.broker(), place.broker()]
    jobs = [dramalite.actor(print, broker=broker, actor_name="job") for broker in brokers]
    for job in jobs:
        job.send(1)
    lose_log(place, 101)
    for _ in range(3):
        for job in jobs:
            job.send(2)
    with contextlib.closing(sqlite3.connect(place.db)) as own:
        own.execute("SELECT count(*) FROM dramalite_messages").fetchone()
        for job in jobs:
            job.send(3)
    for broker in brokers:
        broker.close()

    assert caplog.text.count("was deleted while it was in use") <= 2
    assert place.count("dramalite_messages") == 2 + 1 + 6 + 2
    assert place.sound()


def test_a_log_that_another_connection_of_the_process_still_uses_is_not_mixed_with_the_new_one(place):
    broker = place.broker()
    place.send("job", 101)
    own = sqlite3.connect(place.db)
    own.execute("SELECT count(*) FROM dramalite_messages").fetchone()
    lose_log(place, "from elsewhere")
    errors, stored = send_twice(place, broker)
    own.close()
    place.send("job", 103)
    broker.close()

    assert stored == []
    assert all("another connection of this process" in error for error in errors)
    assert numbers_in_the_file(place) == {101, 103}
    assert place.sound()


def test_what_waits_in_a_log_that_is_deleted_is_not_lost_where_nobody_has_made_another(place):
    broker = place.broker()
    place.send("job", 101)
    os.remove(f"{place.db}-wal")
    place.send("job", 102)
    broker.close()

    assert numbers_in_the_file(place) == {101, 102}
    assert place.sound()


def descriptors(folder):
    """Which files below `folder` this process has open."""
    paths = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            paths.append(os.readlink(f"/proc/self/fd/{name}"))
    return [path for path in paths if path.startswith(str(folder))]


def test_brokers_on_many_files_leave_no_descriptor_open_when_they_are_closed(make_file_broker, worker, tmp_path):
    ran, at_work = [], []
    for number in range(3):
        broker = make_file_broker(f"{number}.db")
        dramalite.actor(ran.append, actor_name="job", broker=broker).send(number)
        started = worker(broker)
        wait_until(lambda: number in ran, "the worker works")
        at_work += descriptors(tmp_path)
        started.stop()
        broker.close()

    assert {f"{number}.db-lock" for number in range(3)} <= {os.path.basename(path) for path in at_work}
    assert descriptors(tmp_path) == []


def test_a_worker_whose_side_file_was_deleted_leaves_no_descriptor_open(make_file_broker, worker, tmp_path):
    broker, side_file = make_file_broker(), tmp_path / "queue.db-lock"
    started = worker(broker)
    side_file.unlink()
    wait_until(side_file.exists, "the worker makes another one")
    started.stop()
    broker.close()

    assert descriptors(tmp_path) == []


def test_a_worker_that_makes_another_side_file_never_seems_to_have_lost_its_descriptors(
    make_file_broker, worker, tmp_path, monkeypatch
):
    lost, started = [], worker(make_file_broker())
    slot = started._dispatcher._slot
    give_up = slot.give_up

    def give_up_and_look():
        give_up()
        lost.append(started.has_lost_descriptors())  # As a worker process does now and then, in another thread.

    monkeypatch.setattr(slot, "give_up", give_up_and_look)
    (tmp_path / "queue.db-lock").unlink()
    wait_until(lambda: lost, "the worker makes another one")

    assert lost == [False]


def test_a_closed_broker_is_not_opened_again_by_a_wait_for_a_result_that_is_over(make_file_broker, tmp_path, monkeypatch):
    broker = make_file_broker()
    sent = dramalite.actor(lambda: 42, actor_name="job", store_results=True).send()
    late, start = [], threading.Thread.start
    with monkeypatch.context() as patch:
        patch.setattr("threading.Thread.start", lambda thread: late.append(thread))
        with pytest.raises(dramalite.ResultTimeout):
            sent.get_result(block=True, timeout=1)
    broker.close()
    for thread in late:
        start(thread)
        thread.join(100)

    assert descriptors(tmp_path) == []


def test_a_connection_that_is_opened_while_a_broker_closes_its_descriptor_keeps_its_log(place, monkeypatch):
    broker, close, connections = place.broker(), os.close, []
    place.send("job", 101)
    broker.pending()

    def open_another_and_close(descriptor):
        if os.path.realpath(f"/proc/self/fd/{descriptor}") == os.path.realpath(place.db):
            connections.append(sqlite3.connect(place.db))
            connections[-1].execute("SELECT count(*) FROM dramalite_messages").fetchall()
        close(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", open_another_and_close)
        broker.close()
    if not connections:
        pytest.skip("Here no descriptor of our own tells others that the file is in use.")
    with contextlib.closing(*connections) as own:
        assert outcome_of_a_send(place, 102) == "stored"  # By a process that leaves.
        own.execute("UPDATE dramalite_messages SET priority = 7")
        own.commit()
        assert outcome_of_a_send(place, 103) == "stored"

    assert sorted(place.query("SELECT priority FROM dramalite_messages")) == [(0,), (7,), (7,)]
    assert place.sound()


# Names


@pytest.mark.parametrize(
    "name",
    [
        "what?mode=memory.db",
        "file:queue.db",
        "größe-日本-🎺.db",
        "new\nline.db",
        *(
            pytest.param(name, marks=pytest.mark.torture)
            for name in (
                "with spaces.db",
                "what?.db",
                "number#1.db",
                "per%41cent.db",
                "it's \"quoted\".db",
                "no_suffix",
                "-dash.db",
                "semi;colon&and.db",
            )
        ),
    ],
)
def test_a_database_can_have_any_name(place, name):
    place.db = place.folder / name
    said = outcome_of_a_send(place)

    assert said == "stored"
    assert place.db.is_file()
    assert place.waiting() == 1


def test_a_worker_serves_a_database_with_an_odd_name(place):
    place.db = place.folder / "an odd #1? \"näme\".db"
    place.ready_worker()
    place.drained()

    assert place.waiting() == 0


def test_an_empty_file_is_used_as_a_new_one(place):
    place.db.touch(mode=0o640)
    os.chmod(place.db, 0o640)

    assert outcome_of_a_send(place) == "stored"
    assert place.waiting() == 1
    assert stat.S_IMODE(place.db.stat().st_mode) == 0o640  # It is its owner's choice.


def test_a_link_to_a_database_is_the_database(place):
    make_queue(place, 2)
    real = place.db
    place.db = place.folder / "link.db"
    place.db.symlink_to(real)

    assert outcome_of_a_send(place) == "stored"
    place.db = real
    assert place.waiting() == 3
    place.ready_worker()
    place.drained()


def test_a_side_file_that_is_no_use_is_told_of_by_its_own_name_behind_a_link(make_file_broker, worker, tmp_path):
    (tmp_path / "real").mkdir()
    make_file_broker("real/queue.db").pending()
    (tmp_path / "real" / "queue.db-lock").mkdir()
    (tmp_path / "link.db").symlink_to(tmp_path / "real" / "queue.db")
    with pytest.raises(dramalite.ConnectionFailed, match="side file") as raised:
        worker(make_file_broker("link.db"))

    assert repr(str(tmp_path / "real" / "queue.db-lock")) in str(raised.value)
    assert "link.db" not in str(raised.value)


def test_a_relative_path_means_the_folder_it_was_given_in(place):
    place.script(
        """
        import os
        import dramalite

        os.makedirs("here"), os.makedirs("there")
        os.chdir("here")
        broker = dramalite.SQLiteBroker("queue.db")
        dramalite.set_broker(broker)

        @dramalite.actor
        def job(number):
            pass

        os.chdir("../there")
        job.send(1)
        os.chdir("/")
        job.send(2)
        broker.close()
        """
    )
    place.db = place.folder / "here" / "queue.db"

    assert place.waiting() == 2
    assert os.listdir(place.folder / "there") == []


# Rights


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_new_files_are_private_whatever_the_umask(place):
    tree = place.script(
        """
        import os, stat
        os.umask(0o022)
        import dramalite
        import jobs

        jobs.job.send(1)
        worker = dramalite.Worker(jobs.broker, worker_threads=1)
        worker.start()
        jobs.until(lambda: jobs.noted("ran"))
        for name in sorted(os.listdir(os.path.dirname(os.environ["JOBS_DB"]))):
            if name.startswith("queue.db"):
                print(name, oct(stat.S_IMODE(os.stat(os.path.join(os.path.dirname(os.environ["JOBS_DB"]), name)).st_mode)))
        worker.stop()
        print("umask", oct(os.umask(0)))
        """
    )
    told = dict(line.split() for line in tree.output().splitlines())

    assert told.pop("umask") == "0o22"
    assert set(told) >= {"queue.db", "queue.db-wal", "queue.db-shm", "queue.db-lock"}
    assert set(told.values()) == {"0o600"}


#: Becomes a user without rights, if it is root, and then sends.
UNPRIVILEGED = """
    import os, sys
    import dramalite

    path = sys.argv[1]
    # Used once before, so that everything is imported: the interpreter's own folder may be closed to others.
    warm = dramalite.SQLiteBroker(os.environ["JOBS_WARM"])
    dramalite.actor(lambda: None, actor_name="warm", broker=warm).send()
    warm.close()
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    broker = dramalite.SQLiteBroker(path)
    dramalite.set_broker(broker)

    @dramalite.actor
    def job(number):
        pass

    for _ in range(2):
        try:
            job.send(1)
        except dramalite.BrokerError as error:
            print("refused:", " ".join(str(error).split()))
        else:
            print("stored")
    broker.close()
"""


@pytest.fixture
def open_place(place):
    """The place, in a folder that any user may enter and write to."""
    folder = Path("/var/tmp") if os.access("/var/tmp", os.W_OK) else place.folder
    with tempfile.TemporaryDirectory(dir=folder, prefix="dramalite-test-") as name:
        os.chmod(name, 0o777)
        place.db = Path(name) / "queue.db"
        place.folder = Path(name)
        place.jobs(JOBS)
        yield place
        place.close()


def unprivileged_outcome(place):
    """What a user without rights meets; the module is read before the rights are dropped."""
    warm = str(place.journal.parent / "warm.db")
    lines = place.script(UNPRIVILEGED, str(place.db), JOBS_WARM=warm).output().splitlines()
    return [line for line in lines if "every user" not in line]  # The folder is told of as well.


def test_a_file_that_may_only_be_read_is_a_clear_error(open_place):
    make_queue(open_place, 1)
    os.chmod(open_place.db, 0o444)
    before = digest(open_place.db)
    said = unprivileged_outcome(open_place)

    assert [line.split()[0] for line in said] == ["refused:", "refused:"]
    assert [line for line in said if str(open_place.db) not in line] == []
    assert [line for line in said if not re.search(r"permission|read-only|readonly|may not|not allowed|rights", line, re.IGNORECASE)] == []
    assert digest(open_place.db) == before


def test_a_folder_that_may_only_be_read_is_a_clear_error(open_place):
    shut = open_place.folder / "shut"
    shut.mkdir()
    open_place.db = shut / "queue.db"
    os.chmod(shut, 0o555)
    said = unprivileged_outcome(open_place)
    os.chmod(shut, 0o755)

    assert [line.split()[0] for line in said] == ["refused:", "refused:"]
    assert [line for line in said if str(open_place.db) not in line] == []
    assert [line for line in said if not re.search(r"permission|read-only|readonly|may not|not allowed|rights|writ", line, re.IGNORECASE)] == []
    assert os.listdir(shut) == []


def test_a_folder_that_may_not_be_entered_is_a_clear_error(open_place):
    shut = open_place.folder / "shut"
    shut.mkdir()
    open_place.db = shut / "queue.db"
    make_queue(open_place, 1)
    os.chmod(shut, 0o000)
    said = unprivileged_outcome(open_place)
    os.chmod(shut, 0o755)

    assert [line.split()[0] for line in said] == ["refused:", "refused:"]
    assert [line for line in said if str(open_place.db) not in line] == []


def test_a_worker_is_known_in_the_folder_that_a_link_leads_to_now(make_file_broker, worker, tmp_path, caplog):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    (tmp_path / "current").symlink_to("first")
    broker = make_file_broker("current/queue.db")
    begun, go_on = [], threading.Event()

    @dramalite.actor(max_retries=0)
    def work(number):
        begun.append(number)
        if number == "long":
            go_on.wait(DEADLINE)

    worker(broker)
    work.send("first")
    broker.join("default", timeout=DEADLINE * 1000)
    (tmp_path / "next").symlink_to("second")
    (tmp_path / "next").replace(tmp_path / "current")
    with contextlib.suppress(dramalite.ConnectionClosed):  # Told once, here or to the worker.
        work.send("in between")
    work.send("long")
    wait_until(lambda: "long" in begun, "the worker goes on in the other folder")
    wait_until(lambda: "making it known anew" in caplog.text, "it makes itself known there")
    other = make_file_broker("current/queue.db")
    dramalite.actor(begun.append, actor_name="work").send("other")
    worker(other)
    wait_until(lambda: "other" in begun, "another worker works there too")
    go_on.set()
    other.join("default", timeout=DEADLINE * 1000)

    assert [what for what in begun if what != "in between"] == ["first", "long", "other"]
