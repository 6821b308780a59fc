"""AgeLimit: messages that are too old are not run."""

import datetime
import logging

import pytest

import dramalite

from helpers import DEADLINE

PATIENCE = DEADLINE * 1000
MINUTE = 60_000


@pytest.fixture
def done():
    return []


def send_aged(broker, actor, age, **options):
    """Enqueue a message for `actor` that was created `age` milliseconds ago."""
    message = actor.message_with_options(**options)
    return broker.enqueue(
        message._replace(message_timestamp=dramalite.Clock().time_ms() - age)
    )


def work_off(broker, worker):
    worker(broker)
    broker.join("default", timeout=PATIENCE)


def test_there_is_no_limit_by_default(broker, worker, done):
    actor = dramalite.actor(lambda: done.append("ran"), actor_name="work")
    send_aged(broker, actor, 10 * 365 * 24 * 60 * MINUTE)
    work_off(broker, worker)

    assert done == ["ran"]


def test_a_message_that_is_too_old_becomes_a_dead_letter(broker, worker, done, caplog):
    actor = dramalite.actor(lambda: done.append("ran"), actor_name="work", max_age=MINUTE)
    old = send_aged(broker, actor, 2 * MINUTE)
    send_aged(broker, actor, MINUTE // 2)
    work_off(broker, worker)

    assert done == ["ran"]
    assert [letter.message_id for letter in broker.dead_letters] == [old.message_id]
    assert "WARNING" in [record.levelname for record in caplog.records]


def test_a_message_exactly_as_old_as_the_limit_is_too_old(make_broker, clock, worker, done):
    broker = make_broker(clock=clock)
    actor = dramalite.actor(lambda value: done.append(value), actor_name="work", max_age=MINUTE)
    now = clock.time_ms()
    for age in [MINUTE - 1, MINUTE, MINUTE + 1]:
        broker.enqueue(actor.message(age)._replace(message_timestamp=now - age))
    work_off(broker, worker)

    assert done == [MINUTE - 1]
    assert len(broker.dead_letters) == 2


def test_the_middleware_can_set_a_limit_for_all(make_broker, worker, done):
    broker = make_broker(middleware=[dramalite.AgeLimit(max_age=MINUTE)])
    actor = dramalite.actor(lambda: done.append("ran"), actor_name="work")
    send_aged(broker, actor, 2 * MINUTE)
    work_off(broker, worker)

    assert done == []
    assert len(broker.dead_letters) == 1


def test_an_actors_limit_overrides_that_of_the_middleware(make_broker, worker, done):
    broker = make_broker(middleware=[dramalite.AgeLimit(max_age=MINUTE)])
    actor = dramalite.actor(lambda: done.append("ran"), actor_name="work", max_age=5 * MINUTE)
    send_aged(broker, actor, 2 * MINUTE)
    work_off(broker, worker)

    assert done == ["ran"]


def test_a_messages_limit_overrides_that_of_its_actor(broker, worker, done):
    actor = dramalite.actor(lambda: done.append("ran"), actor_name="work", max_age=MINUTE)
    send_aged(broker, actor, 2 * MINUTE, max_age=5 * MINUTE)
    work_off(broker, worker)

    assert done == ["ran"]


def test_a_messages_limit_of_0_leaves_it_to_its_actor(broker, worker, done):
    actor = dramalite.actor(lambda: done.append("ran"), actor_name="work", max_age=MINUTE)
    send_aged(broker, actor, 2 * MINUTE, max_age=0)
    work_off(broker, worker)

    assert done == []
    assert len(broker.dead_letters) == 1


@pytest.mark.parametrize("minutes, expected", [(1, []), (5, ["ran"])])
def test_a_limit_may_be_a_timedelta(broker, worker, done, minutes, expected):
    limit = datetime.timedelta(minutes=minutes)
    actor = dramalite.actor(lambda: done.append("ran"), actor_name="work", max_age=limit)
    send_aged(broker, actor, 2 * MINUTE)
    work_off(broker, worker)

    assert done == expected


def test_a_limit_that_a_middleware_gives_a_message_before_it_runs_holds(broker, worker, done):
    class Limit(dramalite.Middleware):
        def before_process_message(self, broker, message):
            message.options["max_age"] = MINUTE

    broker.add_middleware(Limit(), before=dramalite.AgeLimit)
    old = send_aged(broker, dramalite.actor(lambda: done.append("ran"), actor_name="work"), 2 * MINUTE)
    work_off(broker, worker)

    assert done == []
    assert [letter.message_id for letter in broker.dead_letters] == [old.message_id]


def test_time_spent_delayed_counts(make_broker, clock, worker, done):
    broker = make_broker(clock=clock)
    actor = dramalite.actor(lambda: done.append("ran"), actor_name="work", max_age=3 * MINUTE)
    message = actor.message()._replace(message_timestamp=clock.time_ms())
    broker.enqueue(message, delay=4 * MINUTE)
    clock.advance(4 * MINUTE)
    work_off(broker, worker)

    assert done == []
    assert len(broker.dead_letters) == 1


def test_nothing_follows_a_message_that_was_too_old(broker, worker, done):
    follow = dramalite.actor(lambda *args: done.append(args), actor_name="follow")
    actor = dramalite.actor(
        lambda: done.append("ran"),
        actor_name="work",
        max_age=MINUTE,
        on_success=follow,
        on_failure=follow,
        on_retry_exhausted=follow,
    )
    send_aged(broker, actor, 2 * MINUTE)
    work_off(broker, worker)

    assert done == []


def test_a_message_that_was_too_old_is_skipped_for_good(broker, worker, caplog):
    actor = dramalite.actor(lambda: None, actor_name="work", max_age=MINUTE)
    send_aged(broker, actor, 2 * MINUTE)
    work_off(broker, worker)

    assert [r for r in caplog.records if r.levelno > logging.WARNING] == []
    assert "retries" not in list(broker.dead_letters)[0].options


def test_a_stub_broker_raises_the_skip_from_join(stub_broker, worker):
    actor = dramalite.actor(lambda: None, actor_name="work", max_age=MINUTE)
    send_aged(stub_broker, actor, 2 * MINUTE)
    worker(stub_broker)
    with pytest.raises(dramalite.SkipMessage) as raised:
        stub_broker.join("default", timeout=PATIENCE)

    assert str(raised.value) == "Message age limit exceeded"


def test_the_result_of_a_message_that_was_too_old_is_a_failure(broker, worker):
    actor = dramalite.actor(
        lambda: None, actor_name="work", max_age=MINUTE, store_results=True
    )
    sent = send_aged(broker, actor, 2 * MINUTE)
    worker(broker)
    with pytest.raises(dramalite.ResultFailure) as raised:
        sent.get_result(block=True, timeout=PATIENCE)

    assert str(raised.value) == "actor raised SkipMessage: Message age limit exceeded"
