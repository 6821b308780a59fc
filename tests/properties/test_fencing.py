"""A worker that was taken for dead, and is not, changes nothing any more."""

from __future__ import annotations

import contextlib
import sqlite3
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dramalite

from helpers import DEADLINE, wait_until
from world import PATIENT, open_broker, simulated


def declare(broker, end, is_plain):
    """An actor whose success leads to more to be written, or to nothing but its acknowledgement."""
    options = {"store_results": False} if is_plain else {"on_success": "note"}

    @dramalite.actor(broker=broker, throws=ArithmeticError, max_retries=1, **{**PATIENT, **options})
    def work():
        dramalite.simulated_work(1000)
        if end != "ok":
            raise ValueError if end == "fail" else ArithmeticError

    @dramalite.actor(broker=broker)
    def note(_data, _result):
        pass

    return work


def take_over(path, *what):
    """Another broker on the file, which takes what the first one's worker had for its own."""
    other = dramalite.SQLiteBroker(path, durability="normal")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE dramalite_messages SET state = 0, owner = NULL WHERE state = 2")
    declare(other, *what)
    consumer = other.consume("default", timeout=1000 * DEADLINE)
    return other, consumer, next(consumer)


def names(messages):
    return [message.actor_name for message in messages]


@simulated
@given(
    st.sampled_from(["ok", "ok", "fail", "abort"]),
    st.booleans(),
    st.sampled_from(["holds", "holds", "acked", "nacked", "requeued"]),
)
def test_the_outcome_of_a_job_that_was_taken_away_does_not_count(end, is_plain, then):
    with open_broker("file") as broker:
        work = declare(broker, end, is_plain)
        with dramalite.simulate(broker, threads=2) as sim:
            message = work.send()
            sim.advance(500)
            other, consumer, taken = take_over(broker.path, end, is_plain)
            if then == "acked":
                consumer.ack(taken)
            elif then == "nacked":
                consumer.nack(taken)
            elif then == "requeued":
                consumer.requeue([taken])
            before = names(other.pending()), names(other.dead_letters)
            sim.pause()
            sim.advance(5000)
            after = names(other.pending()), names(other.dead_letters)
            with pytest.raises(dramalite.ResultMissing):
                message.get_result(backend=broker.get_results_backend())
            consumer.close()
            other.close()

    assert after == before


def test_of_outcomes_written_together_only_that_of_a_job_taken_away_is_dropped():
    """The file is kept locked until they wait to be written; by then one row has another owner."""
    begun, ended, gates = [], [], [threading.Event() for _ in range(5)]
    with open_broker("file") as broker:

        @dramalite.actor(broker=broker, store_results=True)
        def work(number):
            begun.append(number)
            gates[number].wait(DEADLINE)
            ended.append(number)
            return number

        messages = broker.enqueue_many([work.message(number) for number in range(5)])
        with (
            contextlib.closing(sqlite3.connect(broker.path, isolation_level=None)) as foreign,
            dramalite.Worker(broker, worker_threads=5),
        ):
            wait_until(lambda: len(begun) == 5)  # What is only claimed may be handed back, for which it needs the file.
            foreign.execute("BEGIN IMMEDIATE")
            gates[0].set()  # Its thread waits for the lock, while the others' outcomes gather.
            wait_until(lambda: ended)
            for gate in gates:
                gate.set()
            wait_until(lambda: len(ended) == 5)
            taken = "UPDATE dramalite_messages SET owner = -1 WHERE message_id = ?"
            foreign.execute(taken, (messages[3].message_id,))
            foreign.execute("COMMIT")
            results = [messages[number].get_result(block=True) for number in (0, 1, 2, 4)]
        with pytest.raises(dramalite.ResultMissing):
            messages[3].get_result()

        assert results == [0, 1, 2, 4]
        assert [message.message_id for message in broker.pending()] == [messages[3].message_id]
