"""Callbacks of groups: when they come, how often, for which ends; groups as steps of pipelines."""

from __future__ import annotations

import contextlib
import logging
import re
import sqlite3
import threading

import pytest

import dramalite
from dramalite import GroupCallbacks, Message, group, pipeline

from helpers import DEADLINE, wait_until

PATIENCE = DEADLINE * 1000
HOUR = 3_600_000


@pytest.fixture
def broker(clean_state):
    """A broker in memory, where what this module is about is the same as in a file; the global one."""
    broker = dramalite.MemoryBroker()
    clean_state.callback(broker.close)
    dramalite.set_broker(broker)
    return broker


@pytest.fixture
def told():
    """What the callbacks told, in their order."""
    return []


@pytest.fixture
def tell(broker, told):
    """An actor that is the callback: it keeps its argument."""
    return dramalite.actor(told.append, actor_name="tell")


@pytest.fixture
def member(broker):
    """An actor that ends as it is told: it returns its argument, fails, is skipped, or fails once."""

    @dramalite.actor(max_retries=0, store_results=True)
    def member(value, *_before):
        message = dramalite.CurrentMessage.get_current_message()
        if value == "fail":
            raise ValueError("no")
        if value == "skip":
            raise dramalite.SkipMessage("not today")
        if value == "strange":
            return {1, 2}
        if value == "fail once" and "retries" not in message.options:
            raise ValueError("not yet")
        return value

    return member


def run(broker):
    """Run all there is, in virtual time; what failed does not raise."""
    with dramalite.simulate(broker) as sim:
        sim.run_until_idle()
    assert broker.pending() == []


def group_of(member, *values):
    return group([member.message(value) for value in values])


# Success


def test_the_callback_comes_once_when_all_members_have_succeeded(make_broker, worker, told):
    broker = make_broker()
    member = dramalite.actor(lambda number: number, actor_name="member", store_results=True)
    tell = dramalite.actor(told.append, actor_name="tell")
    members = group_of(member, *range(20))
    members.add_completion_callback(tell.message("done"))
    members.run()
    worker(broker, worker_threads=4)
    broker.join("default", timeout=PATIENCE)

    assert told == ["done"]
    assert members.completed


def test_the_callback_comes_after_the_last_member(broker, member, tell, told):
    seen = []
    check = dramalite.actor(lambda: seen.append(members.completed_count), actor_name="check", priority=-10)
    members = group_of(member, 1, 2, 3)
    members.add_completion_callback(check.message())
    members.run()
    run(broker)

    assert seen == [3]


def test_adding_a_callback_returns_nothing_and_sends_nothing(broker, member, tell):
    members = group_of(member, 1)

    assert members.add_completion_callback(tell.message(1)) is None
    assert broker.pending() == []


def test_each_of_several_callbacks_comes_once(broker, member, tell, told):
    members = group_of(member, 1, 2)
    for number in range(3):
        members.add_completion_callback(tell.message(number))
    members.run()
    run(broker)

    assert sorted(told) == [0, 1, 2]


def test_a_member_that_succeeds_after_a_retry_counts_once(broker, member, tell, told):
    members = group(
        [
            member.message_with_options(args=("fail once",), max_retries=1, min_backoff=0),
            member.message(1),
        ]
    )
    members.add_completion_callback(tell.message("done"))
    members.run()
    run(broker)

    assert told == ["done"]


def test_a_callback_may_live_in_another_queue(broker, member, told):
    other = dramalite.actor(told.append, actor_name="other", queue_name="other")
    members = group_of(member, 1)
    members.add_completion_callback(other.message("done"))
    members.run()
    run(broker)

    assert told == ["done"]


def test_a_delayed_group_has_its_callback_after_its_delay(broker, member, tell, told):
    members = group_of(member, 1, 2)
    members.add_completion_callback(tell.message("done"))
    with dramalite.simulate(broker) as sim:
        members.run(delay=HOUR)
        sim.advance(HOUR - 1)
        before = list(told)
        sim.advance(1)

    assert before == []
    assert told == ["done"]


def test_members_know_the_group_and_its_callbacks_as_in_dramatiq(broker, member, tell):
    members = group_of(member, 1, 2)
    callback = tell.message("done")
    members.add_completion_callback(callback)
    members.run()
    options = [message.options for message in broker.pending()]
    (data,) = options[0]["group_completion_callbacks"]

    assert options[0] == options[1]
    assert options[0].keys() == {"group_completion_uuid", "group_completion_callbacks"}
    assert isinstance(options[0]["group_completion_uuid"], str)
    assert Message(**data) == callback


def test_running_a_group_leaves_its_messages_as_they_were(broker, member, tell):
    members = group_of(member, 1, 2)
    members.add_completion_callback(tell.message("done"))
    members.run()

    assert [child.options for child in members.children] == [{}, {}]


def test_only_the_last_message_of_a_pipeline_counts(broker, member, tell, told):
    first, last = member.message(1), member.message(2)
    members = group([first | last])
    members.add_completion_callback(tell.message("done"))
    members.run()
    (sent,) = broker.pending()
    run(broker)

    assert "group_completion_uuid" not in sent.options
    assert "group_completion_uuid" in sent.options["pipe_target"]["options"]
    assert told == ["done"]


def test_the_callback_waits_for_pipelines(broker, member, tell, told):
    counts = []
    check = dramalite.actor(lambda: counts.append(members.completed_count), actor_name="check", priority=-10)
    chain = member.message("a") | member.message("b") | member.message("c")
    members = group([member.message(1), chain])
    members.add_completion_callback(check.message())
    members.run()
    run(broker)

    assert counts == [2]


def test_a_group_that_is_run_again_has_its_callback_again(broker, member, tell, told):
    members = group_of(member, 1, 2)
    members.add_completion_callback(tell.message("done"))
    members.run()
    run(broker)
    once = list(told)
    members.run()
    run(broker)

    assert once == ["done"]
    assert told == ["done"] * 2


def test_two_runs_of_a_group_at_the_same_time_are_counted_apart(broker, member, tell, told):
    members = group_of(member, 1, 2)
    members.add_completion_callback(tell.message("done"))
    members.run()
    members.run()
    uuids = {message.options["group_completion_uuid"] for message in broker.pending()}
    run(broker)

    assert len(uuids) == 2
    assert told == ["done"] * 2


def test_an_empty_group_has_succeeded_at_once(broker, tell, told):
    nothing = group([])
    nothing.add_completion_callback(tell.message("done"))
    nothing.add_completion_callback(tell.message("ended"), whatever=True)
    nothing.run()
    run(broker)

    assert sorted(told) == ["done", "ended"]


def test_a_callback_that_is_no_message_is_refused_with_what_to_do(broker, member, tell):
    members = group_of(member, 1)
    for whatever in (False, True):
        with pytest.raises(TypeError, match=r"actor\.message"):
            members.add_completion_callback(tell, whatever=whatever)
    members.run()
    run(broker)

    assert broker.dead_letters == []


# Members that do not succeed


@pytest.mark.parametrize("end", ["fail", "skip", "strange"])
def test_a_member_without_success_keeps_the_callback_from_coming(broker, member, tell, told, end):
    members = group_of(member, 1, end, 2)
    members.add_completion_callback(tell.message("done"))
    members.run()
    run(broker)

    assert told == []


@pytest.mark.parametrize("end", [1, "fail", "skip", "strange"])
def test_a_callback_for_whatever_comes_once_all_members_have_ended(broker, member, tell, told, end):
    members = group_of(member, 1, end, 2)
    members.add_completion_callback(tell.message("ended"), whatever=True)
    members.run()
    run(broker)

    assert told == ["ended"]


def test_a_callback_for_whatever_comes_though_a_hook_after_a_member_fails_badly(broker, member, tell, told):
    class Fails(dramalite.Middleware):
        def after_process_message(self, broker, message, *, result=None, exception=None):
            if result == "fail in the hook":
                raise SystemExit

    broker.add_middleware(Fails())
    members = group_of(member, 1, "fail in the hook", 2)
    members.add_completion_callback(tell.message("ended"), whatever=True)
    members.add_completion_callback(tell.message("done"))
    members.run()
    run(broker)

    assert told == ["ended"]


def test_a_callback_for_whatever_comes_though_a_member_failed_more_than_a_week_before_the_last_ended(
    make_file_broker, clock, worker, told
):
    broker = make_file_broker(clock=clock)

    @dramalite.actor(max_retries=0)
    def fail():
        raise ValueError("no")

    late = dramalite.actor(lambda: None, actor_name="late")
    tell = dramalite.actor(told.append, actor_name="tell")
    members = group([fail.message(), late.message_with_options(delay=9 * 24 * HOUR)])
    members.add_completion_callback(tell.message("over"), whatever=True)
    members.run()
    first = worker(broker)
    wait_until(lambda: broker.dead_letters)
    first.stop()
    clock.advance(8 * 24 * HOUR)
    second = worker(broker)
    wait_until(lambda: not broker.dead_letters)  # What is a week old has left the file.
    second.stop()
    clock.advance(24 * HOUR)
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert told == ["over"]


def test_both_kinds_of_callbacks_come_after_success(broker, member, tell, told):
    members = group_of(member, 1, 2)
    members.add_completion_callback(tell.message("done"))
    members.add_completion_callback(tell.message("ended"), whatever=True)
    members.run()
    run(broker)

    assert sorted(told) == ["done", "ended"]


def test_a_member_has_not_ended_while_it_is_to_be_retried(broker, member, tell, told):
    again = member.message_with_options(args=("fail once",), max_retries=1, min_backoff=HOUR, max_backoff=HOUR)
    members = group([again, member.message(1)])
    members.add_completion_callback(tell.message("ended"), whatever=True)
    with dramalite.simulate(broker) as sim:
        members.run()
        sim.advance(HOUR // 4)
        before = list(told)
        sim.run_until_idle()

    assert before == []
    assert told == ["ended"]


@pytest.mark.parametrize("end", ["fail", "skip"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_pipeline_that_stops_short_has_ended(broker, member, tell, told, place, end):
    steps = [member.message(number) for number in range(2)]
    steps[place] = member.message(end)
    members = group([pipeline(steps), member.message(1)])
    members.add_completion_callback(tell.message("done"))
    members.add_completion_callback(tell.message("ended"), whatever=True)
    members.run()
    run(broker)

    assert told == ["ended"]


def test_a_member_that_is_too_old_has_ended(broker, member, tell, told):
    with dramalite.simulate(broker) as sim:
        members = group([member.message_with_options(args=(1,), max_age=1000), member.message(2)])
        members.add_completion_callback(tell.message("ended"), whatever=True)
        members.add_completion_callback(tell.message("done"))
        members.run(delay=5000)
        sim.run_until_idle()

    assert told == ["ended"]


def test_a_member_whose_worker_dies_each_time_has_ended(broker, tell, told):
    @dramalite.actor(max_crashes=1)
    def deadly():
        dramalite.simulated_work(1000)

    members = group([deadly.message()])
    members.add_completion_callback(tell.message("ended"), whatever=True)
    members.add_completion_callback(tell.message("done"))
    with dramalite.simulate(broker) as sim:
        members.run()
        while broker.queues["default"].qsize():
            sim.step()
        sim.crash(0)
        sim.run_until_idle()

    assert told == ["ended"]


def test_a_member_for_an_actor_that_nobody_knows_has_ended_in_memory(stub_broker, worker):
    told = []
    stub_broker.add_middleware(GroupCallbacks())
    tell = dramalite.actor(told.append, actor_name="tell")
    stranger = Message("default", "stranger", (), {}, {})
    members = group([stranger])
    members.add_completion_callback(tell.message("ended"), whatever=True)
    members.run()
    worker(stub_broker)
    stub_broker.join("default", timeout=PATIENCE, fail_fast=False)

    assert told == ["ended"]


# Groups in groups


def test_the_callback_waits_for_groups_inside(broker, member, tell, told):
    counts = []
    check = dramalite.actor(lambda: counts.append(outer.completed_count), actor_name="check", priority=-10)
    outer = group([member.message(1), group_of(member, 2, 3), member.message(4) | member.message(5)])
    outer.add_completion_callback(check.message())
    outer.run()
    run(broker)

    assert counts == [3]


def test_a_group_inside_keeps_its_own_callback(broker, member, tell, told):
    inner, outer_member = group_of(member, 1, 2), member.message(3)
    inner.add_completion_callback(tell.message("inner"))
    outer = group([inner, outer_member])
    outer.add_completion_callback(tell.message("outer"))
    outer.run()
    run(broker)

    assert sorted(told) == ["inner", "outer"]


def test_a_failure_in_a_group_inside_is_a_failure_of_the_outer_one_too(broker, member, tell, told):
    inner = group_of(member, 1, "fail")
    inner.add_completion_callback(tell.message("inner done"))
    outer = group([inner, member.message(3)])
    outer.add_completion_callback(tell.message("outer done"))
    outer.add_completion_callback(tell.message("outer ended"), whatever=True)
    outer.run()
    run(broker)

    assert told == ["outer ended"]


def test_groups_may_be_nested_deeply(broker, member, tell, told):
    nested = group_of(member, 1, 2)
    for _ in range(5):
        nested = group([nested, member.message(3)])
    nested.add_completion_callback(tell.message("done"))
    nested.run()
    run(broker)

    assert told == ["done"]


# Counts and commits


def test_a_member_that_was_handed_back_counts_when_it_has_run_again(make_broker, worker, told):
    broker = make_broker()
    tell = dramalite.actor(told.append, actor_name="tell")
    started, go_on, runs = threading.Event(), threading.Event(), []

    @dramalite.actor(max_retries=0)
    def slow():
        runs.append(1)
        started.set()
        go_on.wait(DEADLINE)

    members = group([slow.message()])
    members.add_completion_callback(tell.message("done"))
    members.run()
    first = worker(broker)
    started.wait(DEADLINE)
    first.stop(timeout=20)
    go_on.set()  # What it returns now no longer counts.
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert len(runs) == 2
    assert told == ["done"]


def test_a_group_is_counted_by_all_brokers_on_the_file(make_file_broker, worker):
    told = []
    brokers = [make_file_broker() for _ in range(2)]
    for broker in brokers:
        member = dramalite.actor(lambda number: number, actor_name="member", broker=broker)
        tell = dramalite.actor(told.append, actor_name="tell", broker=broker)
    members = group([member.message(number) for number in range(30)], broker=brokers[1])
    members.add_completion_callback(tell.message("done"))
    members.run()
    for broker in brokers:
        worker(broker, worker_threads=2)
    brokers[0].join("default", timeout=PATIENCE)

    assert told == ["done"]


def test_a_count_does_not_expire(broker, member, tell, told):
    members = group([member.message(1), member.message_with_options(args=(2,), delay=30 * 24 * HOUR)])
    members.add_completion_callback(tell.message("done"))
    members.run()
    run(broker)

    assert told == ["done"]


@pytest.mark.parametrize("end", ["fail", "flush"])
def test_a_count_that_nothing_is_left_for_leaves_the_file_after_a_week(
    make_file_broker, clock, worker, tmp_path, end
):
    def counts():
        with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as connection:
            return connection.execute("SELECT count(*) FROM dramalite_groups").fetchone()[0]

    broker = make_file_broker(clock=clock)

    @dramalite.actor(max_retries=0)
    def fail():
        raise ValueError("no")

    members = group([fail.message(), fail.message()])
    members.add_completion_callback(dramalite.actor(print, actor_name="tell").message("done"))
    members.run()
    if end == "flush":
        broker.flush("default")
    worker(broker)
    broker.join("default", timeout=PATIENCE)
    clock.advance(6 * 24 * HOUR)
    broker.get_actor("fail").send()
    broker.join("default", timeout=PATIENCE)
    after_six_days = counts()
    clock.advance(25 * HOUR)

    assert after_six_days == 1
    wait_until(lambda: counts() == 0)


@pytest.mark.parametrize("uuid", [[1], {}, 10**20], ids=str)
def test_a_member_whose_group_cannot_be_counted_keeps_no_other_message_from_being_done(make_broker, worker, told, uuid):
    broker = make_broker()
    member = dramalite.actor(lambda: 1, actor_name="member", store_results=True)
    tell = dramalite.actor(told.append, actor_name="tell")
    tell.send("before")
    broker.enqueue(member.message().copy(options={"group_completion_uuid": uuid, "group_completion_callbacks": []}))
    tell.send("after")
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert told == ["before", "after"]


# The middleware


def test_without_the_middleware_a_group_with_callbacks_is_refused_and_nothing_is_sent(stub_broker):
    work = dramalite.actor(print, actor_name="work")
    members = group_of(work, 1, 2)
    members.add_completion_callback(work.message(3))
    with pytest.raises(RuntimeError, match="GroupCallbacks"):
        members.run()

    assert stub_broker.pending() == []


def test_without_the_middleware_a_group_without_callbacks_runs(stub_broker):
    members = group_of(dramalite.actor(print, actor_name="work"), 1, 2)
    members.run()

    assert len(stub_broker.pending()) == 2


@pytest.mark.parametrize("missing", [GroupCallbacks, dramalite.Results])
def test_a_pipeline_with_a_group_is_refused_before_its_first_step_where_middleware_is_missing(
    make_stub_broker, missing
):
    broker = make_stub_broker()
    for kind in {GroupCallbacks, dramalite.Results} - {missing}:
        broker.add_middleware(kind())
    step = dramalite.actor(lambda *args: 1, actor_name="step")
    pipe = step.message(1) | step.message(2) | group([step.message(3)]) | step.message(4)
    with pytest.raises(RuntimeError, match=missing.__name__):
        pipe.run()

    assert broker.pending() == []


def test_without_results_a_group_may_be_followed_by_a_step_that_ignores_them(make_stub_broker, worker):
    ran = []
    broker = make_stub_broker()
    broker.add_middleware(GroupCallbacks())
    step = dramalite.actor(lambda *args: ran.append(args), actor_name="step")
    last = step.message_with_options(args=("last",), pipe_ignore=True)
    (group([step.message("member")]) | last).run()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert ran == [("member",), ("last",)]


def test_without_the_middleware_a_step_that_is_a_group_ends_the_chain_visibly(stub_broker, worker):
    step = dramalite.actor(lambda *args: 1, actor_name="step")
    pipe = step.message("first") | group([step.message("member")]) | step.message("last")
    stub_broker.enqueue(pipe.messages[0])  # As one would arrive from a program that has it.
    worker(stub_broker)
    stub_broker.join("default", timeout=PATIENCE, fail_fast=False)

    assert [letter.args for letter in stub_broker.dead_letters] == [("first",)]
    assert "GroupCallbacks" in stub_broker.dead_letters[0].reason


@pytest.mark.parametrize("options", [{}, {"barrier_ttl": 1000}])
def test_the_middleware_can_be_added_as_in_dramatiq(make_stub_broker, worker, caplog, options):
    broker = make_stub_broker()
    broker.add_middleware(GroupCallbacks(dramalite.SQLiteRateLimiterBackend(broker), **options))
    told = []
    work = dramalite.actor(lambda number: None, actor_name="work")
    tell = dramalite.actor(told.append, actor_name="tell")
    members = group_of(work, *range(5))
    members.add_completion_callback(tell.message("done"))
    members.run()
    worker(broker, worker_threads=2)
    broker.join("default", timeout=PATIENCE)

    assert told == ["done"]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_an_added_middleware_takes_the_place_of_the_built_in_one(broker, member, tell, told, caplog):
    mine = GroupCallbacks(dramalite.SQLiteRateLimiterBackend(broker))
    broker.add_middleware(mine)
    members = group_of(member, 1, 2)
    members.add_completion_callback(tell.message("done"))
    members.run()
    run(broker)

    assert [item for item in broker.middleware if isinstance(item, GroupCallbacks)] == [mine]
    assert told == ["done"]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    "end",
    [
        "fail",
        "skip",
        "strange",
    ],
)
def test_with_an_added_middleware_a_member_without_success_ends_once(broker, member, tell, told, end):
    broker.add_middleware(GroupCallbacks(dramalite.SQLiteRateLimiterBackend(broker)))
    later = member.message_with_options(args=(1,), delay=HOUR)
    members = group([member.message(end), later])
    members.add_completion_callback(tell.message("done"))
    members.add_completion_callback(tell.message("ended"), whatever=True)
    with dramalite.simulate(broker) as sim:
        members.run()
        sim.advance(HOUR // 2)
        before = list(told)
        sim.run_until_idle()

    assert before == []
    assert told == ["ended"]


# Members that are sent once more


def send_dead_letters_again(broker, letters):
    for letter in letters:
        broker.enqueue(letter.copy(options={"retries": 0}))


def test_a_dead_member_that_is_sent_again_counts_once_whenever_it_succeeds(broker, member, tell, told):
    fate = ["fail"]
    fragile = dramalite.actor(lambda: member.fn(fate[0]), actor_name="fragile", max_retries=0)
    members = group([fragile.message(), member.message_with_options(args=(1,), delay=HOUR)])
    members.add_completion_callback(tell.message("done"))
    members.add_completion_callback(tell.message("ended"), whatever=True)
    with dramalite.simulate(broker) as sim:
        members.run()
        sim.advance(1000)
        letters = list(broker.dead_letters)
        fate[0] = 1
        for _ in range(3):
            send_dead_letters_again(broker, letters)
            sim.advance(1000)
        before = list(told)
        sim.run_until_idle()

    assert len(letters) == 1
    assert before == []
    assert sorted(told) == ["done", "ended"]


def test_a_dead_member_that_fails_again_counts_no_second_time(broker, member, tell, told):
    members = group([member.message("fail"), member.message_with_options(args=(1,), delay=HOUR)])
    members.add_completion_callback(tell.message("ended"), whatever=True)
    with dramalite.simulate(broker) as sim:
        members.run()
        sim.advance(1000)
        send_dead_letters_again(broker, list(broker.dead_letters))
        sim.advance(1000)
        before = list(told)
        sim.run_until_idle()

    assert before == []
    assert told == ["ended"]


def test_a_dead_member_of_a_group_inside_completes_both_groups_once_it_succeeds(broker, member, tell, told):
    fate = ["fail"]
    fragile = dramalite.actor(lambda: member.fn(fate[0]), actor_name="fragile", max_retries=0)
    inside = group([fragile.message(), member.message(2)]) | member.message("step")
    members = group([member.message(1), inside])
    members.add_completion_callback(tell.message("done"))
    members.add_completion_callback(tell.message("ended"), whatever=True)
    members.run()
    run(broker)
    before = list(told)
    letters = list(broker.dead_letters)
    fate[0] = 1
    for _ in range(2):
        send_dead_letters_again(broker, letters)
        run(broker)

    assert before == ["ended"]
    assert told == ["ended", "done"]


@pytest.mark.parametrize("end", [1, "fail"])
def test_members_of_one_id_count_each(broker, member, tell, told, end):
    base = member.message(1)
    inside = group([base, base])
    members = group([base, base.copy(args=(2,)), base.copy(args=(end,)), pipeline([member.message(3), base]), inside])
    members.add_completion_callback(tell.message("done"))
    members.add_completion_callback(tell.message("ended"), whatever=True)
    inside.add_completion_callback(tell.message("inside done"))
    members.run()
    run(broker)

    assert sorted(told) == (["ended", "inside done"] if end == "fail" else ["done", "ended", "inside done"])


@pytest.mark.parametrize("end", [1, "fail"])
def test_an_empty_group_at_the_end_of_a_pipeline_leaves_the_end_to_the_step_before(
    broker, member, tell, told, end
):
    chain = pipeline([member.message("first"), member.message(end), group([], broker=broker)])
    members = group([chain, member.message(2)])
    members.add_completion_callback(tell.message("done"))
    members.add_completion_callback(tell.message("ended"), whatever=True)
    with dramalite.simulate(broker) as sim:
        members.run()
        sim.run_until_idle()
        order = [event.actor for event in sim.events]

    assert sorted(told) == (["ended"] if end == "fail" else ["done", "ended"])
    assert order.index("tell") == 3


# Groups as steps of pipelines


@pytest.fixture
def step(broker):
    """An actor that returns its arguments as a list."""
    return dramalite.actor(lambda *args: list(args), actor_name="step", store_results=True, max_retries=0)


def result_after_running(broker, pipe):
    """The result of a pipeline that is run in virtual time, where it would soon expire."""
    with dramalite.simulate(broker) as sim:
        pipe.run()
        sim.run_until_idle()
        return pipe.get_result()


def test_members_of_a_step_get_the_result_before_and_the_next_step_gets_all_of_theirs(broker, step):
    pipe = step.message(0) | group([step.message("a"), step.message("b")]) | step.message("end")

    assert result_after_running(broker, pipe) == ["end", [["a", [0]], ["b", [0]]]]


def test_the_results_of_a_step_come_in_the_order_of_its_members(broker, worker, step):
    members = group([step.message_with_options(args=(number,), priority=-number) for number in range(10)])
    pipe = (members | step.message()).run()
    worker(broker, worker_threads=2)

    assert pipe.get_result(block=True, timeout=PATIENCE) == [[[number] for number in range(10)]]


def test_a_pipeline_may_begin_or_end_with_a_group(broker, step):
    first = group([step.message(1)]) | step.message("end")
    last = step.message("start") | group([step.message(1), step.message(2)])

    assert result_after_running(broker, first) == ["end", [[1]]]
    assert result_after_running(broker, last) == [[1, ["start"]], [2, ["start"]]]


def test_pipelines_may_be_members_of_a_step(broker, step):
    pipe = step.message(0) | group([step.message("a") | step.message("b"), step.message("c")]) | step.message()

    assert result_after_running(broker, pipe) == [[["b", ["a", [0]]], ["c", [0]]]]


def test_a_step_after_a_group_may_ignore_its_results(broker, step):
    pipe = group([step.message(1)]) | step.message_with_options(args=("end",), pipe_ignore=True)

    assert result_after_running(broker, pipe) == ["end"]


def test_members_may_ignore_the_result_before(broker, step):
    members = group([step.message_with_options(args=("a",), pipe_ignore=True), step.message("b")])
    pipe = step.message(0) | members | step.message()

    assert result_after_running(broker, pipe) == [[["a"], ["b", [0]]]]


def test_an_empty_group_passes_an_empty_list_on(broker, step):
    pipe = step.message(0) | group([]) | step.message("end")

    assert result_after_running(broker, pipe) == ["end", []]


def test_members_need_not_store_their_results_for_the_next_step(broker, step):
    plain = dramalite.actor(lambda number: number * 2, actor_name="plain", max_retries=0)
    pipe = group([plain.message(1), plain.message(2)]) | step.message("end")

    assert result_after_running(broker, pipe) == ["end", [2, 4]]


def test_a_member_is_not_told_of_all_the_others(make_file_broker, tmp_path):
    broker = make_file_broker()
    step = dramalite.actor(lambda *args: None, actor_name="step")

    def size_of_a_member(count):
        broker.flush("default")
        (group([step.message(1) for _ in range(count)]) | step.message("end")).run()
        with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as connection:
            return connection.execute("SELECT max(length(body)) FROM dramalite_messages").fetchone()[0]

    assert size_of_a_member(200) <= size_of_a_member(2) + 10


def test_a_step_after_a_group_has_its_input_in_every_retry_and_as_a_dead_letter(broker, step):
    seen = []

    @dramalite.actor(max_retries=3)
    def last(*args):
        seen.append(args)
        raise dramalite.Retry(delay=5 * 24 * HOUR)

    with dramalite.simulate(broker) as sim:
        (group([step.message(1), step.message(2)]) | last.message("end")).run()
        sim.run_until_idle()
        (letter,) = broker.dead_letters

    assert seen == [("end", [[1], [2]])] * 4
    assert letter.args == ("end", [[1], [2]])


def test_a_step_after_a_group_is_retried_though_its_input_is_too_large_for_a_message(broker):
    big = dramalite.actor(lambda: "x" * 300_000, actor_name="big")
    seen = []

    @dramalite.actor(max_retries=3)
    def last(results):
        seen.append(len(results))
        if len(seen) < 3:
            raise ValueError("not yet")

    with dramalite.simulate(broker) as sim:
        (group([big.message() for _ in range(5)]) | last.message()).run()
        sim.run_until_idle()
        outcomes = [event.outcome for event in sim.events if event.actor == "last"]

    assert outcomes == ["retry", "retry", "done"]
    assert seen == [5, 5, 5]


def test_counts_of_groups_whose_step_never_took_its_input_are_not_kept_for_ever(
    make_file_broker, worker, clock, tmp_path
):
    broker = make_file_broker(clock=clock)
    step = dramalite.actor(lambda *args: None, actor_name="step")
    old = dramalite.actor(lambda *args: None, actor_name="old", max_age=1)
    step.send_with_options(delay=60 * 24 * HOUR)  # The database is never empty.
    (group([step.message(1)]) | old.message_with_options(delay=5000)).run()

    def groups():
        with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as connection:
            return connection.execute("SELECT unsuccessful FROM dramalite_groups").fetchall()

    worker(broker)
    wait_until(lambda: groups() == [(0,)])
    clock.advance(6000)
    wait_until(lambda: len(broker.dead_letters) == 1)
    before = groups()
    clock.advance(8 * 24 * HOUR)
    wait_until(lambda: groups() == [])

    assert before == [(0,)]


def test_a_group_is_not_forgotten_while_its_step_waits_however_old_it_is(make_file_broker, worker, clock, tmp_path):
    broker = make_file_broker(clock=clock)
    got = []
    step = dramalite.actor(lambda *args: 1, actor_name="step")
    end = dramalite.actor(got.append, actor_name="end")
    kept = dramalite.actor(lambda: 1, actor_name="kept", store_results=True, result_ttl=8 * 24 * HOUR + HOUR // 2)
    kept.send()

    def rows(query):
        with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as connection:
            return connection.execute(query).fetchall()

    groups, results = "SELECT unsuccessful FROM dramalite_groups", "SELECT 1 FROM dramalite_results"
    worker(broker)
    wait_until(lambda: rows(results))
    pipeline([group([step.message()]), end.message_with_options(delay=HOUR)]).run(delay=8 * 24 * HOUR)
    clock.advance(8 * 24 * HOUR + 1000)
    wait_until(lambda: rows(groups) == [(0,)])
    clock.advance(3 * HOUR // 4)
    wait_until(lambda: len(rows(results)) == 1)  # What is too old was deleted.
    before = rows(groups)
    clock.advance(HOUR)
    broker.join("default", timeout=PATIENCE)

    assert before == [(0,)]
    assert got == [[1]]


def test_what_a_step_after_a_group_was_told_of_its_members_goes_with_it(make_file_broker, worker, tmp_path):
    broker = make_file_broker()
    step = dramalite.actor(lambda *args: None, actor_name="step")
    ignores = dramalite.actor(lambda *args: None, actor_name="ignores", pipe_ignore=True)
    (group([step.message(1), step.message(2)]) | step.message()).run()
    (group([step.message(1), step.message(2)]) | ignores.message()).run()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as connection:
        assert connection.execute("SELECT * FROM dramalite_groups").fetchall() == []
        assert connection.execute("SELECT * FROM dramalite_members").fetchall() == []


@pytest.mark.parametrize(("end", "kind"), [("fail", "ValueError"), ("strange", "TypeError")])
def test_after_a_failed_member_the_next_step_does_not_run_and_the_failure_is_its_result(
    broker, worker, member, end, kind
):
    ran = []
    last = dramalite.actor(ran.append, actor_name="last", store_results=True)
    pipe = (group_of(member, 1, end) | last.message()).run()
    worker(broker)
    with pytest.raises(dramalite.ResultFailure) as raised:
        pipe.get_result(block=True, timeout=PATIENCE)
    broker.join("default", timeout=PATIENCE)

    assert raised.value.orig_exc_type == kind
    assert ran == []


def test_a_step_may_have_callbacks_of_its_own(broker, step, tell, told):
    members = group([step.message(1), step.message(2)])
    members.add_completion_callback(tell.message("done"))
    pipe = step.message(0) | members | step.message("end")

    assert result_after_running(broker, pipe)[0] == "end"
    assert told == ["done"]


def test_a_pipeline_counts_a_group_as_one_step(broker, step):
    pipe = step.message(0) | group([step.message(1), step.message(2)]) | step.message("end")
    before = (len(pipe), pipe.completed_count, pipe.completed)
    with dramalite.simulate(broker) as sim:
        pipe.run()
        sim.run_until_idle()
        after = (len(pipe), pipe.completed_count, pipe.completed)
        results = list(pipe.get_results())

    assert (before, after) == ((3, 0, False), (3, 3, True))
    assert results == [[0], [[1, [0]], [2, [0]]], ["end", [[1, [0]], [2, [0]]]]]


def test_a_pipeline_with_a_group_prints_as_its_calls(broker, step):
    pipe = step.message(0) | group([step.message(1)]) | step.message(2)

    assert str(pipe) == "pipeline([step(0), group([step(1)]), step(2)])"


def test_a_pipeline_with_a_group_may_be_delayed(broker, step):
    pipe = group([step.message(1)]) | step.message("end")
    with dramalite.simulate(broker) as sim:
        pipe.run(delay=HOUR)
        sim.advance(HOUR - 1)
        before = len(sim.events)
        sim.run_until_idle()
        result = pipe.get_result()

    assert before == 0
    assert result == ["end", [[1]]]


@pytest.mark.parametrize("values", [[1, 2], []], ids=["group", "empty group"])
def test_a_step_after_a_group_keeps_its_delay(broker, step, values):
    last = step.message_with_options(args=("end",), delay=5000)
    with dramalite.simulate(broker) as sim:
        (step.message(0) | group_of(step, *values) | last).run()
        sim.run_until_idle()

    *_others, before, end = sim.events
    assert end.message.args[0] == "end"
    assert end.started_ms - before.ended_ms == 5000


def test_several_groups_may_be_steps_of_a_pipeline(broker, step):
    pipe = group([step.message(1)]) | step.message(2) | group([step.message(3)]) | step.message(4)

    assert result_after_running(broker, pipe) == [4, [[3, [2, [[1]]]]]]


def test_a_group_right_after_a_group_is_refused(broker, step):
    with pytest.raises(TypeError, match="step between"):
        group([step.message(1)]) | group([step.message(2)])


def test_a_group_in_a_group_that_is_a_step_is_refused(broker, step):
    with pytest.raises(TypeError, match="group"):
        step.message(0) | group([group([step.message(1)])])


@pytest.mark.parametrize("child", ["group", "empty pipeline", "pipeline that ends in a group"])
def test_a_first_step_that_cannot_be_waited_for_is_refused_by_name_and_nothing_is_sent(broker, step, child):
    inner = {
        "group": group([step.message(1)]),
        "empty pipeline": pipeline([]),
        "pipeline that ends in a group": step.message(0) | group([step.message(1)]),
    }[child]
    pipe = group([step.message(2), inner]) | step.message("end")
    with pytest.raises(TypeError, match=re.escape(str(inner))):
        pipe.run()

    assert broker.pending() == []


def test_other_things_are_no_steps(broker, step):
    with pytest.raises(TypeError, match="pipeline"):
        step.message(0) | "nothing"
