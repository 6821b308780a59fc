"""Results, the plain part: storing what actors return and reading it back."""

import logging
import threading
import time

import pytest

import dramalite

from helpers import DEADLINE, wait_until

PATIENCE = DEADLINE * 1000


def result_of(message):
    """The result of `message`, waiting for it."""
    return message.get_result(block=True, timeout=PATIENCE)


def storing(function, **options):
    """An actor of `function` that stores its results."""
    return dramalite.actor(function, actor_name="work", store_results=True, **options)


@pytest.mark.parametrize(
    "value", [42, "text", None, False, 0, "", [], {}, [1, [2, {"a": None}]], {"a": 1.5}, "é😀"]
)
def test_a_stored_result_can_be_read(broker, worker, value):
    sent = storing(lambda: value).send()
    worker(broker)

    assert result_of(sent) == value


def test_a_result_has_the_form_json_gives_it(broker, worker):
    sent = storing(lambda: (1, (2,))).send()
    worker(broker)

    assert result_of(sent) == [1, [2]]


def test_a_result_can_be_read_again_and_again(broker, worker):
    sent = storing(lambda: 42).send()
    worker(broker)

    assert [result_of(sent) for _ in range(3)] == [42, 42, 42]


def test_a_result_that_is_not_there_yet_is_missing(broker):
    sent = storing(lambda: 42).send(1)
    with pytest.raises(dramalite.ResultMissing) as raised:
        sent.get_result()

    assert raised.value.message == sent


def test_waiting_for_a_result_times_out_exactly(broker):
    sent = storing(lambda: 42).send(1)
    before = time.monotonic()
    with pytest.raises(dramalite.ResultTimeout) as raised:
        sent.get_result(block=True, timeout=100)
    waited = time.monotonic() - before

    assert raised.value.message == sent
    assert 0.095 <= waited < 2


def test_a_waiting_caller_gets_the_result_when_it_comes(broker, worker):
    go_on, received = threading.Event(), []

    def work():
        go_on.wait(DEADLINE)
        return 42

    sent = storing(work).send()
    worker(broker)
    waiting = threading.Thread(target=lambda: received.append(result_of(sent)), daemon=True)
    waiting.start()
    go_on.set()
    waiting.join(DEADLINE)

    assert received == [42]


def test_a_result_of_a_delayed_message_is_found(broker, worker):
    sent = storing(lambda: 42).send_with_options(delay=1)
    worker(broker)

    assert result_of(sent) == 42


def test_a_result_is_found_by_an_equal_message(broker, worker):
    sent = storing(lambda: 42).send()
    worker(broker)
    result_of(sent)

    assert dramalite.Message.decode(sent.encode()).get_result() == 42


def test_a_result_can_be_read_through_the_backend(broker, worker):
    sent = storing(lambda: 42).send()
    worker(broker)

    assert broker.get_results_backend().get_result(sent, block=True, timeout=PATIENCE) == 42
    assert sent.get_result(backend=broker.get_results_backend()) == 42


def test_a_result_is_read_through_another_broker_on_the_file(make_file_broker, worker):
    first = make_file_broker()
    sent = storing(lambda: 42, broker=first).send()
    worker(first)
    second = make_file_broker()

    assert second.get_results_backend().get_result(sent, block=True, timeout=PATIENCE) == 42


@pytest.mark.parametrize("place", ["actor", "message", "neither"])
def test_results_are_stored_if_actor_or_message_say_so(broker, worker, place):
    options = {"store_results": True}
    actor = dramalite.actor(
        lambda: 42, actor_name="work", **(options if place == "actor" else {})
    )
    sent = actor.send_with_options(**(options if place == "message" else {}))
    worker(broker)
    broker.join("default", timeout=PATIENCE)
    try:
        found = sent.get_result()
    except dramalite.ResultError:
        found = "none"

    assert found == ("none" if place == "neither" else 42)


def test_a_message_may_decline_to_store_its_result(broker, worker):
    sent = storing(lambda: 42).send_with_options(store_results=False)
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    with pytest.raises(dramalite.ResultError):
        sent.get_result()


def fail():
    raise ValueError("no such thing")


def test_a_final_failure_is_stored_with_its_type_and_text(broker, worker):
    sent = storing(fail, max_retries=0).send()
    worker(broker)
    with pytest.raises(dramalite.ResultFailure) as raised:
        result_of(sent)

    assert str(raised.value) == "actor raised ValueError: no such thing"
    assert raised.value.orig_exc_type == "ValueError"
    assert raised.value.orig_exc_msg == "no such thing"


def test_while_retries_are_pending_the_result_is_missing(make_broker, clock, worker):
    broker = make_broker(clock=clock)
    attempts = []

    def flaky():
        attempts.append(1)
        if len(attempts) == 1:
            raise ValueError("once")
        return 42

    sent = storing(flaky, min_backoff=60_000).send()
    first = worker(broker)
    wait_until(lambda: attempts)
    first.stop()
    with pytest.raises(dramalite.ResultMissing):
        sent.get_result()
    clock.advance(120_000)
    worker(broker)

    assert result_of(sent) == 42


def test_an_expected_exception_is_stored_as_a_failure(broker, worker):
    sent = storing(fail, throws=ValueError).send()
    worker(broker)

    with pytest.raises(dramalite.ResultFailure):
        result_of(sent)


def test_the_result_of_a_skipped_message_is_none(broker, worker):
    def skip():
        raise dramalite.SkipMessage("not today")

    sent = storing(skip).send()
    worker(broker)

    assert result_of(sent) is None


def test_a_result_that_cannot_be_stored_is_stored_as_a_failure(broker, worker):
    sent = storing(lambda: {1, 2}, max_retries=0).send()
    worker(broker)

    with pytest.raises(dramalite.ResultFailure):
        result_of(sent)


def test_a_value_that_is_not_stored_is_warned_about(broker, worker, caplog):
    dramalite.actor(lambda: 42, actor_name="work").send()
    worker(broker)
    broker.join("default", timeout=PATIENCE)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

    assert ["the value has been discarded" in text for text in warnings] == [True]


@pytest.mark.parametrize("value, stored", [(None, False), (42, True)])
def test_nothing_is_warned_about_if_nothing_is_lost(broker, worker, caplog, value, stored):
    dramalite.actor(lambda: value, actor_name="work", store_results=stored).send()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_a_result_expires_after_its_time(make_broker, clock, worker):
    broker = make_broker(clock=clock)
    sent = storing(lambda: 42, result_ttl=900).send()
    worker(broker)
    fresh = result_of(sent)
    clock.advance(899)
    still = sent.get_result()
    clock.advance(2)

    with pytest.raises(dramalite.ResultError):
        sent.get_result()
    assert (fresh, still) == (42, 42)
