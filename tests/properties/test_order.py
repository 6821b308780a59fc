"""One thread works strictly by priority, and first in, first out within a priority."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dramalite

from helpers import DEADLINE

PATIENCE = DEADLINE * 1000

priorities = st.integers(min_value=-3, max_value=3) | st.integers(-(2**40), 2**40)


@pytest.fixture(scope="module", params=["memory", "file"])
def run_in_order(request, tmp_path_factory):
    """A function that sends (priority of the actor, priority of the message or None, queue) and
    returns the numbers of the messages in the order in which one thread ran them."""

    def run(plan):
        done = []
        options = {"middleware": []}  # A time limit's thread stays when its broker is gone.
        if request.param == "memory":
            broker = dramalite.MemoryBroker(**options)
        else:
            broker = dramalite.SQLiteBroker(
                tmp_path_factory.mktemp("order") / "queue.db", durability="normal", **options
            )
        try:
            actors = {}
            for number, (of_actor, of_message, queue) in enumerate(plan):
                key = (of_actor, queue)
                if key not in actors:
                    actors[key] = dramalite.actor(
                        done.append,
                        actor_name=f"work_{len(actors)}",
                        queue_name=queue,
                        priority=of_actor,
                        broker=broker,
                    )
                options = {} if of_message is None else {"priority": of_message}
                actors[key].send_with_options(args=(number,), **options)
            with dramalite.Worker(broker, worker_threads=1):
                for queue in sorted({queue for _, _, queue in plan}):
                    broker.join(queue, timeout=PATIENCE)
        finally:
            broker.close()
        return done

    return run


def expected_order(plan):
    """The numbers of the messages by (priority, order of sending)."""
    return sorted(
        range(len(plan)),
        key=lambda number: (
            plan[number][0] if plan[number][1] is None else plan[number][1],
            number,
        ),
    )


def plans(queues):
    steps = st.tuples(priorities, st.none() | priorities, st.sampled_from(queues))
    return st.lists(steps, min_size=1, max_size=30)


@given(plan=plans(["default"]))
def test_messages_run_by_priority_and_then_in_the_order_they_were_sent(run_in_order, plan):
    assert run_in_order(plan) == expected_order(plan)


@given(plan=plans(["a", "b", "c"]))
def test_the_order_holds_across_the_queues_of_a_worker(run_in_order, plan):
    assert run_in_order(plan) == expected_order(plan)


@pytest.fixture(scope="module", params=["memory", "file"])
def warm_worker(request, tmp_path_factory):
    """A paused worker that takes what there is in one batch, its actor, and the list of what it ran."""
    if request.param == "memory":
        broker = dramalite.MemoryBroker()
    else:
        broker = dramalite.SQLiteBroker(tmp_path_factory.mktemp("batch") / "queue.db", durability="normal")
    done = []
    work = dramalite.actor(done.append, actor_name="work", broker=broker)
    with dramalite.Worker(broker, worker_threads=1) as worker:
        for number in range(150):  # It learns that they take no time.
            work.send(number)
        broker.join("default", timeout=PATIENCE)
        worker.pause()
        yield worker, work, done
    broker.close()


@given(plan=st.lists(priorities, max_size=30))
def test_the_order_holds_within_a_batch(warm_worker, plan):
    worker, work, done = warm_worker
    done.clear()
    for number, priority in enumerate(plan):
        work.send_with_options(args=(number,), priority=priority)
    worker.resume()
    work.broker.join("default", timeout=PATIENCE)
    worker.pause()

    assert done == sorted(range(len(plan)), key=lambda number: (plan[number], number))
