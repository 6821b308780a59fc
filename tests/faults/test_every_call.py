"""An exception out of a signal handler, at every point of a write where Python may run one."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import sys

import dramalite
import pytest

WHERE = {dramalite.__file__, contextlib.__file__}


class Stopped(BaseException):
    """What the handler raises; whoever catches it may hold it for long."""


def interrupt(number):
    """Have this thread meet Stopped where for the `number`th time a handler could have run.

    Python looks for signals where a function begins and where a C function has returned.
    """
    counted = itertools.count(1)

    def strike(frame, event, _argument):
        is_point = event in ("call", "c_return") and frame.f_code.co_filename in WHERE
        if is_point and next(counted) == number:
            sys.setprofile(None)
            raise Stopped

    sys.setprofile(strike)


def send_many(broker, work):
    broker.enqueue_many([work.message(n) for n in range(3)])


def send(broker, work):
    work.send(0)


def limit(broker, work):
    backend = dramalite.SQLiteRateLimiterBackend(broker)
    backend.add("key", 1, 10_000)
    backend.incr("key", 1, 5, 10_000)


def flush(broker, work):
    broker.flush_all()


@pytest.mark.parametrize("write", [send, send_many, limit, flush])
def test_an_exception_of_a_signal_handler_keeps_nothing_locked_while_it_is_alive(tmp_path, write):
    path = tmp_path / "queue.db"
    broker = dramalite.SQLiteBroker(path, durability="normal")
    work = dramalite.actor(print, actor_name="work", broker=broker)
    send(broker, work)
    write(broker, work)
    others = sqlite3.connect(path, isolation_level=None, timeout=0)
    for number in itertools.count(1):
        try:
            interrupt(number)
            write(broker, work)
        except Stopped as stopped:  # Alive up to the end of this block, with all its frames.
            sys.setprofile(None)
            others.execute("BEGIN IMMEDIATE").execute("ROLLBACK")
            sent = work.send(number)
            stored = {message.message_id for message in broker.pending()}

            assert sent.message_id in stored, f"stopped at point {number}: {stopped!r}"
        else:
            sys.setprofile(None)
            break
    others.close()
    broker.close()

    assert number > 20
