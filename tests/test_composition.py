"""Groups and pipelines as objects: what they contain, what run() sends, how results are collected."""

import datetime
from unittest import mock

import pytest

import dramalite
from dramalite import Message, group, pipeline

from helpers import DEADLINE


def ids(messages):
    return [message.message_id for message in messages]


@pytest.fixture
def add(broker):
    """An actor that adds and stores its result."""
    return dramalite.actor(lambda x, y: x + y, actor_name="add", store_results=True)


@pytest.fixture
def fail(broker):
    """An actor that fails for good and stores that."""

    def fail(*args):
        raise ValueError("no")

    return dramalite.actor(fail, store_results=True, max_retries=0)


class Enqueued(dramalite.Middleware):
    """Keeps what was enqueued: (message, delay)."""

    def __init__(self):
        self.calls = []

    def after_enqueue(self, broker, message, delay):
        self.calls.append((message, delay))


@pytest.fixture
def enqueued(broker):
    """What is enqueued on `broker`, as a list of (message, delay)."""
    hook = Enqueued()
    broker.add_middleware(hook)
    return hook.calls


# Where they go


@pytest.mark.parametrize("compose", [pipeline, group, lambda messages: pipeline([group(messages)])])
def test_messages_go_to_the_broker_that_made_them_and_not_to_the_default_one(make_stub_broker, compose):
    home, default = make_stub_broker(), make_stub_broker()
    work = dramalite.actor(print, actor_name="work", broker=home)
    compose([work.message(1), work.message(2)]).run()

    assert home.pending() != []
    assert default.pending() == []


@pytest.mark.parametrize(("compose", "what"), [(pipeline, "pipeline"), (group, "group")])
def test_an_actor_in_place_of_its_message_is_refused_with_what_to_do(add, compose, what):
    with pytest.raises(TypeError, match=rf"{what}; give messages, as made by actor\.message"):
        compose([add])


@pytest.mark.parametrize("compose", [pipeline, group])
def test_a_message_in_place_of_a_list_is_refused_with_what_to_do(add, compose):
    with pytest.raises(TypeError, match="'add'.*give a list of messages"):
        compose(add.message(1, 2))


@pytest.mark.parametrize("compose", [pipeline, group])
def test_a_proxy_stands_for_its_message(add, broker, compose):
    message = add.message(1, 2)
    composed = compose([dramalite.MessageProxy(message)])
    composed.run()
    broker.drain()

    assert message.get_result() == 3
    assert list(composed.get_results()) == [3]


# Pipelines as objects


def test_a_pipeline_takes_any_iterable_of_messages(add):
    messages = [add.message(1, 1), add.message(2)]
    pipe = pipeline(message for message in messages)

    assert len(pipe) == 2
    assert type(pipe.messages) is list
    assert ids(pipe.messages) == ids(messages)


def test_each_step_carries_the_next_one_and_the_last_carries_none(add):
    pipe = pipeline([add.message(1, 1), add.message(2), add.message(3)])
    first, second, third = pipe.messages

    assert first.options["pipe_target"] == second.asdict()
    assert second.options["pipe_target"] == third.asdict()
    assert "pipe_target" not in third.options


def test_a_pipeline_copies_its_messages(add):
    first, second = add.message(1, 1), add.message(2)
    pipeline([first, second])

    assert (first.options, second.options) == ({}, {})


def test_pipelines_inside_a_pipeline_are_flattened(add):
    a, b, c, d = (add.message(number, 0) for number in range(4))
    pipe = pipeline([a, pipeline([b, c]), d])

    assert len(pipe) == 4
    assert ids(pipe.messages) == ids([a, b, c, d])


def test_the_pipe_operator_appends_messages_and_pipelines(add):
    a, b, c, d = (add.message(number, 0) for number in range(4))
    short = a | b
    long = short | (c | d)

    assert ids(short.messages) == ids([a, b])
    assert ids(long.messages) == ids([a, b, c, d])
    assert long.messages[1].options["pipe_target"] == long.messages[2].asdict()


def test_the_operator_and_the_class_make_the_same_pipeline(add):
    a, b, c = (add.message(number, 0) for number in range(3))

    assert (a | b | c).messages == pipeline([a, b, c]).messages


def test_a_pipeline_prints_as_its_calls(add):
    assert str(pipeline([add.message(1, 1), add.message(2)])) == "pipeline([add(1, 1), add(2)])"


def test_running_a_pipeline_enqueues_its_first_message_only_and_returns_it(add, enqueued):
    pipe = add.message(1, 1) | add.message(2)
    returned = pipe.run()

    assert returned is pipe
    assert enqueued == [(pipe.messages[0], None)]


@pytest.mark.parametrize(
    "own, given, expected",
    [(None, None, None), (200, None, 200), (None, 100, 100), (200, 100, 200), (100, 200, 200)],
)
def test_a_pipeline_waits_for_the_longer_of_both_delays(add, enqueued, own, given, expected):
    options = {} if own is None else {"delay": own}
    pipe = add.message_with_options(args=(1, 1), **options) | add.message(2)
    pipe.run(delay=given)

    assert [delay for _, delay in enqueued] == [expected]


def test_a_pipelines_result_is_that_of_its_last_message(add, broker, worker):
    pipe = (add.message(1, 2) | add.message(3) | add.message(4)).run()
    worker(broker)

    assert pipe.get_result(block=True, timeout=DEADLINE * 1000) == 10
    assert list(pipe.get_results()) == [3, 6, 10]


def test_results_of_the_original_messages_can_be_read(add, broker, worker):
    first, second = add.message(1, 2), add.message(3)
    (first | second).run()
    worker(broker)

    assert second.get_result(block=True, timeout=DEADLINE * 1000) == 6
    assert first.get_result() == 3


def test_a_pipelines_results_can_be_awaited_one_by_one(add, broker, worker):
    pipe = (add.message(1, 2) | add.message(3)).run()
    worker(broker)
    results = pipe.get_results(block=True, timeout=DEADLINE * 1000)

    assert next(results) == 3
    assert next(results) == 6
    assert list(results) == []


def test_a_pipelines_missing_result_is_missing_or_times_out(add):
    pipe = (add.message(1, 2) | add.message(3)).run()

    with pytest.raises(dramalite.ResultMissing):
        pipe.get_result()
    with pytest.raises(dramalite.ResultTimeout):
        pipe.get_result(block=True, timeout=20)
    with pytest.raises(dramalite.ResultTimeout):
        list(pipe.get_results(block=True, timeout=20))


def test_a_pipeline_counts_what_is_completed(add, broker, worker):
    pipe = (add.message(1, 2) | add.message(3)).run()
    before = (pipe.completed, pipe.completed_count)
    worker(broker)
    pipe.get_result(block=True, timeout=DEADLINE * 1000)

    assert before == (False, 0)
    assert (pipe.completed, pipe.completed_count) == (True, 2)


def test_a_pipeline_counts_up_to_the_first_step_without_a_result(add, broker, worker):
    forgetful = dramalite.actor(lambda x: x, actor_name="forgetful")
    pipe = (add.message(1, 2) | forgetful.message() | add.message(3)).run()
    worker(broker)

    assert pipe.get_result(block=True, timeout=DEADLINE * 1000) == 6
    assert pipe.completed_count == 1


def test_a_failed_step_raises_where_results_are_collected(add, fail, broker, worker):
    pipe = (add.message(1, 2) | fail.message() | add.message(3)).run()
    worker(broker)

    with pytest.raises(dramalite.ResultFailure):
        list(pipe.get_results(block=True, timeout=DEADLINE * 1000))


# Groups as objects


def test_a_group_takes_any_iterable_and_keeps_its_children(add):
    messages = [add.message(1, 1), add.message(2, 2)]
    g = group(message for message in messages)

    assert len(g) == 2
    assert g.children == messages
    assert g.children[0] is messages[0]


def test_a_group_prints_as_its_calls(add):
    g = group([add.message(1, 2), add.message(1, 1) | add.message(2)])

    assert str(g) == "group([add(1, 2), pipeline([add(1, 1), add(2)])])"


def test_running_a_group_enqueues_all_and_returns_it(add, enqueued):
    messages = [add.message(number, 0) for number in range(3)]
    g = group(messages)

    assert g.run() is g
    assert [(message.message_id, delay) for message, delay in enqueued] == [
        (message.message_id, None) for message in messages
    ]


def test_a_group_sends_children_of_all_kinds_in_their_order(add, enqueued):
    pipe, inner = add.message(2, 0) | add.message(0), group([add.message(3, 0), add.message(4, 0)])
    delayed = add.message_with_options(args=(6, 0), delay=1000)
    first, *others = (add.message(number, 0) for number in (0, 1, 5, 7))
    group([first, others[0], pipe, inner, others[1], delayed, others[2]]).run()

    assert [message.args[0] for message, _ in enqueued] == list(range(8))


def test_a_group_delays_all_its_children(add, enqueued):
    group([add.message(1, 1), add.message(2, 2) | add.message(3)]).run(delay=500)

    assert [delay for _, delay in enqueued] == [500, 500]


def test_a_group_honours_a_messages_own_delay(add, enqueued):
    later, now = add.message_with_options(args=(1, 1), delay=300), add.message(2, 2)
    group([later, now]).run()
    delays = {message.message_id: delay for message, delay in enqueued}

    assert delays == {later.message_id: 300, now.message_id: None}


def test_a_test_that_replaces_enqueue_sees_what_compositions_send(add, broker):
    messages = [add.message(number, 0) for number in range(3)]
    with mock.patch.object(broker, "enqueue", wraps=broker.enqueue) as watched:
        group(messages[:2]).run()
        pipeline([messages[2], add.message(1)]).run()
    with mock.patch.object(broker, "enqueue") as replaced:
        group(messages[:2]).run()
        pipeline([messages[2], add.message(1)]).run()
    sent = broker.pending()

    assert [call.args[0].args for call in watched.call_args_list] == [message.args for message in messages]
    assert [call.args[0].args for call in replaced.call_args_list] == [message.args for message in messages]
    assert [message.args for message in sent] == [message.args for message in messages]


def test_a_groups_results_come_in_the_order_of_its_children(add, broker, worker):
    g = group(add.message(number, 0) for number in range(10)).run()
    worker(broker, worker_threads=2)
    results = g.get_results(block=True, timeout=DEADLINE * 1000)

    assert list(results) == list(range(10))


def test_a_group_of_groups_and_pipelines_gives_nested_results(add, broker, worker):
    g = group(
        [
            add.message(1, 0),
            add.message(1, 1) | add.message(1),
            group([add.message(2, 0), add.message(3, 0)]),
        ]
    ).run()
    worker(broker)
    results = g.get_results(block=True, timeout=DEADLINE * 1000)
    one, three, inner = results

    assert (one, three, list(inner)) == (1, 3, [2, 3])


def test_a_groups_missing_result_is_missing_or_times_out(add):
    g = group([add.message(1, 1)]).run()

    with pytest.raises(dramalite.ResultMissing):
        list(g.get_results())
    with pytest.raises(dramalite.ResultTimeout):
        list(g.get_results(block=True, timeout=20))


@pytest.mark.parametrize("kind", ["messages", "pipelines", "groups", "pipeline"])
def test_the_timeout_of_all_results_together_is_one_deadline(broker, kind):
    """The first result comes in time, the second one would only in a time of its own."""
    work = dramalite.actor(lambda: "done", actor_name="work", store_results=True, pipe_ignore=True)

    def after(ms):
        return work.message_with_options(delay=ms)

    composed = {
        "messages": group([after(900), after(1800)]),
        "pipelines": group([pipeline([after(900)]), pipeline([after(1800)])]),
        "groups": group([group([after(900)]), group([after(1800)])]),
        "pipeline": pipeline([after(900), after(900)]),
    }[kind]
    with dramalite.simulate(broker) as sim:
        start = sim.now
        composed.run()
        results = composed.get_results(block=True, timeout=1000)
        first = next(results)
        with pytest.raises(dramalite.ResultTimeout):
            next(results)
        waited = sim.now - start

    assert first == (["done"] if kind == "groups" else "done")
    assert waited == datetime.timedelta(milliseconds=1000)


def test_waiting_for_a_group_ends_when_all_have_ended(add, broker, worker):
    g = group([add.message(1, 1), add.message(2, 2)]).run()
    worker(broker)
    waited = g.wait(timeout=DEADLINE * 1000)

    assert waited is None
    assert g.completed is True


def test_waiting_for_a_group_times_out(add):
    with pytest.raises(dramalite.ResultTimeout):
        group([add.message(1, 1)]).run().wait(timeout=20)


def test_waiting_for_a_group_with_a_failed_member_raises_its_failure(add, fail, broker, worker):
    g = group([add.message(1, 1), fail.message()]).run()
    worker(broker)

    with pytest.raises(dramalite.ResultFailure):
        g.wait(timeout=DEADLINE * 1000)


def test_a_group_counts_what_is_completed_in_any_order(add, broker, worker):
    waiting = dramalite.actor(
        lambda: None, actor_name="waiting", queue_name="unserved", store_results=True
    )
    last = add.message(2, 2)
    g = group([waiting.message(), add.message(1, 1), last]).run()
    before = (g.completed_count, g.completed)
    worker(broker, queues={"default"})
    last.get_result(block=True, timeout=DEADLINE * 1000)

    assert before == (0, False)
    assert (g.completed_count, g.completed) == (2, False)


def test_a_nested_group_is_not_completed_before_its_members_are(add):
    g = group([group([add.message(1, 1)])]).run()

    assert (g.completed_count, g.completed) == (0, False)


def test_an_empty_group_is_completed(broker):
    g = group([]).run()

    assert (len(g), g.completed, g.completed_count) == (0, True, 0)
    assert list(g.get_results()) == []


def test_a_composition_uses_the_broker_it_is_given(make_stub_broker):
    mine = make_stub_broker()
    work = dramalite.actor(print, actor_name="work")
    dramalite.set_broker(make_stub_broker())
    group([work.message(1)], broker=mine).run()
    pipeline([work.message(2)], broker=mine).run()
    queue = mine.queues["default"]

    assert [Message.decode(queue.get()).args for _ in range(2)] == [(1,), (2,)]
