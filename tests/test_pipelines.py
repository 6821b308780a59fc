"""Pipelines at work: what each step receives, and when a chain goes on or ends."""

import logging

import pytest

import dramalite

from helpers import DEADLINE, wait_until

PATIENCE = DEADLINE * 1000
HOUR = 3_600_000


@pytest.fixture
def log():
    """What the steps write down."""
    return []


@pytest.fixture
def step(broker, log):
    """An actor that writes down its arguments and returns their number."""

    def step(*args):
        log.append(args)
        return len(args)

    return dramalite.actor(step)


def work_off(broker, worker, **options):
    worker(broker, **options)
    broker.join("default", timeout=PATIENCE)


def test_each_step_receives_the_result_before_it_as_its_last_argument(broker, worker, step, log):
    (step.message("a", "b", "c") | step.message("d") | step.message()).run()
    work_off(broker, worker)

    assert log == [("a", "b", "c"), ("d", 3), (2,)]


def test_a_result_of_none_is_passed_on_too(broker, worker, step, log):
    nothing = dramalite.actor(lambda: None, actor_name="nothing")
    (nothing.message() | step.message("x")).run()
    work_off(broker, worker)

    assert log == [("x", None)]


def test_a_message_can_ignore_the_result_before_it(broker, worker, step, log):
    pipe = step.message("a") | step.message_with_options(args=("b",), pipe_ignore=True)
    (pipe | step.message("c")).run()
    work_off(broker, worker)

    assert log == [("a",), ("b",), ("c", 1)]


@pytest.mark.parametrize("ignores", ["sender", "receiver"])
def test_an_actor_that_ignores_results_is_the_one_that_would_receive_them(broker, worker, log, ignores):
    options = {name: {"pipe_ignore": True} if name == ignores else {} for name in ("sender", "receiver")}
    sender = dramalite.actor(lambda: 1, actor_name="sender", **options["sender"])
    receiver = dramalite.actor(lambda *args: log.append(args), actor_name="receiver", **options["receiver"])
    (sender.message() | receiver.message("x")).run()
    work_off(broker, worker)

    assert log == [("x",) if ignores == "receiver" else ("x", 1)]


def test_a_message_may_take_the_result_that_its_actor_ignores(broker, worker, log):
    sender = dramalite.actor(lambda: 1, actor_name="sender")
    receiver = dramalite.actor(lambda *args: log.append(args), actor_name="receiver", pipe_ignore=True)
    (sender.message() | receiver.message_with_options(args=("x",), pipe_ignore=False)).run()
    work_off(broker, worker)

    assert log == [("x", 1)]


def test_three_steps_of_one_parameter_each_run_as_written(broker, worker, caplog, log):
    @dramalite.actor
    def step_one(data):
        log.append(("one", data))
        return {"result": "step_one"}

    @dramalite.actor
    def step_two(data):
        log.append(("two", data))
        return {"result": "step_two"}

    @dramalite.actor
    def final_step(data):
        log.append(("final", data))

    (
        step_one.message({"input": "data"})
        | step_two.message({"from_step_one": True})
        | final_step.message({"complete": True})
    ).run()
    work_off(broker, worker)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

    assert log == [
        ("one", {"input": "data"}),
        ("two", {"from_step_one": True}),
        ("final", {"complete": True}),
    ]
    assert len(warnings) == 2
    assert all("pipe_ignore" in text for text in warnings)
    assert "step_two" in warnings[0]
    assert "final_step" in warnings[1]


def test_a_class_based_step_whose_perform_takes_nothing_gets_nothing(broker, log):
    class Last(dramalite.GenericActor):
        def perform(self):
            log.append("last")

    first = dramalite.actor(lambda: 1, actor_name="first")
    (first.message() | Last.message()).run()
    broker.drain()

    assert log == ["last"]


def test_a_dropped_result_is_warned_about_once_for_each_actor(broker, worker, caplog, log):
    first = dramalite.actor(lambda: 1, actor_name="first")
    second = dramalite.actor(lambda: log.append("second"), actor_name="second")
    for _ in range(3):
        (first.message() | second.message()).run()
    work_off(broker, worker)
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]

    assert log == ["second"] * 3
    assert len(warnings) == 1


def test_a_result_goes_where_a_parameter_is_free_for_it(broker, worker, log):
    first = dramalite.actor(lambda: 1, actor_name="first")
    second = dramalite.actor(lambda a, b=None: log.append((a, b)), actor_name="second")
    (first.message() | second.message("a")).run()
    work_off(broker, worker)

    assert log == [("a", 1)]


def test_a_step_that_can_bind_neither_way_fails_as_usual(broker, worker):
    first = dramalite.actor(lambda: 1, actor_name="first")
    second = dramalite.actor(lambda a, b, c, d: None, actor_name="second", max_retries=0)
    (first.message() | second.message()).run()
    work_off(broker, worker)

    assert [letter.actor_name for letter in broker.dead_letters] == ["second"]


def test_a_failed_step_ends_the_chain(broker, worker, step, log):
    def fail():
        raise ValueError("no")

    failing = dramalite.actor(fail, max_retries=0)
    (step.message("a") | failing.message_with_options(pipe_ignore=True) | step.message("b")).run()
    work_off(broker, worker)

    assert log == [("a",)]


def test_a_step_that_succeeds_after_retries_continues_the_chain(broker, worker, step, log):
    attempts = []

    def flaky():
        attempts.append(1)
        if len(attempts) < 3:
            raise ValueError("again")
        return "at last"

    (dramalite.actor(flaky, min_backoff=0).message() | step.message("b")).run()
    work_off(broker, worker)

    assert log == [("b", "at last")]


def test_a_step_that_a_middleware_marked_as_failed_ends_the_chain(broker, worker, step, log):
    class Fails(dramalite.Middleware):
        def after_process_message(self, broker, message, *, result=None, exception=None):
            if message.args == ("a",):
                message.fail()

    broker.add_middleware(Fails())
    (step.message("a") | step.message("b")).run()
    work_off(broker, worker)

    assert log == [("a",)]


def test_a_skipped_step_ends_the_chain(broker, worker, step, log):
    def skip():
        raise dramalite.SkipMessage("not today")

    (dramalite.actor(skip).message() | step.message("b")).run()
    work_off(broker, worker)

    assert log == []


def test_a_delay_of_a_later_step_is_honoured_when_its_turn_comes(
    make_broker, clock, worker
):
    broker = make_broker(clock=clock)
    log = []
    first = dramalite.actor(lambda: log.append("first"), actor_name="first")
    second = dramalite.actor(lambda: log.append("second"), actor_name="second")
    (first.message() | second.message_with_options(delay=HOUR, pipe_ignore=True)).run()
    started = worker(broker)
    wait_until(lambda: log)
    with pytest.raises(dramalite.QueueJoinTimeout):
        broker.join("default", timeout=100)
    started.stop()
    before = list(log)
    clock.advance(HOUR)
    work_off(broker, worker)

    assert before == ["first"]
    assert log == ["first", "second"]


def test_steps_may_live_on_different_queues(broker, worker, log):
    first = dramalite.actor(lambda: 1, actor_name="first", queue_name="a")
    second = dramalite.actor(log.append, actor_name="second", queue_name="b")
    (first.message() | second.message()).run()
    worker(broker)
    broker.join("a", timeout=PATIENCE)
    broker.join("b", timeout=PATIENCE)

    assert log == [1]


def test_the_last_results_way_is_not_warned_about_while_piping(stub_broker, worker, caplog):
    first = dramalite.actor(lambda: 1, actor_name="first")
    last = dramalite.actor(lambda value: None, actor_name="last")
    (first.message() | last.message()).run()
    worker(stub_broker)
    stub_broker.join("default", timeout=PATIENCE)

    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_a_result_that_cannot_be_stored_ends_the_chain_visibly(broker, worker, step, log):
    strange = dramalite.actor(lambda: {1, 2}, actor_name="strange", max_retries=0)
    (strange.message() | step.message("b")).run()
    step.send("rest")
    work_off(broker, worker)

    assert log == [("rest",)]
    assert [letter.actor_name for letter in broker.dead_letters] == ["strange"]


def test_in_memory_a_step_for_a_queue_that_nobody_declared_ends_the_chain_visibly(clean_state, worker):
    broker = dramalite.MemoryBroker()
    clean_state.callback(broker.close)
    dramalite.set_broker(broker)
    first = dramalite.actor(lambda: 1, actor_name="first")
    (first.message() | dramalite.Message("nowhere", "second", (), {}, {})).run()
    work_off(broker, worker)

    assert [letter.actor_name for letter in broker.dead_letters] == ["first"]
    assert "nowhere" in broker.dead_letters[0].reason


@pytest.mark.parametrize(
    "options", [{"priority": [1]}, {"priority": 10**20}, {"max_crashes": "x"}, {"max_crashes": 10**20}], ids=str
)
def test_a_step_that_cannot_be_sent_on_ends_the_chain_visibly(broker, worker, step, log, options):
    (step.message("a") | step.message("b").copy(options=options)).run()
    step.send("rest")
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert log == [("a",), ("rest",)]
    assert [letter.args for letter in broker.dead_letters] == [("a",)]


@pytest.mark.parametrize("message_id", [[1], 10**20], ids=str)
def test_a_step_whose_id_cannot_be_stored_ends_the_chain_visibly(broker, worker, step, log, message_id):
    dramalite.pipeline([step.message("a"), step.message("b")._replace(message_id=message_id)]).run()
    step.send("rest")
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert log == [("a",), ("rest",)]
    assert [letter.args for letter in broker.dead_letters] == [("a",)]


def test_a_step_that_a_middleware_refuses_ends_the_chain_visibly(broker, worker, step, log):
    class Refuses(dramalite.Middleware):
        def before_enqueue(self, broker, message, delay):
            if message.args[:1] == ("b",):
                raise dramalite.MiddlewareError("the quota is used up")

    broker.add_middleware(Refuses())
    (step.message("a") | step.message("b")).run()
    work_off(broker, worker)

    assert [letter.args for letter in broker.dead_letters] == [("a",)]
    assert "the quota is used up" in broker.dead_letters[0].reason


def test_a_pipeline_can_be_run_again(broker, worker, step, log):
    pipe = step.message("a") | step.message("b")
    pipe.run()
    pipe.run()
    work_off(broker, worker)

    assert sorted(log) == [("a",), ("a",), ("b", 1), ("b", 1)]
