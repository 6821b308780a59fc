"""Stored rows that are damaged, and jobs that misbehave: each is dealt with alone, the rest goes on."""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
import sqlite3
import threading
import time
from collections import Counter

import dramalite
import pytest

from helpers import DEADLINE, wait_until

JOBS = """
    @dramalite.actor(max_retries=0)
    def healthy(number):
        note("healthy", number, os.getpid())

    @dramalite.actor(max_retries=0)
    def meet(number):
        note("meets", number)
        until(lambda: noted("meets") >= 2)
        note("met", number)

    class Exotic(BaseException):
        pass

    class Mute(Exception):
        def __str__(self):
            raise ValueError("no words")
        __repr__ = __str__

    class Liar(Exception):
        def __str__(self):
            return 5

    def recurse():
        recurse()

    def leave_threads():
        for daemon in (True, False):
            threading.Thread(target=time.sleep, args=(600,), daemon=daemon).start()

    def take_signals():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def close_streams():
        sys.stdout.close()
        sys.stderr.close()

    def throw(exception):
        raise exception

    def fail_oddly():
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise error from error

    def a_thousand_causes():
        try:
            for number in range(1000):
                try:
                    raise ValueError(number)
                except ValueError as error:
                    cause = error
                    raise TypeError(number) from cause
        except TypeError as error:
            first = error
        for number in range(1000):
            try:
                raise KeyError(number) from first
            except KeyError as error:
                first = error
        raise first

    MISDEEDS = {
        "base exception": lambda: throw(Exotic("exotic")),
        "system exit": lambda: sys.exit(3),
        "keyboard interrupt": lambda: throw(KeyboardInterrupt()),
        "generator exit": lambda: throw(GeneratorExit()),
        "stop iteration": lambda: next(iter(())),
        "memory error": lambda: throw(MemoryError()),
        "recursion": recurse,
        "mute": lambda: throw(Mute()),
        "liar": lambda: throw(Liar()),
        "ten megabytes": lambda: throw(RuntimeError("m" * 10_000_000)),
        "odd text": lambda: throw(RuntimeError("nul \\0 surrogate \\ud800 escape \\x1b[31m newline \\n[FAKE] line \\x85")),
        "its own cause": fail_oddly,
        "a thousand causes": a_thousand_causes,
        "interrupt": lambda: throw(dramalite.TimeLimitExceeded("mine")),
        "unknown encoding": lambda: throw(UnicodeDecodeError("utf-8", b"\\xff", 0, 1, "bad")),
        "signals": take_signals,
        "close streams": close_streams,
        "close descriptors 0 to 2": lambda: os.closerange(0, 3),
        "change folder": lambda: os.chdir("/"),
        "remove folder": lambda: (os.mkdir("gone"), os.chdir("gone"), os.rmdir("../gone")),
        "umask": lambda: os.umask(0o777),
        "environment": os.environ.clear,
        "recursion limit": lambda: sys.setrecursionlimit(60),
        "threads": leave_threads,
        "switch interval": lambda: sys.setswitchinterval(1.0),
        "unload modules": lambda: [sys.modules.pop(name, None) for name in ("json", "sqlite3", "dramalite", "logging")],
    }

    @dramalite.actor(max_retries=0)
    def misbehave(kind):
        note("misbehave", kind.replace(" ", "_"), os.getpid())
        MISDEEDS[kind]()

    @dramalite.actor(max_retries=2, min_backoff=1, max_backoff=2)
    def misbehave_again(kind):
        note("again", kind.replace(" ", "_"))
        MISDEEDS[kind]()

    @dramalite.actor(max_retries=10_000, min_backoff=1, max_backoff=5)
    def fails_again_and_again(number):
        note("storm", number)
        raise RuntimeError("Not this time either.")

    @dramalite.actor(max_retries=0)
    def weigh(load):
        note("weighed", len(load), len(set(load)))

    @dramalite.actor(max_retries=0, time_limit=300)
    def outsleeps_its_limit():
        note("stuck", "asleep", os.getpid())
        time.sleep(120)
        note("woke_up")

    @dramalite.actor(max_retries=0, time_limit=300)
    def swallows_everything():
        note("stuck", "swallowing", os.getpid())
        while True:
            try:
                time.sleep(0.01)
            except BaseException:
                pass

    @dramalite.actor(max_retries=0)
    def outlasts_a_replacement():
        note("neighbour", "starts")
        time.sleep(7)
        note("neighbour", "ends")

    @dramalite.actor(max_retries=0)
    def close_all_descriptors():
        note("closing", os.getpid())
        os.closerange(0, 1024)
"""

FAILING = [
    "base exception",
    "system exit",
    "keyboard interrupt",
    "generator exit",
    "stop iteration",
    "memory error",
    "recursion",
    "mute",
    "liar",
    "ten megabytes",
    "odd text",
    "its own cause",
    "a thousand causes",
    "interrupt",
    "unknown encoding",
    "signals",
]
#: What jobs do to the process they run in; those of one line are done one after the other.
SPOILING = [
    ["close streams"],
    ["close descriptors 0 to 2"],
    ["remove folder"],
    pytest.param(["change folder", "umask", "environment"], marks=pytest.mark.torture),
    pytest.param(["recursion limit", "switch interval"], marks=pytest.mark.torture),
    pytest.param(["threads"], marks=pytest.mark.torture),
    pytest.param(["unload modules"], marks=pytest.mark.torture),
]


@pytest.fixture
def place(place):
    place.jobs(JOBS)
    return place


# Stored rows


def damage(place, pairs):
    """Put a value in the place of each stored message: pairs of message and value."""
    with contextlib.closing(place.connect()) as connection, connection:
        table, column = where_messages_are(connection, pairs[0][0].encode())
        statement = f"UPDATE {table} SET {column} = ? WHERE {column} = ?"
        harmed = sum(connection.execute(statement, (value, message.encode())).rowcount for message, value in pairs)
    assert harmed == len(pairs), "Not every message is stored once, as Dramatiq would encode it."


def where_messages_are(connection, encoded):
    """The table and the column that hold a message as Dramatiq would encode it."""
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE 'dramalite_%'")
    for (table,) in tables.fetchall():
        for _, column, *_ in connection.execute(f"PRAGMA table_info({table})").fetchall():
            if connection.execute(f"SELECT 1 FROM {table} WHERE {column} = ?", (encoded,)).fetchall():
                return table, column
    raise AssertionError("The message is not stored as Dramatiq would encode it.")


def changed(message, **fields):
    """The message's JSON with these fields changed, or left out where the value is ..."""
    data = {**json.loads(message.encode()), **fields}
    return json.dumps({key: value for key, value in data.items() if value is not ...}).encode()


DAMAGE = {
    "nothing": lambda m: b"",
    "one byte": lambda m: b"{",
    "cut": lambda m: m.encode()[:-7],
    "doubled": lambda m: m.encode() * 2,
    "null": lambda m: b"null",
    "list": lambda m: b"[]",
    "number": lambda m: b"17",
    "empty object": lambda m: b"{}",
    "not utf-8": lambda m: m.encode().replace(b"misbehave", b"mis\xff\xfehave"),
    "utf-16": lambda m: m.encode().decode().encode("utf-16"),
    "nul bytes": lambda m: b"\0" * 200,
    "pickle": lambda m: b"cos\nsystem\n(S'touch pwned'\ntR.",
    "100,000 deep list": lambda m: changed(m, args=["@"]).replace(b'"@"', b"[" * 100_000 + b"]" * 100_000),
    "100,000 deep object": lambda m: changed(m, kwargs="@").replace(b'"@"', b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "unclosed and deep": lambda m: b"[" * 100_000,
    "oversized": lambda m: changed(m, args=["x" * 3_000_000]),
    "long number": lambda m: changed(m, args=["@"]).replace(b'"@"', b"9" * 6000),
    "sql text": lambda m: m.encode().decode()[:-5],
    "sql integer": lambda m: 42,
    "sql real": lambda m: 4.2,
    "no queue": lambda m: changed(m, queue_name=...),
    "no actor": lambda m: changed(m, actor_name=...),
    "no args": lambda m: changed(m, args=...),
    "no kwargs": lambda m: changed(m, kwargs=...),
    "no options": lambda m: changed(m, options=...),
    "queue is a number": lambda m: changed(m, queue_name=3),
    "actor is null": lambda m: changed(m, actor_name=None),
    "actor is a list": lambda m: changed(m, actor_name=["misbehave"]),
    "actor is an object": lambda m: changed(m, actor_name={}),
    "args is a number": lambda m: changed(m, args=5),
    "args is null": lambda m: changed(m, args=None),
    "kwargs is a list": lambda m: changed(m, kwargs=[]),
    "kwargs is text": lambda m: changed(m, kwargs="x"),
    "options is text": lambda m: changed(m, options="x"),
    "options is null": lambda m: changed(m, options=None),
    "id is an object": lambda m: changed(m, message_id={}),
    "time is text": lambda m: changed(m, message_timestamp="then"),
    "unknown field": lambda m: changed(m, surprise=1),
}


def test_each_damaged_row_becomes_a_dead_letter_with_a_reason_and_the_rest_runs(place):
    harmed = []
    for number, harm in enumerate(DAMAGE.values()):
        place.send("healthy", number)
        message = place.send("misbehave", "base exception")
        harmed.append((message, harm(message)))
    damage(place, harmed)
    place.send("healthy", "last")
    tree = place.worker(threads=2)
    place.drained()

    assert len(place.runs("healthy")) == len(DAMAGE) + 1
    assert place.notes("misbehave") == []
    assert place.dead() == len(DAMAGE)
    letters = place.dead_letters()
    assert len(letters) <= len(DAMAGE)
    rows = place.query("SELECT * FROM dramalite_dead")
    unexplained = [row for row in rows if not any(isinstance(value, str) and " " in value.strip() for value in row)]
    assert unexplained == []
    assert not (place.folder / "pwned").exists()
    assert len(tree.children()) == 1
    assert max(len(line) for line in tree.output().splitlines()) < 20_000


def test_flipped_bits_never_stop_the_worker(place):
    draw = random.Random(5)
    flipped = []
    for number in range(60):
        message = place.send("healthy", number)
        data = bytearray(message.encode())
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        flipped.append((message, bytes(data)))
    damage(place, flipped)
    tree = place.ready_worker()
    place.send("healthy", "last")
    place.wait_until(lambda: place.notes("healthy", "last"), "the worker goes on")

    assert len(tree.children()) == 1
    ended = len(place.notes("healthy")) - 1 + place.dead()
    place.wait_until(lambda: len(place.notes("healthy")) - 1 + place.dead() + place.waiting() >= 60, "each has one state")
    assert ended >= 30  # A flipped letter in a name may leave it waiting for an actor of that name.


#: What may stand in a stored message in the place of something else.
SCRAPS = [
    b'""', b"0", b"-1", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'"\\ud800"', b"[" * 500, b'{"a":' * 300,
    b'"\\u0000"', b'"healthy"', b'"default.DQ"', b'"default.XQ"', b'{"eta":1e30}', b'{"pipe_target":{}}', b"9" * 5000,
    b'{"__proto__":1}', b'"' + "ß".encode("latin-1") + b'"', b"'", b"\xef\xbb\xbf", b"\0", b"/**/", b'"\\x41"',
]  # fmt: skip


def fuzzed(draw, body, other):
    """A body with one thing to three things wrong with it."""
    data = bytearray(body)
    for _ in range(draw.randrange(1, 4)):
        start = draw.randrange(len(data) + 1)
        end = min(len(data), start + draw.choice([0, 1, 1, 2, 8, 40]))
        kind = draw.randrange(6)
        if kind == 0 and start < len(data):
            data[start] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[start:end]
        elif kind == 2:
            data[start:start] = data[start:end] * draw.randrange(1, 4)
        elif kind == 3:
            data[start:end] = draw.choice(SCRAPS)
        elif kind == 4:
            data[start:] = other[draw.randrange(len(other)) :]
        else:
            data[start:end] = draw.randbytes(end - start)
    return bytes(data)


def put_in_place_of_values(draw, body):
    """A body in which some whole values are others."""
    data = json.loads(body)
    for _ in range(draw.randrange(1, 3)):
        data[draw.choice(list(data))] = draw.choice([None, 0, -1.5, "", "x", [], [[]], {}, {"a": 1}, True, 10**40, "healthy"])
    return json.dumps(data).encode()


def harmed(draw, body, other):
    return put_in_place_of_values(draw, body) if draw.random() < 0.3 else fuzzed(draw, body, other)


UNSEEN = "SELECT 1 FROM dramalite_messages WHERE state = 0 AND queue = 'default' AND actor = 'healthy' LIMIT 1"


@pytest.mark.parametrize("count", [1000, pytest.param(100_000, marks=pytest.mark.torture)])
def test_fuzzed_messages_never_stop_the_worker_and_each_is_accounted_for(place, count):
    draw = random.Random(count)
    broker = place.broker(max_crashes=1)
    kinds = [("healthy", [1], {}), ("misbehave", ["base exception"], {"max_retries": 0}), ("meet", ["x"], {"eta": 1})]
    pool = [dramalite.Message("default", actor, args, {}, options).encode() for actor, args, options in kinds for _ in range(30)]
    broker.enqueue_many([dramalite.Message("default", "healthy", (0,), {}, {}) for _ in range(count)])
    with contextlib.closing(place.connect()) as connection, connection:
        ids = [row_id for (row_id,) in connection.execute("SELECT id FROM dramalite_messages")]
        bodies = [harmed(draw, draw.choice(pool), draw.choice(pool)) for _ in ids]
        connection.executemany("UPDATE dramalite_messages SET body = ? WHERE id = ?", zip(bodies, ids))
    tree = place.worker(processes=2, threads=2)
    place.wait_until(lambda: len(tree.children()) == 2, "the worker has its processes")
    first = sorted(tree.children())
    place.wait_until(lambda: not place.query(UNSEEN), "all were looked at", 90)
    place.send("healthy", "last")
    place.wait_until(lambda: place.notes("healthy", "last"), "the worker goes on")

    # The few that still say "meet" wait for each other; some wait for their time, or a retry.
    ran = len(place.notes("healthy")) - 1 + len(place.notes("misbehave")) + len(place.notes("meets"))
    assert ran + place.dead() + place.waiting() >= count
    assert place.dead() > count / 2
    assert sorted(tree.children()) == first
    assert "Exception in thread" not in tree.output()
    assert max(map(len, tree.output().splitlines())) < 20_000


ABSURD = {
    "retries": ["x", -5, 1e300, None, [], {}, 10**30],
    "max_retries": ["many", -1, [], 1.5],
    "min_backoff": ["soon", -5, {}, 10**30],
    "max_backoff": ["late", -5, [1]],
    "time_limit": ["x", -1, 0, [], 10**30],
    "max_age": ["old", {}, "nan"],
    "eta": ["tomorrow", [], -(10**30)],
    "delay": ["x", -1],
    "priority": ["urgent", [], None, 10**30],
    "on_success": [5, [], {}],
    "on_failure": [5, ["no_such_actor"]],
    "on_retry_exhausted": [7],
    "pipe_target": [5, "x", {}, {"queue_name": 1}, [[]]],
    "pipe_ignore": ["maybe"],
    "traceback": [5, {}],
    "requeue_timestamp": ["x"],
    "throws": ["ValueError", [1]],
    "notify_shutdown": ["perhaps"],
    "store_results": ["perhaps", 5],
    "result_ttl": ["x", -1],
    "unique": [5, {}],
    "group_completion_uuid": [5],
    "group_completion_callbacks": [5, [7], {}],
    "broker_priority": ["x"],
}


def test_absurd_options_in_stored_rows_never_stop_the_worker(place):
    absurd = [(name, value) for name, values in ABSURD.items() for value in values]
    absurd.append(("eta", float("nan")))
    absurd.append(("time_limit", float("inf")))
    harmed = []
    for name, value in absurd:
        for actor, argument in [("healthy", "absurd"), ("misbehave", "base exception")]:
            message = place.send(actor, argument)
            harmed.append((message, changed(message, options={name: value})))
    damage(place, harmed)
    place.send("healthy", "last")
    tree = place.worker(threads=2)
    place.wait_until(lambda: place.notes("healthy", "last"), "the worker goes on")
    for number in range(2):
        place.send("meet", number)
    place.wait_until(lambda: len(place.notes("met")) == 2, "both threads still work")

    ran = len(place.notes("healthy", "absurd"))
    assert ran + place.dead() + place.waiting() >= len(absurd)  # Some wait for a retry.
    assert ran >= len(absurd) / 2
    assert len(tree.children()) == 1
    assert "Exception in thread" not in tree.output()


# Jobs


@pytest.mark.parametrize("block", [FAILING[:8], FAILING[8:]], ids=["first half", "second half"])
def test_a_job_that_fails_in_an_odd_way_fails_alone(place, block):
    tree = place.worker(threads=2)
    for kind in block:
        place.send("misbehave", kind)
        place.send("healthy", kind.replace(" ", "_"))
    place.send("healthy", "last")
    place.drained()

    assert place.runs("misbehave") == {kind.replace(" ", "_"): 1 for kind in block}
    assert len(place.notes("healthy")) == len(block) + 1
    assert sorted(letter.args[0] for letter in place.dead_letters()) == sorted(block)
    assert {note[2] for note in place.notes("healthy")} == {str(pid) for pid in tree.children()}
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0, tree.tail()


@pytest.mark.torture
def test_odd_failures_are_retried_like_any_other(place):
    kinds = [kind for kind in FAILING if kind != "ten megabytes"]
    place.worker(threads=2)
    for kind in kinds:
        place.send("misbehave_again", kind)
    place.drained()

    assert place.runs("again") == {kind.replace(" ", "_"): 3 for kind in kinds}
    assert place.dead() == len(kinds)


def test_a_large_exception_is_cut_before_it_is_stored_or_logged(place):
    tree = place.worker()
    place.send("misbehave_again", "ten megabytes")
    place.drained()

    assert place.runs("again") == {"ten_megabytes": 3}
    rows = place.query("SELECT * FROM dramalite_dead")
    assert len(rows) == 1
    assert max(len(value) for row in rows for value in row if isinstance(value, (str, bytes))) < 100_000
    assert len(tree.output()) < 500_000
    assert place.db.stat().st_size < 5_000_000


def test_control_characters_of_an_exception_do_not_reach_the_log_raw(place):
    tree = place.worker()
    place.send("misbehave", "odd text")
    place.drained()

    assert place.dead() == 1
    assert "\x1b" not in tree.output()
    assert "\0" not in tree.output()
    assert not re.search(r"^\[FAKE\]", tree.output(), re.MULTILINE)


def test_control_characters_of_a_stored_message_do_not_reach_the_log_raw(place):
    evil = "x\x1b[31m\n[FAKE] line"
    pairs = []
    for fields in [
        {"message_id": evil},
        {"args": [evil], "actor_name": "misbehave"},
        {"args": ["base exception"], "actor_name": "misbehave", "message_id": evil},
        {"actor_name": evil},
        {"args": [evil, evil]},
        {"options": {"eta": evil}},
        {"options": {"on_success": evil}},
        {"options": {evil: evil, "max_retries": evil}},
        {"queue_name": evil},
    ]:
        message = place.send("healthy", len(pairs))
        pairs.append((message, changed(message, **fields)))
    damage(place, pairs)
    for column in ("message_id", "actor", "queue"):
        message = place.send("misbehave", "base exception")
        place.change(f"UPDATE dramalite_messages SET {column} = ? WHERE message_id = ?", evil, message.message_id)
    message = place.send("misbehave", "base exception")
    place.change("UPDATE dramalite_messages SET message_id = ?, body = ? WHERE message_id = ?", evil, b"{", message.message_id)
    tree = place.worker("--verbose")
    place.send("misbehave", evil)
    place.send("healthy", "last")
    place.wait_until(lambda: place.notes("healthy", "last"), "the worker goes on")
    tree.signal(signal.SIGTERM)
    tree.wait()

    assert "\x1b" not in tree.output()
    assert re.findall(r"^\[FAKE\].*", tree.output(), re.MULTILINE) == []


@pytest.mark.parametrize("column", ["priority", "crashes", "crash_limit", "message_id", "body", "eta", "owner"])
def test_values_that_a_foreign_program_stored_stop_no_other_message(make_file_broker, worker, tmp_path, column):
    evil = ["x", b"\xff", 1.5, 1e300, -1, 256, 1 << 62]
    state = {"eta": 1, "owner": 2}.get(column, 0)
    broker = make_file_broker()
    done = []
    work = dramalite.actor(done.append, actor_name="work", max_retries=0)
    messages = [work.message(number) for number in range(40 * len(evil))]
    broker.enqueue_many(messages)
    with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as connection, connection:
        connection.executemany(
            f"UPDATE dramalite_messages SET state = {state}, {column} = ? WHERE message_id = ?",
            [(value, message.message_id) for value, message in zip(evil, messages[20::40], strict=True)],
        )
    worker(broker)
    wait_until(lambda: {number for number in range(len(messages)) if number % 40 != 20} <= set(done))
    work.send("last")
    wait_until(lambda: "last" in done)

    assert len(done) == len(set(done))


def test_a_count_of_crashes_below_zero_keeps_no_message_waiting(make_file_broker, worker, tmp_path):
    broker = make_file_broker()
    done = []
    dramalite.actor(done.append, actor_name="work").send(1)
    with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as connection, connection:
        connection.execute("UPDATE dramalite_messages SET crashes = -1")
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert done == [1]


def test_an_option_that_is_no_number_stops_no_other_message(make_file_broker, worker, tmp_path):
    broker = make_file_broker()
    work = dramalite.actor(lambda number: number, actor_name="work", store_results=True)
    messages = [work.send(number) for number in range(3)]
    with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as connection, connection:
        body = json.loads(connection.execute("SELECT body FROM dramalite_messages").fetchone()[0])
        body["options"]["result_ttl"] = float("nan")
        connection.execute(
            "UPDATE dramalite_messages SET body = ? WHERE message_id = ?", [json.dumps(body).encode(), body["message_id"]]
        )
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000, fail_fast=False)

    assert [message.message_id for message in broker.dead_letters] == [messages[0].message_id]
    assert [message.get_result() for message in messages[1:]] == [1, 2]


def spoil(path, message, column):
    """Store a text that is no UTF-8 in a column of a message."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            f"UPDATE dramalite_messages SET {column} = CAST(x'ff41' AS TEXT) WHERE message_id = ?", [message.message_id]
        )


def test_a_body_of_text_that_is_no_utf8_stops_no_other_message(make_file_broker, worker, tmp_path):
    broker = make_file_broker()
    done = []
    work = dramalite.actor(done.append, actor_name="work", max_retries=0)
    messages = [work.message(number) for number in range(10)]
    broker.enqueue_many(messages)
    spoil(tmp_path / "queue.db", messages[5], "body")
    worker(broker)
    wait_until(lambda: len(done) == 9)

    assert done == [0, 1, 2, 3, 4, 6, 7, 8, 9]


@pytest.mark.parametrize("column", ["queue", "actor"])
def test_a_name_that_is_no_utf8_does_not_disturb_the_workers_maintenance(
    make_file_broker, worker, tmp_path, clock, caplog, column
):
    def stored():
        with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as connection:
            return connection.execute("SELECT count(*) FROM dramalite_results").fetchone()[0]

    broker = make_file_broker(clock=clock)
    work = dramalite.actor(lambda: 42, actor_name="work", store_results=True, result_ttl=900)
    spoil(tmp_path / "queue.db", work.send(), column)
    work.send()
    worker(broker)
    wait_until(lambda: stored() == 1)
    clock.advance(2000)
    wait_until(lambda: stored() == 0)

    assert [record.getMessage() for record in caplog.records if "can't be used" in record.getMessage()] == []


def test_a_count_of_crashes_below_zero_keeps_no_suspect_from_being_run(make_file_broker, worker, tmp_path):
    broker = make_file_broker()
    done = []
    work = dramalite.actor(done.append, actor_name="work", max_retries=0)
    broker.enqueue_many([work.message(number) for number in range(4)])
    with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as connection, connection:
        connection.execute(
            """UPDATE dramalite_messages
                  SET crashes = CASE WHEN id = (SELECT min(id) FROM dramalite_messages) THEN -1 ELSE 1 END"""
        )
    worker(broker)
    wait_until(lambda: len(done) == 4)

    assert done == [0, 1, 2, 3]


def test_a_claim_that_names_no_worker_goes_back_to_its_queue(make_file_broker, worker, tmp_path):
    broker = make_file_broker()
    done = []
    dramalite.actor(done.append, actor_name="work", max_retries=0).send(1)
    with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as connection, connection:
        connection.execute("UPDATE dramalite_messages SET state = 2, owner = NULL")
    worker(broker)
    wait_until(lambda: done)

    assert done == [1]


@pytest.mark.torture
def test_a_storm_of_retries_lets_fresh_work_pass(place):
    place.broker().enqueue_many(
        [dramalite.Message("default", "fails_again_and_again", (number,), {}, {}) for number in range(1000)]
    )
    tree = place.worker(threads=2)
    place.wait_until(lambda: len(place.notes("storm")) > 1500, "the storm blows")
    for number in range(3):
        place.send("healthy", number)
        place.wait_until(lambda: place.notes("healthy", number), "fresh work passes", 20)

    assert place.waiting() == 1000
    assert len(tree.output()) < 3000 * len(place.notes("storm"))


@pytest.mark.torture
def test_jobs_that_no_time_limit_can_end_fail_and_cost_their_process_and_no_other_work(place):
    tree = place.ready_worker(threads=4)
    first = tree.children()
    place.send("outlasts_a_replacement")
    place.send("outsleeps_its_limit")
    place.send("swallows_everything")
    place.wait_until(lambda: len(place.notes("stuck")) == 2, "two jobs are stuck")
    place.wait_until(lambda: place.dead() == 2, "they are failed all the same")
    place.wait_until(lambda: tree.children() not in ([], first), "their process is replaced")
    place.send("healthy", "last")
    place.drained()

    assert [note[1] for note in place.notes("neighbour")] == ["starts", "ends"]
    assert sorted(note[1] for note in place.notes("stuck")) == ["asleep", "swallowing"]
    assert {letter.actor_name for letter in place.dead_letters()} == {"outsleeps_its_limit", "swallows_everything"}
    assert place.runs("healthy") == {"last": 1}
    assert not place.notes("woke_up")


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.torture)])
def test_a_job_that_ends_at_the_moment_of_its_limit_has_one_outcome_and_costs_no_thread(make_file_broker, worker, count):
    broker = make_file_broker(durability="normal")
    meeting = threading.Barrier(5)

    @dramalite.actor(max_retries=0, time_limit=15, store_results=True)
    def races(microseconds):
        end = time.monotonic() + 0.015 + microseconds / 1e6
        while time.monotonic() < end:
            pass
        return "won"

    meet = dramalite.actor(lambda: meeting.wait(DEADLINE) and None, actor_name="meet", max_retries=0)
    draw = random.Random(count)
    outcomes, sent = Counter(), 0
    worker(broker, worker_threads=4)
    while len(outcomes) < 2 and sent < 10 * count:  # Once, unless the machine is so busy that all are late.
        messages = broker.enqueue_many([races.message(draw.randrange(-1500, 3000)) for _ in range(count)])
        sent += count
        broker.join("default", timeout=60_000)
        for message in messages:
            try:
                outcomes[message.get_result()] += 1
            except dramalite.ResultFailure as error:
                outcomes[error.orig_exc_type] += 1
    broker.enqueue_many([meet.message() for _ in range(4)])
    meeting.wait(DEADLINE)
    broker.join("default", timeout=DEADLINE * 1000)

    assert outcomes.total() == sent
    assert outcomes.keys() == {"won", "TimeLimitExceeded"}
    assert len(broker.dead_letters) == outcomes["TimeLimitExceeded"]


# Size


def allow_large_messages(place):
    source = (place.folder / "jobs.py").read_text()
    (place.folder / "jobs.py").write_text(source.replace("SQLiteBroker(", "SQLiteBroker(max_message_size=64_000_000, path=", 1))


@pytest.mark.torture
def test_arguments_of_fifty_megabytes_pass_where_they_are_allowed_and_slow_nobody_down(place):
    allow_large_messages(place)
    place.worker(threads=2)
    place.script(
        """
        import jobs

        jobs.weigh.send("x" * 50_000_000)
        for number in range(5):
            jobs.healthy.send(number)
        jobs.broker.close()
        """
    )
    place.wait_until(lambda: len(place.notes("healthy")) == 5, "small jobs run beside a large one")
    place.drained()

    assert place.notes("weighed") == [["weighed", "50000000", "1"]]
    assert place.dead() == 0


def test_arguments_of_fifty_megabytes_are_refused_where_they_are_not_allowed(place):
    place.send("healthy", 1)
    with pytest.raises(ValueError, match=r"'weigh' has 500\d+ bytes.*1048576"):
        place.send("weigh", "x" * 50_000_000)

    assert place.waiting() == 1
    assert place.db.stat().st_size < 1_000_000


@pytest.mark.torture
def test_a_result_of_thirty_megabytes_is_kept_or_fails_aloud_and_slows_nobody_down(make_file_broker, worker):
    broker = make_file_broker(durability="normal")
    large = dramalite.actor(lambda: "r" * 30_000_000, actor_name="large", store_results=True, max_retries=0)
    small = dramalite.actor(lambda: "small", actor_name="small", store_results=True, max_retries=0)
    worker(broker, worker_threads=2)
    sent = large.send()
    others = [small.send() for _ in range(20)]

    assert [message.get_result(block=True, timeout=150_000) for message in others] == ["small"] * 20
    try:
        assert len(sent.get_result(block=True, timeout=150_000)) == 30_000_000
    except dramalite.ResultFailure as error:
        assert re.search("too large|bytes", str(error))


@pytest.mark.torture
def test_a_worker_serves_ten_thousand_queues(place):
    place.jobs(
        """
        for number in range(10_000):
            broker.declare_queue(f"queue{number}")

        @dramalite.actor(max_retries=0)
        def job(number):
            note("ran", number)
        """
    )
    broker = place.broker()
    broker.enqueue_many([dramalite.Message(f"queue{number}", "job", (number,), {}, {}) for number in range(0, 10_000, 4)])
    place.worker(threads=4)
    place.drained()
    place.send("job", "last")
    place.wait_until(lambda: place.notes("ran", "last"), "the worker still hears of new work")

    assert len(place.notes("ran")) == 2501


def test_an_idle_worker_runs_what_comes_into_another_one_of_its_queues(place):
    place.jobs(
        """
        broker.declare_queue("other")

        @dramalite.actor(max_retries=0)
        def job(number):
            note("ran", number)
        """
    )
    place.ready_worker()
    place.wait_until(lambda: place.waiting() == 0, "the worker is idle")
    place.send("job", 1, queue="other")

    place.wait_until(lambda: place.notes("ran", 1), "the worker finds the message")


@pytest.mark.parametrize("kinds", SPOILING, ids=", ".join)
def test_a_job_that_spoils_its_process_does_not_stop_the_next_ones(place, kinds):
    tree = place.ready_worker()
    for kind in kinds:
        place.send("misbehave", kind)
        place.wait_until(lambda: place.notes("misbehave", kind.replace(" ", "_")), "the job misbehaves")
    for number in range(5):
        place.send("healthy", number)
        place.send("misbehave", "base exception")
    place.drained()
    tree.signal(signal.SIGTERM)

    assert tree.wait() == 0, tree.tail()
    assert place.runs("healthy") == {str(number): 1 for number in range(5)}
    assert place.runs("misbehave")["base_exception"] == 5
    assert tree.pids() == []


@pytest.mark.torture
def test_a_job_that_closes_all_descriptors_costs_its_process_and_loses_nothing(place):
    tree = place.ready_worker()
    place.send("close_all_descriptors")
    place.wait_until(lambda: place.notes("closing"), "the job closes all descriptors")
    for number in range(5):
        place.send("healthy", number)
    place.wait_until(lambda: len(place.runs("healthy")) == 5, "the others run")
    place.drained()

    assert len(place.notes("closing")) <= 4
    assert tree.alive()
    assert place.sound()


def test_of_several_jobs_the_one_that_closed_all_descriptors_is_known_to_have_crashed(place):
    # The others end only when nothing can be written any more.
    place.jobs(
        """
        @dramalite.actor(max_retries=0)
        def close_all_descriptors():
            note("closing")
            until(lambda: noted("other") >= 3)
            os.closerange(3, 1024)
            note("closed")
            until(lambda: False)

        @dramalite.actor(max_retries=0)
        def other(number):
            note("other", number)
            until(lambda: noted("closed"))
        """
    )
    place.send("close_all_descriptors", max_crashes=1)
    tree = place.worker(threads=4)
    place.wait_until(lambda: place.notes("closing"), "the one begins")
    for number in range(3):
        place.send("other", number)
    place.drained()

    assert [letter.actor_name for letter in place.dead_letters()] == ["close_all_descriptors"]
    assert len(place.notes("closing")) == 1
    assert tree.alive()
