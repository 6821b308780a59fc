"""Stored rows that are damaged, and jobs that misbehave: each is dealt with alone, the rest goes on."""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal

import pytest

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
    ["change folder", "umask", "environment"],
    ["remove folder"],
    ["recursion limit", "switch interval"],
    ["threads"],
    ["unload modules"],
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
    assert tree.wait(5) == 0, tree.tail()


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


@pytest.mark.parametrize("kinds", SPOILING, ids=", ".join)
def test_a_job_that_spoils_its_process_does_not_stop_the_next_ones(place, kinds):
    tree = place.ready_worker()
    for kind in kinds:
        place.send("misbehave", kind)
        place.wait_until(lambda: place.notes("misbehave", kind.replace(" ", "_")), "the job misbehaves")
    for number in range(5):
        place.send("healthy", number)
        place.send("misbehave", "base exception")
    place.drained(15)
    tree.signal(signal.SIGTERM)

    assert tree.wait(6) == 0, tree.tail()
    assert place.runs("healthy") == {str(number): 1 for number in range(5)}
    assert place.runs("misbehave")["base_exception"] == 5
    assert tree.pids() == []


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
