"""CurrentMessage: a job can see the message that it works on."""

import asyncio
import threading

import pytest

import dramalite
from dramalite import CurrentMessage

from helpers import DEADLINE

PATIENCE = DEADLINE * 1000


@pytest.fixture
def broker(make_broker):
    """A broker that has CurrentMessage, once."""
    broker = make_broker()
    if not any(isinstance(item, CurrentMessage) for item in broker.middleware):
        broker.add_middleware(CurrentMessage())
    return broker


@pytest.fixture
def seen():
    return []


def current_id():
    """The id of the current message, or None."""
    message = CurrentMessage.get_current_message()
    return None if message is None else message.message_id


def work_off(broker, worker):
    worker(broker)
    broker.join("default", timeout=PATIENCE)


def test_there_is_none_outside_of_a_job(broker):
    assert CurrentMessage.get_current_message() is None


def test_a_job_sees_its_message(broker, worker, seen):
    def work(value):
        message = CurrentMessage.get_current_message()
        seen.append((message.message_id, message.args, message.options))

    sent = dramalite.actor(work).send_with_options(args=(1,), colour="red")
    work_off(broker, worker)

    assert seen == [(sent.message_id, (1,), {"colour": "red"})]


def test_a_job_sees_a_proxy(broker, worker, seen):
    dramalite.actor(
        lambda: seen.append(type(CurrentMessage.get_current_message())), actor_name="work"
    ).send()
    work_off(broker, worker)

    assert issubclass(seen[0], dramalite.MessageProxy)


def test_an_async_job_sees_its_message_before_and_after_waiting(broker, worker, seen):
    @dramalite.actor
    async def work():
        seen.append(current_id())
        await asyncio.sleep(0)
        seen.append(current_id())

    sent = work.send()
    work_off(broker, worker)

    assert seen == [sent.message_id] * 2


def test_jobs_at_the_same_time_see_their_own_messages(broker, worker, seen):
    meeting = threading.Barrier(3)

    def work():
        meeting.wait(DEADLINE)
        seen.append(current_id())

    actor = dramalite.actor(work, max_retries=0)
    sent = [actor.send() for _ in range(3)]
    worker(broker, worker_threads=3)
    broker.join("default", timeout=PATIENCE)

    assert sorted(seen) == sorted(message.message_id for message in sent)


class After(dramalite.Middleware):
    """Writes down the current message at the end of everything, on the worker's thread."""

    def __init__(self, seen):
        self.seen = seen

    def after_ack(self, broker, message):
        self.seen.append(current_id())

    after_nack = after_ack


@pytest.mark.parametrize(
    "error", [None, ValueError("no"), dramalite.SkipMessage("skip"), KeyboardInterrupt()]
)
def test_it_is_gone_after_the_job_however_it_ended(broker, worker, seen, error):
    def work():
        if error is not None:
            raise error

    broker.add_middleware(After(seen))
    dramalite.actor(work, max_retries=0).send()
    work_off(broker, worker)

    assert seen == [None]


def test_it_is_gone_after_a_message_that_was_skipped_before_it_ran(broker, worker, seen):
    class Skip(dramalite.Middleware):
        def before_process_message(self, broker, message):
            raise dramalite.SkipMessage("skip")

    broker.add_middleware(Skip())
    broker.add_middleware(After(seen))
    dramalite.actor(lambda: None, actor_name="work").send()
    work_off(broker, worker)

    assert seen == [None]


def test_a_direct_call_has_no_message(broker):
    assert dramalite.actor(current_id, actor_name="work")() is None


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_a_drain_that_is_interrupted_forgets_its_message(broker, end):
    class Interrupt(dramalite.Middleware):
        def after_process_message(self, broker, message, *, result=None, exception=None):
            raise end

    broker.add_middleware(Interrupt(), after=CurrentMessage)
    dramalite.actor(lambda: None, actor_name="work").send()
    with pytest.raises((KeyboardInterrupt, RuntimeError)):  # A hook's SystemExit costs the message, and no more.
        broker.drain()

    assert CurrentMessage.get_current_message() is None
