"""Messages: what they are, how they compare, copy, print and travel."""

import copy
import dataclasses
import datetime
import pickle
import sys
import uuid

import pytest

import dramalite
from dramalite import Message

from helpers import wait_until

FIELDS = (
    "queue_name",
    "actor_name",
    "args",
    "kwargs",
    "options",
    "message_id",
    "message_timestamp",
)


@pytest.fixture
def message():
    return Message("default", "add", (1,), {"y": "a"}, {"max_retries": 3}, "some-id", 1500)


def test_fields_come_in_the_order_of_the_wire(message):
    assert message._fields == FIELDS
    assert list(message.asdict()) == list(FIELDS)
    assert message._field_defaults == {}


def test_a_message_can_be_made_by_keywords(message):
    same = Message(
        queue_name="default",
        actor_name="add",
        args=(1,),
        kwargs={"y": "a"},
        options={"max_retries": 3},
        message_id="some-id",
        message_timestamp=1500,
    )

    assert same == message


def test_args_become_a_tuple():
    assert Message("default", "add", [1, 2], {}, {}).args == (1, 2)


def test_kwargs_and_options_are_kept_by_reference_and_may_be_changed():
    kwargs, options = {}, {}
    message = Message("default", "add", (), kwargs, options)
    message.options["max_retries"] = 1

    assert message.kwargs is kwargs
    assert options == {"max_retries": 1}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_cannot_be_assigned(message, field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(message, field, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"queue_name": "other"},
        {"actor_name": "other"},
        {"args": (2,)},
        {"kwargs": {}},
        {"options": {}},
        {"message_id": "other"},
        {"message_timestamp": 1},
    ],
)
def test_messages_differ_if_one_field_does(message, changes):
    other = message._replace(**changes)

    assert (message == other) is False


def test_messages_are_equal_if_all_fields_are(message):
    assert message._replace() == message
    assert message._replace() is not message


def test_a_message_does_not_equal_its_tuple_or_dict(message):
    assert message != tuple(message.asdict().values())
    assert message != message.asdict()


def test_messages_sort_by_their_fields():
    first = Message("a", "x", (), {}, {}, "1", 1)
    second = Message("a", "y", (), {}, {}, "1", 1)
    third = Message("b", "x", (), {}, {}, "1", 1)

    assert sorted([third, second, first]) == [first, second, third]


def test_repr_is_that_of_a_dataclass(message):
    assert repr(message) == (
        "Message(queue_name='default', actor_name='add', args=(1,), kwargs={'y': 'a'}, "
        "options={'max_retries': 3}, message_id='some-id', message_timestamp=1500)"
    )


@pytest.mark.parametrize(
    "args, kwargs, expected",
    [
        ((1,), {"y": "a"}, "add(1, y='a')"),
        ((), {}, "add()"),
        ((1, "b"), {}, "add(1, 'b')"),
        ((), {"y": None}, "add(y=None)"),
    ],
)
def test_str_is_the_call(args, kwargs, expected):
    assert str(Message("default", "add", args, kwargs, {})) == expected


def test_asdict_copies_no_values(message):
    assert message.asdict()["options"] is message.options
    assert message.asdict()["kwargs"] is message.kwargs


def test_asdict_has_an_alias(message):
    assert message._asdict() == message.asdict()


def test_replace_gives_a_message_with_other_fields(message):
    changed = message._replace(queue_name="other", args=(2,))

    assert changed.asdict() == {**message.asdict(), "queue_name": "other", "args": (2,)}


def test_copy_keeps_id_and_time(message):
    copy = message.copy(queue_name="other")

    assert copy.queue_name == "other"
    assert (copy.message_id, copy.message_timestamp) == ("some-id", 1500)


def test_copy_merges_options_over_the_old_ones(message):
    copy = message.copy(options={"time_limit": 5})

    assert copy.options == {"max_retries": 3, "time_limit": 5}
    assert message.options == {"max_retries": 3}


def test_copy_does_not_share_the_options(message):
    message.copy().options["eta"] = 1

    assert message.options == {"max_retries": 3}


def test_a_pipe_makes_a_pipeline(message):
    other = message.copy(actor_name="other")
    pipe = message | other

    assert isinstance(pipe, dramalite.pipeline)
    assert [step.actor_name for step in pipe.messages] == ["add", "other"]


def test_a_message_survives_encoding(message):
    assert Message.decode(message.encode()) == message


@pytest.mark.parametrize(
    "timestamp, expected",
    [
        (0, datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)),
        (
            1795379900148,
            datetime.datetime(2026, 11, 22, 20, 38, 20, 148000, datetime.timezone.utc),
        ),
    ],
)
def test_message_datetime_is_the_timestamp_in_utc_to_the_millisecond(message, timestamp, expected):
    moment = message._replace(message_timestamp=timestamp).message_datetime

    assert moment == expected
    assert moment.utcoffset() == datetime.timedelta(0)


def test_each_message_has_an_id_of_its_own():
    ids = {Message("default", "add", (), {}, {}).message_id for _ in range(5000)}

    assert len(ids) == 5000


def test_a_message_id_is_a_uuid_in_its_usual_form():
    message_id = Message("default", "add", (), {}, {}).message_id

    assert str(uuid.UUID(message_id)) == message_id


def test_a_message_id_starts_with_the_time_in_milliseconds():
    before = Message("default", "add", (), {}, {}).message_timestamp
    moment = uuid.UUID(Message("default", "add", (), {}, {}).message_id).int >> 80
    after = Message("default", "add", (), {}, {}).message_timestamp

    assert before <= moment <= after


def test_ids_of_later_messages_sort_after_those_of_earlier_ones():
    messages = []

    def a_later_millisecond_has_come():
        messages.append(Message("default", "add", (), {}, {}))
        return messages[-1].message_timestamp >= messages[0].message_timestamp + 5

    wait_until(a_later_millisecond_has_come)
    first, last = messages[0].message_id, messages[-1].message_id

    assert first < last


def test_a_timestamp_is_unix_time_in_milliseconds():
    before = dramalite.Clock().time_ms()
    timestamp = Message("default", "add", (), {}, {}).message_timestamp
    after = dramalite.Clock().time_ms()

    assert type(timestamp) is int
    assert before <= timestamp <= after


def test_get_result_without_a_results_backend_says_so(stub_broker):
    @dramalite.actor
    def add(x):
        return x

    with pytest.raises(RuntimeError):
        add.send(1).get_result()


def test_a_proxy_prints_like_its_message(message):
    proxy = dramalite.MessageProxy(message)

    assert str(proxy) == str(message)
    assert repr(message) in repr(proxy)


def test_a_proxy_reads_attributes_from_its_message(message):
    proxy = dramalite.MessageProxy(message)

    assert proxy.actor_name == "add"
    assert proxy.options is message.options
    assert proxy.asdict() == message.asdict()


def test_a_proxy_equals_its_message_and_proxies_of_equal_messages(message):
    proxy = dramalite.MessageProxy(message)

    assert proxy == message
    assert proxy == dramalite.MessageProxy(message._replace())
    assert proxy != message._replace(message_id="other")


def test_a_proxy_is_not_failed_until_fail_is_called(message):
    proxy = dramalite.MessageProxy(message)
    before = proxy.failed
    proxy.fail()

    assert (before, proxy.failed) == (False, True)


def test_a_copy_knows_its_broker(broker):
    sent = dramalite.actor(lambda: 42, actor_name="work", store_results=True).send()
    dramalite.set_broker(dramalite.Broker(middleware=[]))  # Where nobody knows of the result.
    broker.drain()

    assert copy.copy(sent) == sent
    assert copy.copy(sent).get_result() == 42


# Messages as dataclasses


@dataclasses.dataclass(frozen=True)
class Coloured(Message):
    """A message with a field of its own."""

    colour: str = "none"


def coloured():
    return Coloured("default", "add", (1,), {"y": "a"}, {"max_retries": 3}, "some-id", 1500, colour="red")


def test_a_message_is_a_dataclass_with_its_fields_in_their_order(message):
    assert dataclasses.is_dataclass(Message) and dataclasses.is_dataclass(message)
    assert [field.name for field in dataclasses.fields(Message)] == list(FIELDS)
    assert [field.name for field in dataclasses.fields(message)] == list(FIELDS)
    assert all(one is other for one, other in zip(dataclasses.fields(Message), dataclasses.fields(message)))


def test_a_message_is_taken_apart_as_a_dataclass_is(message):
    copied = dataclasses.asdict(message)

    assert copied == message.asdict()
    assert copied["options"] is not message.options
    assert dataclasses.astuple(message) == tuple(message.asdict().values())


def test_fields_of_a_message_are_replaced_as_a_dataclasss_are(message):
    changed = dataclasses.replace(message, args=(2,))

    assert (type(changed), changed) == (Message, message._replace(args=(2,)))
    assert message.args == (1,)


@pytest.mark.skipif(sys.version_info < (3, 13), reason="copy.replace() came with Python 3.13")
def test_fields_of_a_message_are_replaced_by_copy_replace(message):
    assert copy.replace(message, args=(2,)) == message._replace(args=(2,))


def test_a_dataclass_made_of_message_has_its_fields_and_its_own():
    message = coloured()
    changed = dataclasses.replace(message, args=(2,))

    assert [field.name for field in dataclasses.fields(Coloured)] == [*FIELDS, "colour"]
    assert (changed.args, changed.colour, changed.message_id) == ((2,), "red", "some-id")
    assert message == coloured() and message != dataclasses.replace(message, colour="blue")
    with pytest.raises(dataclasses.FrozenInstanceError):
        message.colour = "blue"


def test_messages_of_a_dataclass_made_of_message_have_ids_of_their_own():
    first, second = [Coloured("default", "add", (), {}, {}) for _ in range(2)]

    assert uuid.UUID(first.message_id) != uuid.UUID(second.message_id)
    assert first.message_timestamp <= second.message_timestamp


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda message: message.copy(), lambda message: pickle.loads(pickle.dumps(message))],
    ids=["copy", "deepcopy", "its copy", "pickle"],
)
def test_a_copy_of_a_message_of_a_dataclass_made_of_message_keeps_its_own_field(copied):
    assert copied(coloured()).colour == "red"
