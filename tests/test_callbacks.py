"""Callbacks: on_success and on_failure."""

import json
import logging

import pytest

import dramalite

from helpers import DEADLINE

PATIENCE = DEADLINE * 1000
FIELDS = [
    "queue_name",
    "actor_name",
    "args",
    "kwargs",
    "options",
    "message_id",
    "message_timestamp",
]


@pytest.fixture
def calls(broker):
    """What the callbacks `log_success` and `handle_failure` were called with."""
    calls = []

    @dramalite.actor
    def log_success(message_data, result):
        calls.append(("success", message_data, result))

    @dramalite.actor
    def handle_failure(message_data, exception_data):
        calls.append(("failure", message_data, exception_data))

    return calls


def work_off(broker, worker):
    worker(broker)
    broker.join("default", timeout=PATIENCE)


def test_on_success_gets_the_message_and_the_result(broker, worker, calls):
    add = dramalite.actor(lambda x, y: x + y, actor_name="add", on_success="log_success")
    sent = add.send(1, y=2)
    work_off(broker, worker)
    (kind, message_data, result) = calls[0]

    assert len(calls) == 1
    assert (kind, result) == ("success", 3)
    assert message_data == {**sent.asdict(), "args": [1]}
    assert isinstance(message_data, dict)


def test_the_message_answers_to_its_fields_as_attributes(broker, worker):
    seen = []

    @dramalite.actor
    def log_success(message_data, result):
        seen.append([getattr(message_data, field) for field in FIELDS])

    sent = dramalite.actor(lambda: None, actor_name="work", on_success="log_success").send()
    work_off(broker, worker)

    assert seen == [[{**sent.asdict(), "args": []}[field] for field in FIELDS]]


def test_the_message_is_plain_json_on_the_wire(make_stub_broker):
    received = []

    class Wire(dramalite.Middleware):
        def after_enqueue(self, broker, message, delay):
            if message.actor_name == "log_success":
                received.append(json.loads(message.encode())["args"][0])

    broker = make_stub_broker()
    broker.add_middleware(Wire())
    dramalite.actor(lambda *args: None, actor_name="log_success")
    sent = dramalite.actor(lambda: None, actor_name="work", on_success="log_success").send()
    with dramalite.Worker(broker, worker_threads=1):
        broker.join("default", timeout=PATIENCE)

    assert received == [{**sent.asdict(), "args": []}]
    assert list(received[0]) == FIELDS


def test_an_attribute_that_is_no_field_is_an_error(broker, worker):
    seen = []

    @dramalite.actor
    def log_success(message_data, result):
        seen.append(hasattr(message_data, "no_such_field"))

    dramalite.actor(lambda: None, actor_name="work", on_success="log_success").send()
    work_off(broker, worker)

    assert seen == [False]


def test_a_dict_of_other_keys_stays_a_plain_dict(broker, worker):
    seen = []
    work = dramalite.actor(lambda value: seen.append(type(value)), actor_name="work")
    work.send({"queue_name": "default", "message_id": "x"})
    work_off(broker, worker)

    assert seen == [dict]


def test_on_failure_gets_the_message_and_the_exception(broker, worker, calls):
    def work(value):
        raise ValueError("no such thing")

    sent = dramalite.actor(work, on_failure="handle_failure", max_retries=0).send(1)
    work_off(broker, worker)
    ((kind, message_data, exception_data),) = calls

    assert kind == "failure"
    assert (message_data.message_id, message_data.args) == (sent.message_id, [1])
    assert exception_data == {"type": "ValueError", "message": "no such thing"}


def test_on_failure_comes_at_every_attempt_with_the_count_so_far(broker, worker, calls):
    def work():
        raise ValueError("no")

    dramalite.actor(work, on_failure="handle_failure", max_retries=3, min_backoff=0).send()
    work_off(broker, worker)

    assert [kind for kind, _, _ in calls] == ["failure"] * 4
    assert [message["options"]["retries"] for _, message, _ in calls] == [1, 2, 3, 4]
    assert all("ValueError" in message["options"]["traceback"] for _, message, _ in calls)


def test_on_failure_comes_for_expected_exceptions_too(broker, worker, calls):
    def work():
        raise ValueError("expected")

    dramalite.actor(work, on_failure="handle_failure", throws=ValueError).send()
    work_off(broker, worker)

    assert [kind for kind, _, _ in calls] == ["failure"]


def test_a_success_after_a_retry_calls_both(broker, worker, calls):
    attempts = []

    def work():
        attempts.append(1)
        if len(attempts) == 1:
            raise ValueError("once")
        return "done"

    dramalite.actor(
        work, on_success="log_success", on_failure="handle_failure", min_backoff=0
    ).send()
    work_off(broker, worker)

    assert [kind for kind, _, _ in calls] == ["failure", "success"]


def test_a_result_of_none_is_reported_too(broker, worker, calls):
    dramalite.actor(lambda: None, actor_name="work", on_success="log_success").send()
    work_off(broker, worker)

    assert [(kind, result) for kind, _, result in calls] == [("success", None)]


@pytest.mark.parametrize("place", ["actor", "message"])
@pytest.mark.parametrize("form", ["name", "actor object"])
def test_callbacks_are_given_by_name_or_as_actor_in_either_place(
    broker, worker, calls, place, form
):
    callback = "log_success" if form == "name" else broker.get_actor("log_success")
    options = {"on_success": callback}
    work = dramalite.actor(
        lambda: 1, actor_name="work", **(options if place == "actor" else {})
    )
    work.send_with_options(**(options if place == "message" else {}))
    work_off(broker, worker)

    assert [(kind, result) for kind, _, result in calls] == [("success", 1)]


def test_a_class_based_actor_can_be_a_callback(broker, worker):
    seen = []

    class Done(dramalite.GenericActor):
        def perform(self, message_data, result):
            seen.append((message_data.actor_name, result))

    dramalite.actor(lambda: 1, actor_name="work", on_success=Done).send()
    work_off(broker, worker)

    assert seen == [("work", 1)]


def test_the_messages_callback_overrides_its_actors(broker, worker, calls):
    seen = []
    mine = dramalite.actor(lambda message, result: seen.append(result), actor_name="mine")
    work = dramalite.actor(lambda: 1, actor_name="work", on_success="log_success")
    work.send_with_options(on_success=mine)
    work_off(broker, worker)

    assert seen == [1]
    assert calls == []


@pytest.mark.parametrize("kind", ["success", "failure"])
def test_a_message_without_a_callback_leaves_it_to_its_actor(broker, worker, calls, kind):
    def work(kind):
        if kind == "failure":
            raise ValueError("no")

    actor = dramalite.actor(work, max_retries=0, on_success="log_success", on_failure="handle_failure")
    actor.send_with_options(args=(kind,), on_success=None, on_failure=None)
    work_off(broker, worker)

    assert [call[0] for call in calls] == [kind]


def test_a_callback_that_does_not_exist_does_not_harm_the_message(stub_broker, worker):
    done = []
    work = dramalite.actor(lambda: done.append(1), actor_name="work", on_success="nobody")
    work.send()
    work.send()
    worker(stub_broker)
    stub_broker.join("default", timeout=PATIENCE, fail_fast=False)

    assert done == [1, 1]


def test_a_result_that_the_callback_cannot_be_sent_is_a_failure_and_not_lost(broker, worker, calls):
    sent = dramalite.actor(lambda: {1, 2}, actor_name="work", max_retries=0, on_success="log_success").send()
    work_off(broker, worker)

    assert calls == []
    assert [letter.message_id for letter in broker.dead_letters] == [sent.message_id]
    assert "TypeError" in broker.dead_letters[0].reason


class RefusesCallbacks(dramalite.Middleware):
    def before_enqueue(self, broker, message, delay):
        if message.actor_name == "log_success":
            raise dramalite.MiddlewareError("the quota is used up")


def test_a_callback_that_a_middleware_refuses_is_a_failure_and_not_lost(broker, worker, calls):
    broker.add_middleware(RefusesCallbacks())
    sent = dramalite.actor(lambda: 1, actor_name="work", max_retries=0, on_success="log_success").send()
    work_off(broker, worker)

    assert [letter.message_id for letter in broker.dead_letters] == [sent.message_id]
    assert "the quota is used up" in broker.dead_letters[0].reason


def test_no_step_follows_a_step_whose_callback_is_refused(broker, worker, calls):
    broker.add_middleware(RefusesCallbacks())
    followed = []
    work = dramalite.actor(lambda: 1, actor_name="work", max_retries=0, on_success="log_success")
    follow = dramalite.actor(followed.append, actor_name="follow")
    (work.message() | follow.message()).run()
    work_off(broker, worker)

    assert followed == []


def test_on_failure_comes_for_a_message_of_nearly_the_allowed_size(make_broker, worker):
    broker = make_broker(max_message_size=1000)
    told = []

    def fail(text):
        raise ValueError("no")

    dramalite.actor(lambda message_data, exception_data: told.append(message_data.message_id), actor_name="tell")
    work = dramalite.actor(fail, max_retries=0, on_failure="tell")
    sent = work.send("x" * (995 - len(work.message("").encode())))
    work_off(broker, worker)

    assert told == [sent.message_id]


def test_no_callback_comes_for_a_message_that_was_skipped_or_too_old(broker, worker, calls):
    def skip():
        raise dramalite.SkipMessage("not today")

    callbacks = {"on_success": "log_success", "on_failure": "handle_failure"}
    dramalite.actor(skip, **callbacks).send()
    dramalite.actor(lambda: 1, actor_name="work", max_age=1, **callbacks).send_with_options(delay=5)
    work_off(broker, worker)

    assert calls == []


def test_no_value_is_reported_lost_that_a_callback_received(stub_broker, worker, caplog):
    received = []
    dramalite.actor(lambda message, result: received.append(result), actor_name="log_success")
    dramalite.actor(lambda: 42, actor_name="work", on_success="log_success").send()
    worker(stub_broker)
    stub_broker.join("default", timeout=PATIENCE)

    assert received == [42]
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
