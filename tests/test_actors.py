"""Actors: the decorator in all its forms, Actor, GenericActor, and arguments that are refused."""

import asyncio
import datetime
import enum
import functools
import inspect
import re
import sys

import pytest

import dramalite
from dramalite import Actor, GenericActor, Message

from helpers import DEADLINE

MINUTE = datetime.timedelta(minutes=1)


# The decorator


def test_the_decorator_works_bare(stub_broker):
    @dramalite.actor
    def add(x, y):
        return x + y

    assert isinstance(add, Actor)
    assert add.actor_name == "add"


def test_the_decorator_works_with_empty_parentheses(stub_broker):
    @dramalite.actor()
    def add(x, y):
        return x + y

    assert isinstance(add, Actor)
    assert add.actor_name == "add"


def test_the_decorator_works_with_options(stub_broker):
    @dramalite.actor(max_retries=3)
    def add(x, y):
        return x + y

    assert add.options == {"max_retries": 3}


@pytest.mark.parametrize("style", ["positional", "keyword"])
def test_the_decorator_works_as_a_function(stub_broker, style):
    def add(x, y):
        return x + y

    made = dramalite.actor(add) if style == "positional" else dramalite.actor(fn=add)

    assert made.fn is add


def test_an_actor_has_dramatiqs_defaults(stub_broker):
    @dramalite.actor
    def add(x, y):
        return x + y

    assert (add.queue_name, add.priority, add.options) == ("default", 0, {})
    assert add.broker is stub_broker
    assert stub_broker.get_actor("add") is add


def test_an_actor_can_be_told_its_broker(stub_broker, make_stub_broker):
    other = make_stub_broker()
    add = dramalite.actor(lambda: None, actor_name="add", broker=stub_broker)

    assert add.broker is stub_broker
    assert other.get_declared_actors() == set()


def test_an_empty_actor_name_means_the_functions_name(stub_broker):
    @dramalite.actor(actor_name="")
    def add():
        pass

    assert add.actor_name == "add"


def test_a_lambda_has_a_name_too(stub_broker):
    assert dramalite.actor(lambda: None).actor_name == "<lambda>"


def test_a_partial_needs_a_name(stub_broker):
    with pytest.raises(AttributeError):
        dramalite.actor(functools.partial(print, 1))

    assert dramalite.actor(functools.partial(max, 1), actor_name="named")(2) == 2


@pytest.mark.parametrize("thing", [3, "name", [print]])
def test_what_cannot_be_called_is_no_actor(stub_broker, thing):
    with pytest.raises(TypeError) as raised:
        dramalite.actor(thing, actor_name="named")

    assert repr(thing) in str(raised.value)
    assert "give a function" in str(raised.value)


def plain_generator():
    yield 1


async def async_generator():
    yield 1


@pytest.mark.parametrize("generator", [plain_generator, async_generator, functools.partial(plain_generator)])
def test_a_generator_function_is_refused_since_its_body_would_never_run(stub_broker, generator):
    with pytest.raises(TypeError, match="'named' is a generator function"):
        dramalite.actor(generator, actor_name="named")

    assert stub_broker.actors == {}


@pytest.mark.parametrize("arguments", [{"args": "ab"}, {"args": b"ab"}, {"args": 5}, {"kwargs": [1]}])
def test_arguments_that_are_no_tuple_or_dict_are_refused_and_nothing_is_sent(stub_broker, arguments):
    work = dramalite.actor(print, actor_name="work")
    [name] = arguments
    with pytest.raises(TypeError, match=f"'work': {name} is"):
        work.send_with_options(**arguments)

    assert stub_broker.pending() == []


def test_another_class_can_be_made_of_the_function(stub_broker):
    class MyActor(Actor):
        pass

    @dramalite.actor(actor_class=MyActor)
    def add():
        pass

    assert type(add) is MyActor


def test_send_goes_through_the_send_with_options_of_another_class(stub_broker):
    class Traced(Actor):
        def send_with_options(self, **options):
            return super().send_with_options(**options, trace="7")

    sent = dramalite.actor(print, actor_name="work", actor_class=Traced).send(1, end="")

    assert (sent.args, sent.kwargs, sent.options) == ((1,), {"end": ""}, {"trace": "7"})
    assert stub_broker.pending() == [sent]


def test_the_actor_class_may_be_any_callable(stub_broker):
    def work():
        pass

    made = dramalite.actor(
        work,
        actor_class=lambda fn, **keywords: (fn, keywords),
        queue_name="q",
        priority=2,
        max_retries=1,
    )

    assert made == (
        work,
        {
            "actor_name": "work",
            "queue_name": "q",
            "priority": 2,
            "broker": stub_broker,
            "options": {"max_retries": 1},
        },
    )


def test_one_decorator_serves_several_functions(stub_broker):
    decorate = dramalite.actor(max_retries=1)

    @decorate
    def one():
        pass

    @decorate
    def two():
        pass

    assert (one.actor_name, two.actor_name) == ("one", "two")
    assert (one.options, two.options) == ({"max_retries": 1}, {"max_retries": 1})
    assert one.options is not two.options


def test_one_decorator_asks_for_the_broker_anew_for_each_function(make_stub_broker):
    decorate = dramalite.actor(max_retries=1)
    first = make_stub_broker()
    one = decorate(lambda: None)
    second = make_stub_broker()
    two = decorate(lambda: None)

    assert (one.broker is first, two.broker is second) == (True, True)


def test_a_factory_declares_actors_around_an_inner_function(broker, worker):
    done = []

    def create_actor(name, queue, priority):
        @dramalite.actor(actor_name=name, queue_name=queue, priority=priority)
        def dynamic(value):
            done.append((name, value))

        return dynamic

    actors = [create_actor(f"actor_{i}", f"queue_{i}", i) for i in range(5)]
    for actor in reversed(actors):
        actor.send(actor.priority)
    worker(broker)
    for actor in actors:
        broker.join(actor.queue_name, timeout=DEADLINE * 1000)

    assert done == [(f"actor_{i}", i) for i in range(5)]


def test_an_actor_can_be_a_static_method(stub_broker):
    class Maths:
        @staticmethod
        @dramalite.actor
        def add(x, y):
            return x + y

    assert Maths.add(1, 2) == 3
    assert Maths.add.send(1, 2).args == (1, 2)


# Queue names


@pytest.mark.parametrize(
    "name", ["default", "high_priority", "user.emails", "queue-1", "_internal", "Q", "a" * 200]
)
def test_a_good_queue_name_is_accepted(stub_broker, name):
    assert dramalite.actor(lambda: None, queue_name=name).queue_name == name


@pytest.mark.parametrize(
    "name",
    ["123-queue", "my queue", "queue@domain", "", "1q", "é", "a\n", "$2@!@#", "-a", ".a", "aé"],
)
def test_a_bad_queue_name_is_refused_with_the_name_and_the_rule(stub_broker, name):
    with pytest.raises(ValueError) as raised:
        dramalite.actor(lambda: None, queue_name=name)

    assert repr(name) in str(raised.value)
    assert "letter" in str(raised.value)
    assert stub_broker.get_declared_actors() == set()


@pytest.mark.parametrize("name", ["abc.DQ", "abc.XQ"])
def test_the_endings_for_delayed_and_dead_messages_are_reserved(stub_broker, name):
    with pytest.raises(ValueError) as raised:
        dramalite.actor(lambda: None, queue_name=name)

    assert repr(name) in str(raised.value)


def test_the_rule_for_queue_names_is_public():
    assert dramalite.QUEUE_NAME_PATTERN == r"[a-zA-Z_][a-zA-Z0-9._-]*"


def test_a_bad_queue_name_is_reported_before_bad_options(stub_broker):
    with pytest.raises(ValueError) as raised:
        dramalite.actor(lambda: None, queue_name="1q", no_such_option=1)

    assert "'1q'" in str(raised.value)
    assert "no_such_option" not in str(raised.value)


# Options


def test_unknown_options_are_refused_by_name_in_order(stub_broker):
    with pytest.raises(ValueError) as raised:
        dramalite.actor(lambda: None, actor_name="work", zebra=1, apple=2)

    assert re.search("apple.*zebra", str(raised.value))
    assert "middleware" in str(raised.value)
    assert stub_broker.get_declared_actors() == set()


def test_store_results_is_unknown_to_a_broker_without_results(stub_broker):
    with pytest.raises(ValueError) as raised:
        dramalite.actor(lambda: None, store_results=True)

    assert "store_results" in str(raised.value)


def test_a_long_list_of_options_is_kept_as_given(broker):
    def should_retry(retries_so_far, exception):
        return retries_so_far < 5

    @dramalite.actor(
        queue_name="critical",
        priority=1,
        max_retries=3,
        time_limit=60000,
        retry_when=should_retry,
        store_results=True,
        on_success="log_success",
        on_failure="handle_failure",
    )
    def work():
        pass

    assert (work.queue_name, work.priority) == ("critical", 1)
    assert work.options == {
        "max_retries": 3,
        "time_limit": 60000,
        "retry_when": should_retry,
        "store_results": True,
        "on_success": "log_success",
        "on_failure": "handle_failure",
    }


@pytest.mark.parametrize("option", ["on_success", "on_failure", "on_retry_exhausted"])
def test_a_callback_may_be_an_actor_and_is_kept_by_name(stub_broker, option):
    @dramalite.actor
    def callback(*args):
        pass

    work = dramalite.actor(lambda: None, actor_name="work", **{option: callback})
    message = work.message_with_options(**{option: callback})

    assert work.options == {option: "callback"}
    assert message.options == {option: "callback"}


@pytest.mark.parametrize("option", ["on_success", "on_failure", "on_retry_exhausted"])
def test_a_callback_may_be_a_generic_actor_and_is_kept_by_name(stub_broker, option):
    class Callback(GenericActor):
        def perform(self, *args):
            pass

    work = dramalite.actor(lambda: None, actor_name="work", **{option: Callback})
    message = work.message_with_options(**{option: Callback})

    assert work.options == {option: "Callback"}
    assert message.options == {option: "Callback"}


@pytest.mark.parametrize("option", ["on_success", "on_failure"])
@pytest.mark.parametrize("value", ["by_name", None])
def test_a_callback_may_be_a_name_or_none_in_a_message(stub_broker, option, value):
    work = dramalite.actor(lambda: None, actor_name="work")

    assert work.message_with_options(**{option: value}).options == {option: value}


@pytest.mark.parametrize("option", ["on_success", "on_failure"])
@pytest.mark.parametrize("value", [1, print, object()])
def test_a_callback_that_is_no_actor_is_refused_in_a_message(stub_broker, option, value):
    work = dramalite.actor(lambda: None, actor_name="work")
    with pytest.raises(TypeError) as raised:
        work.message_with_options(**{option: value})

    assert option in str(raised.value)


@pytest.mark.parametrize(
    "option, value, error",
    [
        ("max_retries", "3", TypeError),
        ("max_retries", -1, ValueError),
        ("max_retries", float("inf"), ValueError),
        ("max_retries", 1.5, TypeError),
        ("min_backoff", "15s", TypeError),
        ("min_backoff", -1, ValueError),
        ("max_backoff", [], TypeError),
        ("max_backoff", -1, ValueError),
        ("max_age", "1 day", TypeError),
        ("max_age", -1, ValueError),
        ("time_limit", "1 day", TypeError),
        ("time_limit", -1, ValueError),
        ("retry_when", 5, TypeError),
        ("throws", "ValueError", TypeError),
        ("throws", 5, TypeError),
        ("on_success", 5, TypeError),
        ("on_failure", print, TypeError),
        ("on_retry_exhausted", 5, TypeError),
        ("result_ttl", "long", TypeError),
    ],
)
def test_a_bad_option_value_is_refused_at_decoration(broker, option, value, error):
    with pytest.raises(error) as raised:
        dramalite.actor(lambda: None, actor_name="report", **{option: value})

    assert "report" in str(raised.value)
    assert option in str(raised.value)
    assert repr(value) in str(raised.value)
    assert broker.get_declared_actors() == set()


@pytest.mark.parametrize("priority", ["high", 1.5, None, "1"])
def test_a_priority_that_is_no_integer_is_refused_at_decoration(stub_broker, priority):
    with pytest.raises((TypeError, ValueError)) as raised:
        dramalite.actor(lambda: None, actor_name="report", priority=priority)

    assert "report" in str(raised.value)
    assert "priority" in str(raised.value)
    assert repr(priority) in str(raised.value)
    assert stub_broker.get_declared_actors() == set()


@pytest.mark.parametrize("priority", [-(10**6), -1, 0, 1, 10**6])
def test_any_integer_is_a_priority(stub_broker, priority):
    assert dramalite.actor(lambda: None, priority=priority).priority == priority


@pytest.mark.parametrize("option", ["max_age", "time_limit", "min_backoff", "max_backoff"])
def test_a_duration_may_be_a_timedelta(stub_broker, option):
    work = dramalite.actor(lambda: None, actor_name="work", **{option: MINUTE})

    assert work.send_with_options(**{option: MINUTE}).actor_name == "work"


@pytest.mark.parametrize("name", ["work", "other"])
def test_a_declared_name_cannot_be_taken_again(stub_broker, name):
    dramalite.actor(lambda: None, actor_name=name)
    with pytest.raises(ValueError) as raised:
        dramalite.actor(lambda: None, actor_name=name)

    assert str(raised.value) == f"An actor named '{name}' is already registered."


# Actor


def test_an_actor_can_be_made_by_hand(stub_broker):
    def add(x, y):
        return x + y

    adder = dramalite.Actor(
        add,
        broker=stub_broker,
        actor_name="adder",
        queue_name="math",
        priority=5,
        options={"max_retries": 3},
    )

    assert adder(10, 20) == 30
    assert adder.fn is add
    assert (adder.actor_name, adder.queue_name, adder.priority) == ("adder", "math", 5)
    assert adder.options == {"max_retries": 3}
    assert stub_broker.get_actor("adder") is adder
    assert "math" in stub_broker.get_declared_queues()


def test_an_actor_made_by_hand_cannot_take_a_name_either(stub_broker):
    dramalite.actor(lambda: None, actor_name="foo")
    with pytest.raises(ValueError) as raised:
        dramalite.Actor(
            print,
            broker=stub_broker,
            actor_name="foo",
            queue_name="default",
            priority=0,
            options={},
        )

    assert str(raised.value) == "An actor named 'foo' is already registered."


def test_str_and_repr_of_an_actor(stub_broker):
    def test():
        pass

    actor = dramalite.actor(test)

    assert str(actor) == "Actor(test)"
    assert repr(actor) == f"Actor({test!r}, queue_name='default', actor_name='test')"


def test_an_actors_logger_is_named_after_module_and_actor(stub_broker):
    actor = dramalite.actor(lambda: None, actor_name="work")

    assert actor.logger.name == f"{__name__}.work"


@pytest.mark.parametrize("module", [None, ""])
def test_an_actor_without_a_module_has_a_logger_all_the_same(stub_broker, module):
    def work():
        pass

    work.__module__ = module

    assert dramalite.actor(work).logger.name == "_.work"


def test_an_actor_is_generic_in_its_parameters_and_result(stub_broker):
    class MyActor(Actor[[int], str]):
        pass

    assert dramalite.actor(lambda x: str(x), actor_class=MyActor)(1) == "1"


def test_calling_an_actor_runs_its_function_here_and_now(stub_broker):
    @dramalite.actor
    def add(x, y):
        return x + y

    assert add(10, y=20) == 30


def test_an_error_in_a_direct_call_reaches_the_caller(stub_broker):
    error = ValueError("no")

    @dramalite.actor
    def fail():
        raise error

    with pytest.raises(ValueError) as raised:
        fail()

    assert raised.value is error


def test_a_direct_call_is_logged_with_its_end_also_after_an_error(stub_broker, caplog):
    @dramalite.actor
    def fail():
        raise ValueError("no")

    caplog.set_level("DEBUG", logger=fail.logger.name)
    with pytest.raises(ValueError):
        fail()
    records = [record for record in caplog.records if record.name == fail.logger.name]

    assert [record.levelname for record in records] == ["DEBUG", "DEBUG"]


def test_an_async_actor_can_be_called_directly(stub_broker):
    @dramalite.actor
    async def add(x, y):
        await asyncio.sleep(0)
        return x + y

    assert add(1, 2) == 3


@pytest.mark.parametrize("error", [ValueError("no"), TimeoutError("own"), asyncio.TimeoutError()])
def test_an_error_of_an_async_actor_reaches_the_caller(stub_broker, error):
    @dramalite.actor
    async def fail():
        raise error

    with pytest.raises(type(error)) as raised:
        fail()

    assert raised.value is error


def test_an_async_actors_own_function_is_kept(stub_broker):
    async def add(x, y):
        return x + y

    actor = dramalite.actor(add)

    assert actor.fn.__wrapped__ is add
    assert actor.fn.__name__ == "add"


def test_an_async_actor_works_for_a_worker(broker, worker):
    done = []

    @dramalite.actor
    async def work(value):
        await asyncio.sleep(0)
        done.append(value)

    work.send(1)
    work.send(2)
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert sorted(done) == [1, 2]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="inspect.markcoroutinefunction() is new in 3.12")
def test_a_function_that_is_marked_as_a_coroutine_function_runs_as_one(broker):
    done = []

    @dramalite.actor
    @inspect.markcoroutinefunction
    def work(value):
        async def later():
            done.append(value)

        return later()

    work.send(1)
    broker.drain()

    assert done == [1]


def test_an_object_with_an_async_call_runs_as_a_coroutine(broker):
    class Work:
        async def __call__(self, value):
            done.append(value)

    done = []
    work = dramalite.actor(Work(), actor_name="work")
    work.send(1)
    broker.drain()
    work(2)

    assert done == [1, 2]


# Messages of an actor


def test_message_makes_a_message_without_enqueueing_it(stub_broker):
    work = dramalite.actor(print, actor_name="work", queue_name="q")
    message = work.message(1, y=2)

    assert isinstance(message, Message)
    assert (message.queue_name, message.actor_name) == ("q", "work")
    assert (message.args, message.kwargs, message.options) == ((1,), {"y": 2}, {})
    assert stub_broker.queues["q"].qsize() == 0


def test_message_with_options_makes_one_with_options(stub_broker):
    work = dramalite.actor(print, actor_name="work")
    message = work.message_with_options(args=[1], kwargs={"y": 2}, max_retries=5, colour="red")

    assert (message.args, message.kwargs) == ((1,), {"y": 2})
    assert message.options == {"max_retries": 5, "colour": "red"}


def test_message_with_options_has_no_arguments_by_default(stub_broker):
    message = dramalite.actor(print, actor_name="work").message_with_options(kwargs=None)

    assert (message.args, message.kwargs, message.options) == ((), {}, {})


@pytest.mark.parametrize("args", [[1, 2], (1, 2), iter([1, 2]), range(1, 3)])
def test_args_may_be_any_iterable(stub_broker, args):
    work = dramalite.actor(print, actor_name="work")

    assert work.message_with_options(args=args).args == (1, 2)


def test_args_must_be_iterable(stub_broker):
    with pytest.raises(TypeError):
        dramalite.actor(print, actor_name="work").message_with_options(args=None)


def test_send_returns_the_message_it_enqueued(stub_broker):
    work = dramalite.actor(print, actor_name="work")
    message = work.send(1, y=2)

    assert Message.decode(stub_broker.queues["default"].get()) == message
    assert (message.args, message.kwargs) == ((1,), {"y": 2})


def test_send_with_options_takes_keywords_only(stub_broker):
    with pytest.raises(TypeError):
        dramalite.actor(print, actor_name="work").send_with_options((1,))

    assert stub_broker.queues["default"].qsize() == 0


@pytest.mark.parametrize(
    "delay, milliseconds",
    [
        (1500, 1500),
        (MINUTE, 60_000),
        (datetime.timedelta(microseconds=2999), 2),
        (datetime.timedelta(0), 0),
    ],
)
def test_a_delay_is_milliseconds_or_a_timedelta(make_broker, clock, delay, milliseconds):
    make_broker(clock=clock)
    message = dramalite.actor(print, actor_name="work").send_with_options(delay=delay)

    assert message.queue_name == "default.DQ"
    assert message.options == {"eta": clock.time_ms() + milliseconds}


def test_a_message_is_not_checked_against_the_functions_signature(stub_broker):
    @dramalite.actor
    def add(x, y):
        return x + y

    assert add.send(1, 2, 3).args == (1, 2, 3)


def test_unknown_message_options_are_kept_and_travel(broker, worker):
    seen = []

    class Peek(dramalite.Middleware):
        def before_process_message(self, broker, message):
            seen.append(dict(message.options))

    broker.add_middleware(Peek())
    work = dramalite.actor(lambda: None, actor_name="work")
    work.send_with_options(colour="red")
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert seen == [{"colour": "red"}]


# Arguments that are refused by send


NESTED = functools.reduce(lambda inner, _: [inner], range(150), 1)

REFUSED = {
    "datetime": (dict(kwargs={"when": datetime.datetime(2026, 1, 2)}), TypeError, "kwargs['when']"),
    "set": (dict(args=(1, {2})), TypeError, "args[1]"),
    "bytes": (dict(args=(b"raw",)), TypeError, "args[0]"),
    "object deep inside": (
        dict(kwargs={"a": [0, {"b": object()}]}),
        TypeError,
        "kwargs['a'][1]['b']",
    ),
    "nan": (dict(args=(float("nan"),)), ValueError, "args[0]"),
    "infinity": (dict(kwargs={"x": float("inf")}), ValueError, "kwargs['x']"),
    "minus infinity": (dict(args=([-float("inf")],)), ValueError, "args[0][0]"),
    "number as key": (dict(args=({1: "a"},)), TypeError, "args[0]"),
    "none as key": (dict(kwargs={"a": {None: 1}}), TypeError, "kwargs['a']"),
    "lone surrogate": (dict(args=("\ud800",)), ValueError, "args[0]"),
    "lone surrogate in a key": (dict(args=({"\udfff": 1},)), ValueError, "args[0]"),
    "deep nesting": (dict(args=(NESTED,)), ValueError, "args[0]"),
    "option that is not json": (dict(colour={1}), TypeError, "options['colour']"),
}


def refused(work, error, **options):
    """The text of the error with which `work.send_with_options(**options)` fails."""
    with pytest.raises(error) as raised:
        work.send_with_options(**options)
    return str(raised.value)


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_json_would_not_keep_is_refused_by_send_and_nothing_is_stored(broker, worker, case):
    options, error, place = REFUSED[case]
    done = []
    work = dramalite.actor(lambda *args, **kwargs: done.append(args), actor_name="report")
    text = refused(work, error, **options)
    work.send("good")
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert "report" in text
    assert place in text
    assert done == [("good",)]


def test_a_refusal_names_the_type_and_its_place(stub_broker):
    work = dramalite.actor(print, actor_name="report")
    text = refused(work, TypeError, kwargs={"when": datetime.datetime(2026, 1, 2)})

    assert "kwargs['when'] is a datetime" in text
    assert stub_broker.queues["default"].qsize() == 0


def test_nesting_of_a_hundred_levels_is_accepted(broker, worker):
    received = []
    value = functools.reduce(lambda inner, _: [inner], range(95), 1)
    work = dramalite.actor(received.append, actor_name="work")
    work.send(value)
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert received == [value]


def test_keys_may_be_of_a_subclass_of_str(broker):
    class Colour(str, enum.Enum):
        RED = "red"

    received = []
    work = dramalite.actor(lambda *args, **kwargs: received.append((args, kwargs)), actor_name="work")
    work.send_with_options(args=({Colour.RED: 1},), kwargs={"by": [{Colour.RED: 2}]}, shade={Colour.RED: 3})
    [waiting] = broker.pending()
    broker.drain()

    assert received == [(({"red": 1},), {"by": [{"red": 2}]})]
    assert waiting.options == {"shade": {"red": 3}}


def test_a_cycle_is_refused(stub_broker):
    cycle = []
    cycle.append(cycle)
    text = refused(dramalite.actor(print, actor_name="report"), ValueError, args=(cycle,))

    assert "report" in text
    assert stub_broker.queues["default"].qsize() == 0


def test_a_message_over_the_size_limit_is_refused(make_broker, worker):
    done = []
    broker = make_broker(max_message_size=1000)
    work = dramalite.actor(lambda text: done.append(len(text)), actor_name="report")
    text = refused(work, ValueError, args=("x" * 1000,))
    work.send("x" * 500)
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert "report" in text
    assert "1000" in text.replace(",", "")
    assert "max_message_size" in text
    assert done == [500]


def test_a_message_of_a_mebibyte_is_too_large_by_default(broker):
    work = dramalite.actor(print, actor_name="report")
    text = refused(work, ValueError, args=("x" * 1048576,))

    assert "1048576" in text.replace(",", "").replace("_", "")
    assert work.send("x" * 1_000_000).actor_name == "report"


def test_a_size_limit_counts_bytes_as_encoded(make_broker):
    make_broker(max_message_size=1000)
    work = dramalite.actor(print, actor_name="report")
    text = refused(work, ValueError, args=("é" * 200,))

    assert "report" in text


@pytest.mark.parametrize(
    "delay, error, shown",
    [
        (-1, ValueError, "-1"),
        (datetime.timedelta(milliseconds=-1), ValueError, "-1"),
        ("1s", TypeError, "'1s'"),
    ],
)
def test_a_bad_delay_is_refused_and_nothing_is_stored(broker, worker, delay, error, shown):
    done = []
    work = dramalite.actor(lambda: done.append("run"), actor_name="report")
    text = refused(work, error, delay=delay)
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert "report" in text
    assert "delay" in text
    assert shown in text
    assert done == []


@pytest.mark.parametrize("priority", ["high", 1.5, [1]])
def test_a_priority_that_is_no_integer_is_refused_by_send(broker, worker, priority):
    done = []
    work = dramalite.actor(lambda: done.append("run"), actor_name="report")
    text = refused(work, (TypeError, ValueError), priority=priority)
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert "report" in text
    assert "priority" in text
    assert repr(priority) in text
    assert done == []


@pytest.mark.parametrize(
    "option, value",
    [("max_retries", "3"), ("time_limit", "1 day"), ("max_age", "1 day"), ("min_backoff", "1")],
)
def test_a_bad_value_of_a_known_message_option_is_refused_by_send(broker, worker, option, value):
    done = []
    work = dramalite.actor(lambda: done.append("run"), actor_name="report")
    text = refused(work, TypeError, **{option: value})
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert "report" in text
    assert option in text
    assert repr(value) in text
    assert done == []


# GenericActor


def test_a_class_based_actor_is_a_callable_instance(stub_broker):
    class Add(GenericActor):
        def perform(self, x, y):
            return x + y

    assert Add(1, 2) == 3
    assert isinstance(Add, GenericActor)
    assert not isinstance(Add, Actor)
    assert isinstance(Add.__actor__, Actor)
    assert stub_broker.get_actor("Add") is Add.__actor__


def test_a_class_based_actor_forwards_to_its_actor(stub_broker):
    class Add(GenericActor):
        factor = 2

        def perform(self, x, y):
            return x + y

    message = Add.send(1, 2)

    assert (message.actor_name, message.args) == ("Add", (1, 2))
    assert Add.message(3).args == (3,)
    assert (Add.actor_name, Add.queue_name, Add.priority) == ("Add", "default", 0)
    assert Add.options is Add.__actor__.options
    assert Add.__name__ == "Add"
    assert Add.logger.name == f"{__name__}.Add"
    assert Add.factor == 2


def test_meta_configures_a_class_based_actor(broker, worker):
    sent = []

    class EmailActor(dramalite.GenericActor):
        class Meta:
            queue_name = "emails"
            priority = 10
            max_retries = 5

        def perform(self, to, subject):
            sent.append((to, subject))

    EmailActor.send("ada@example.com", subject="Hello")
    worker(broker)
    broker.join("emails", timeout=DEADLINE * 1000)

    assert sent == [("ada@example.com", "Hello")]
    assert (EmailActor.queue_name, EmailActor.priority) == ("emails", 10)
    assert EmailActor.options == {"max_retries": 5}


def test_meta_may_name_the_actor_and_its_broker(stub_broker, make_stub_broker):
    other = make_stub_broker()

    class Add(GenericActor):
        class Meta:
            actor_name = "adder"
            broker = stub_broker

        def perform(self):
            pass

    assert Add.actor_name == "adder"
    assert Add.broker is stub_broker
    assert other.get_declared_actors() == set()


def test_none_in_meta_means_the_default(stub_broker):
    class Add(GenericActor):
        class Meta:
            actor_name = None
            broker = None

        def perform(self):
            pass

    assert Add.actor_name == "Add"
    assert Add.broker is stub_broker


def test_private_names_in_meta_are_no_options(stub_broker):
    class Add(GenericActor):
        class Meta:
            _note = "not an option"
            max_retries = 1

        def perform(self):
            pass

    assert Add.options == {"max_retries": 1}


def test_an_unknown_option_in_meta_is_refused(stub_broker):
    with pytest.raises(ValueError) as raised:

        class Add(GenericActor):
            class Meta:
                no_such_option = 1

            def perform(self):
                pass

    assert "no_such_option" in str(raised.value)
    assert stub_broker.get_declared_actors() == set()


def test_meta_may_bring_its_own_registry(stub_broker):
    calls = []

    def registry(instance, **options):
        calls.append((type(instance).__name__, options))
        return "made by the registry"

    class Add(GenericActor):
        class Meta:
            actor = registry
            queue_name = "q"

        def perform(self):
            pass

    class Plain(GenericActor):
        class Meta:
            actor = registry

        def perform(self):
            pass

    assert Add.__actor__ == "made by the registry"
    assert calls == [("Add", {"queue_name": "q"}), ("Plain", {})]
    assert stub_broker.get_declared_actors() == set()


def test_an_abstract_class_stays_a_class_and_is_no_actor(stub_broker):
    class Base(GenericActor):
        class Meta:
            abstract = True
            queue_name = "tasks"

    assert isinstance(Base, type)
    assert stub_broker.get_declared_actors() == set()
    with pytest.raises(AttributeError):
        Base.send()


def test_a_subclass_of_an_abstract_class_is_concrete_and_inherits_meta(stub_broker):
    class Base(GenericActor):
        class Meta:
            abstract = True
            queue_name = "tasks"
            max_retries = 20

        def perform(self):
            return self.answer()

    class Question(Base):
        def answer(self):
            return 42

    class Other(Base):
        def answer(self):
            return 43

    assert (Question(), Other()) == (42, 43)
    assert (Question.queue_name, Other.queue_name) == ("tasks", "tasks")
    assert (Question.options, Other.options) == ({"max_retries": 20}, {"max_retries": 20})


def test_an_own_meta_inherits_from_its_base_metas(stub_broker):
    class Base(GenericActor):
        class Meta:
            abstract = True
            queue_name = "tasks"
            max_retries = 20

    class Child(Base):
        class Meta(Base.Meta):
            max_retries = 1

        def perform(self):
            pass

    assert Child.queue_name == "tasks"
    assert Child.options == {"max_retries": 1}


def test_a_missing_perform_says_whose_it_is(stub_broker):
    class Foo(GenericActor):
        pass

    with pytest.raises(NotImplementedError) as raised:
        Foo(1, x=2)

    assert str(raised.value) == "Foo does not implement perform()"


def test_a_wrong_call_of_perform_is_a_type_error(stub_broker):
    class Foo(GenericActor):
        def perform(self, x):
            return x

    with pytest.raises(TypeError):
        Foo()

    assert Foo(1) == 1


def test_an_unknown_attribute_is_an_attribute_error(stub_broker):
    class Foo(GenericActor):
        def perform(self):
            pass

    with pytest.raises(AttributeError):
        Foo.no_such_attribute
    with pytest.raises(AttributeError):
        GenericActor.no_such_attribute


def test_a_class_whose_init_needs_arguments_is_refused(stub_broker):
    with pytest.raises(TypeError):

        class Foo(GenericActor):
            def __init__(self, needed):
                self.needed = needed

    assert stub_broker.get_declared_actors() == set()


def test_a_concrete_class_based_actor_cannot_be_subclassed(stub_broker):
    class Foo(GenericActor):
        def perform(self):
            pass

    with pytest.raises(TypeError):

        class Bar(Foo):
            pass

    assert stub_broker.get_declared_actors() == {"Foo"}


def test_a_class_based_actor_keeps_its_state(broker, worker):
    class Counter(GenericActor):
        def __init__(self):
            self.count = 0

        def perform(self):
            self.count += 1

    Counter.send()
    Counter.send()
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert Counter.count == 2


def test_perform_may_be_async(broker, worker):
    done = []

    class Fetch(GenericActor):
        async def perform(self, value):
            await asyncio.sleep(0)
            done.append(value)
            return value

    Fetch.send(1)
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert done == [1]
    assert Fetch(2) == 2


def test_a_name_that_sqlite_would_cut_is_refused(broker):
    with pytest.raises(ValueError, match="without a null character"):
        dramalite.actor(print, actor_name="a\0b")
