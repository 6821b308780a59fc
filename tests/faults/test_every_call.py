"""An exception out of a signal handler, at every point of a write where Python may run one."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import sys
import threading

import dramalite
import pytest

WHERE = {dramalite.__file__, contextlib.__file__}


class Stopped(BaseException):
    """What the handler raises; whoever catches it may hold it for long."""


def stop():
    raise Stopped


def interrupt(number, handler=stop):
    """Have this thread call `handler` where for the `number`th time one of a signal could run.

    Python looks for signals where a function begins and where a C function has returned.
    """
    counted = itertools.count(1)

    def strike(frame, event, _argument):
        is_point = event in ("call", "c_return") and frame.f_code.co_filename in WHERE
        if is_point and next(counted) == number:
            sys.setprofile(None)
            handler()

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


def run_worker(worker, broker, work):
    """What a program does in its main thread; it waits in vain for what is delayed."""
    worker.start()
    broker.enqueue_many([work.message(n) for n in range(20)])
    with contextlib.suppress(dramalite.QueueJoinTimeout):
        broker.join("default", timeout=20)


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.torture)])
@pytest.mark.parametrize("place", ["memory", "file"])
def test_a_handler_may_stop_the_worker_wherever_it_interrupts_the_program(tmp_path, place, stride):
    broker = dramalite.MemoryBroker() if place == "memory" else dramalite.SQLiteBroker(tmp_path / "queue.db")
    work = dramalite.actor(lambda number: None, actor_name="work", broker=broker)
    work.send_with_options(args=(0,), delay=10_000_000)
    worker = dramalite.Worker(broker, worker_threads=2)
    numbers, stopped = [], []

    def handle():
        worker.stop(timeout=5000)
        worker.stop(timeout=5000)  # As by a second signal.
        stopped.append(numbers[-1])

    def strike_everywhere():
        for number in itertools.count(1, stride):
            numbers.append(number)
            interrupt(number, handle)
            run_worker(worker, broker, work)
            sys.setprofile(None)
            for thread in threading.enumerate():
                if thread.name == "dramalite-stop":
                    thread.join()
            worker.stop()
            if stopped[-1:] != [number]:
                break

    striking = threading.Thread(target=strike_everywhere, daemon=True)
    striking.start()
    striking.join(300)

    assert not striking.is_alive(), f"stop() never returned at point {numbers[-1]}"
    assert stopped == numbers[:-1]
    assert len(stopped) > 100 / stride
    broker.close()
