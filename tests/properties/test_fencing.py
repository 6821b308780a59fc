"""A worker that was taken for dead, and is not, changes nothing any more."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dramalite

from helpers import DEADLINE
from world import PATIENT, open_broker, simulated

pytestmark = pytest.mark.skipif(os.name == "nt", reason="An open file can't be deleted on Windows.")


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
    os.remove(f"{path}-lock")  # With its locks the worker's life is forgotten.
    other.drain()  # It knows no actors yet: it takes back what the dead had, and runs nothing.
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
