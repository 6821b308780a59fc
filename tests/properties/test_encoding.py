"""What is stored is what was sent, and what would not be is refused before anything is stored."""

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dramalite
from dramalite import Message

from helpers import DEADLINE, json_objects, json_values, messages, queue_names, texts

PATIENCE = DEADLINE * 1000
FIELDS = ["queue_name", "actor_name", "args", "kwargs", "options", "message_id"]


@given(messages)
def test_a_message_is_read_back_as_it_was_written(message):
    assert Message.decode(message.encode()) == message


@given(messages)
def test_the_wire_is_compact_ascii_json_with_the_fields_in_order(message):
    data = message.encode()

    assert data == json.dumps(message.asdict(), separators=(",", ":")).encode("ascii")
    assert list(json.loads(data))[:6] == FIELDS


@given(messages)
def test_a_message_is_read_from_any_layout_of_its_json(message):
    fields = dict(reversed(message.asdict().items()))
    data = json.dumps(fields, indent=2, ensure_ascii=False).encode("utf-8")

    assert Message.decode(data) == message


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_decode_error_and_nothing_else(data):
    with pytest.raises(dramalite.DecodeError):
        Message.decode(data)


@given(json_values)
def test_arbitrary_json_is_a_decode_error_and_nothing_else(value):
    with pytest.raises(dramalite.DecodeError):
        Message.decode(json.dumps(value).encode())


@given(messages, json_objects)
def test_a_copy_has_the_new_options_over_the_old(message, options):
    copy = message.copy(options=options)

    assert copy.options == {**message.options, **options}
    assert copy == message._replace(options={**message.options, **options})


# Through a broker


@pytest.fixture(scope="module", params=["memory", "file"])
def echo(request, tmp_path_factory):
    """An actor of a broker with a running worker, and the list of what reached it."""
    if request.param == "memory":
        broker = dramalite.MemoryBroker()
    else:
        broker = dramalite.SQLiteBroker(
            tmp_path_factory.mktemp("encoding") / "queue.db", durability="normal"
        )
    received = []

    @dramalite.actor(broker=broker, max_retries=0)
    def echo(*args, **kwargs):
        received.append((list(args), kwargs))

    with dramalite.Worker(broker, worker_threads=1):
        yield echo, received
    broker.close()


@given(args=st.lists(json_values, max_size=3), kwargs=json_objects)
def test_a_job_gets_exactly_what_was_sent(echo, args, kwargs):
    actor, received = echo
    received.clear()
    actor.send_with_options(args=args, kwargs=kwargs)
    actor.broker.join("default", timeout=PATIENCE)

    assert received == [(args, kwargs)]


unfaithful = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.binary(max_size=5),
    st.sets(st.integers(), max_size=3),
    st.complex_numbers(),
    st.datetimes(),
    st.builds(object),
    st.characters(categories=["Cs"]),
    st.dictionaries(st.integers() | st.none() | st.booleans(), st.none(), min_size=1),
    st.dictionaries(st.characters(categories=["Cs"]), st.none(), min_size=1),
)


def nested(inner):
    """`inner` somewhere inside of lists and dicts."""
    return st.recursive(
        inner,
        lambda child: st.tuples(st.lists(json_values, max_size=2), child).map(
            lambda pair: [*pair[0], pair[1]]
        )
        | st.tuples(texts, child).map(lambda pair: {pair[0]: pair[1]}),
        max_leaves=1,
    )


@given(value=nested(unfaithful), place=st.sampled_from(["args", "kwargs", "options"]))
def test_what_would_not_be_read_back_is_refused_and_nothing_is_stored(echo, value, place):
    actor, received = echo
    received.clear()
    options = {
        "args": {"args": (value,)},
        "kwargs": {"kwargs": {"key": value}},
        "options": {"colour": value},
    }[place]
    with pytest.raises((TypeError, ValueError)) as raised:
        actor.send_with_options(**options)
    actor.broker.join("default", timeout=PATIENCE)

    assert "echo" in str(raised.value)
    assert received == []


# Queue names


@given(queue_names)
def test_names_by_the_rule_are_accepted(name):
    broker = dramalite.StubBroker()

    assert dramalite.actor(lambda: None, queue_name=name, broker=broker).queue_name == name
    assert broker.get_declared_queues() == {name}


@given(st.text(max_size=10) | st.from_regex(dramalite.QUEUE_NAME_PATTERN + r"[\n @]"))
def test_a_name_is_accepted_if_and_only_if_it_keeps_the_rule(name):
    legal = re.fullmatch(dramalite.QUEUE_NAME_PATTERN, name) is not None
    legal = legal and not name.endswith((".DQ", ".XQ"))
    broker = dramalite.StubBroker()
    try:
        dramalite.actor(lambda: None, queue_name=name, broker=broker)
        accepted = True
    except ValueError:
        accepted = False

    assert accepted == legal
