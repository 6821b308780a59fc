"""Encoders: the wire format to the byte, what a reader tolerates, encoders of one's own."""

import functools
import json
import math
import threading
from pathlib import Path

import pytest

import dramalite
from dramalite import Message

from helpers import DEADLINE

WIRE = Path(__file__).parent / "wire"


def message(**changes):
    fields = {
        "queue_name": "default",
        "actor_name": "add",
        "args": (),
        "kwargs": {},
        "options": {},
        "message_id": "749580aa-0b3b-4f0e-9d3c-3a4c6c8f3f10",
        "message_timestamp": 1795379900148,
    }
    return Message(**{**fields, **changes})


LAST = message(actor_name="last", args=(3,), message_id="00000000-0000-4000-8000-000000000003")
MIDDLE = message(
    actor_name="middle",
    message_id="00000000-0000-4000-8000-000000000002",
    options={"pipe_ignore": True, "pipe_target": LAST.asdict()},
)
TRACEBACK = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\nValueError: no\n'

# What the files in wire/ hold, after transport: arrays are lists.
SAMPLES = {
    "plain": message(args=(1,), kwargs={"y": 2}),
    "empty": message(),
    "unicode": message(args=("café", "😀", "\u2028"), kwargs={"ü": '"\\/\b\f\n\r\t\x00\x7f'}),
    "numbers": message(args=(0, -1, 1.5, 1e100, -0.0, 2**70, True, False, None)),
    "nested": message(args=([1, [2, []]], [3, [4]]), kwargs={"a": {"b": [{"c": None}]}}),
    "option_order": message(
        options={"zeta": 1, "alpha": 2, "max_retries": 0, "time_limit": 60000}
    ),
    "delayed": message(
        queue_name="default.DQ", args=(1,), options={"max_retries": 3, "eta": 1795379901148}
    ),
    "retried": message(
        options={"retries": 2, "traceback": TRACEBACK, "requeue_timestamp": 1795379901000}
    ),
    "pipeline": message(actor_name="first", args=(1,), options={"pipe_target": MIDDLE.asdict()}),
    "callbacks": message(
        queue_name="user.emails",
        actor_name="<lambda>",
        options={"on_success": "done", "on_failure": None},
    ),
}


def plainly(decoded):
    """The message's dict with every tuple a list, as JSON has it."""
    return json.loads(json.dumps(decoded.asdict()))


@pytest.fixture
def pickled():
    """Makes pickle the global encoder; the fixture `clean_state` takes it back."""
    dramalite.set_encoder(dramalite.PickleEncoder())


def test_every_wire_sample_is_tested():
    assert {path.stem for path in WIRE.glob("*.json")} == set(SAMPLES)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_a_message_is_encoded_as_dramatiq_encodes_it(name):
    assert SAMPLES[name].encode() == (WIRE / f"{name}.json").read_bytes()


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_a_message_that_dramatiq_encoded_is_read_back(name):
    decoded = Message.decode((WIRE / f"{name}.json").read_bytes())

    assert type(decoded.args) is tuple
    assert plainly(decoded) == plainly(SAMPLES[name])


def test_tuples_become_arrays():
    assert dramalite.JSONEncoder().encode({"a": (1, (2,))}) == b'{"a":[1,[2]]}'


def test_a_float_keeps_its_shortest_form():
    assert dramalite.JSONEncoder().encode({"a": 0.1}) == b'{"a":0.1}'


@pytest.mark.parametrize("value", [{1}, b"bytes", object(), 1j])
def test_what_json_cannot_hold_is_a_type_error(value):
    with pytest.raises(TypeError):
        dramalite.JSONEncoder().encode({"a": value})


@pytest.mark.parametrize("leaf", [1, "plain", "한국", "😀"])
def test_how_deep_a_value_may_nest_does_not_depend_on_its_letters(leaf):
    deepest = functools.reduce(lambda inner, _: [inner], range(101), leaf)
    encoder = dramalite.JSONEncoder()

    assert encoder.decode(encoder.encode(deepest)) == deepest
    with pytest.raises(ValueError, match="deeper"):
        encoder.encode([deepest])


def test_what_is_refused_is_refused_by_one_error():
    with pytest.raises(ValueError, match="surrogate") as raised:
        dramalite.JSONEncoder().encode("\ud800")

    assert raised.value.__context__ is None


def test_a_key_that_is_no_text_is_told_of_with_its_place():
    with pytest.raises(ValueError, match="surrogate") as outer:
        dramalite.JSONEncoder().encode({"\ud800": 1})
    with pytest.raises(ValueError, match="surrogate") as inner:
        dramalite.JSONEncoder().encode({"a": {"\ud800": 1}})

    assert str(outer.value).startswith("data, a key is '\\ud800'")
    assert str(inner.value).startswith("a, a key is '\\ud800'")


def test_keys_may_come_in_any_order_and_with_spaces():
    data = b"""
        { "message_timestamp": 5, "options": {}, "message_id": "id", "kwargs": {"a": 1},
          "args": [2], "actor_name": "add", "queue_name": "default" }
    """

    assert Message.decode(data) == Message("default", "add", (2,), {"a": 1}, {}, "id", 5)


def test_a_bare_nan_of_another_writer_is_read():
    assert math.isnan(dramalite.JSONEncoder().decode(b'{"a":NaN}')["a"])


def test_a_message_without_id_and_time_gets_fresh_ones():
    data = b'{"queue_name":"q","actor_name":"a","args":[],"kwargs":{},"options":{}}'
    first, second = Message.decode(data), Message.decode(data)

    assert first.message_id != second.message_id
    assert first.message_timestamp > 1_700_000_000_000


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no json",
        b"\xff\xfe",
        b"[]",
        b'"text"',
        b"null",
        b"{}",
        b'{"queue_name":"q","actor_name":"a","kwargs":{},"options":{}}',
        b'{"queue_name":"q","actor_name":"a","args":null,"kwargs":{},"options":{}}',
        b'{"queue_name":"q","actor_name":"a","args":[],"kwargs":{},"options":{},"extra":1}',
        b'{"queue_name":"q","actor_name":"a","args":[],"kwargs":{},"options":{}} trailing',
    ],
)
def test_a_message_that_cannot_be_read_is_a_decode_error(data):
    with pytest.raises(dramalite.DecodeError) as raised:
        Message.decode(data)

    assert isinstance(raised.value.error, Exception)
    assert raised.value.__cause__ is not None


def test_json_that_is_not_utf8_is_a_decode_error_with_the_bytes():
    with pytest.raises(dramalite.DecodeError) as raised:
        dramalite.JSONEncoder().decode(b'{"a":"\xff"}')

    assert raised.value.data == b'{"a":"\xff"}'
    assert isinstance(raised.value.error, UnicodeDecodeError)


def test_text_that_is_not_json_is_a_decode_error_with_the_text():
    with pytest.raises(dramalite.DecodeError) as raised:
        dramalite.JSONEncoder().decode(b'{"a":}')

    assert raised.value.data == '{"a":}'
    assert isinstance(raised.value.error, ValueError)


def test_the_encoder_base_class_is_abstract():
    with pytest.raises(TypeError):
        dramalite.Encoder()


def test_the_global_encoder_is_json_until_it_is_set():
    assert type(dramalite.get_encoder()) is dramalite.JSONEncoder


def test_set_encoder_replaces_the_global_encoder():
    mine = dramalite.PickleEncoder()
    dramalite.set_encoder(mine)

    assert dramalite.get_encoder() is mine


def test_pickle_is_an_encoder_that_keeps_python_values():
    encoder = dramalite.PickleEncoder()
    value = {"a": (1, {2}), 3: b"x"}

    assert encoder.decode(encoder.encode(value)) == value


@pytest.mark.parametrize("value", [lambda: 1, threading.Lock(), type("Nowhere", (), {})()], ids=["lambda", "lock", "nameless"])
def test_what_pickle_cannot_hold_is_a_type_error(value):
    with pytest.raises(TypeError):
        dramalite.PickleEncoder().encode({"a": value})


def test_messages_are_encoded_by_the_global_encoder():
    class Reversed(dramalite.JSONEncoder):
        def encode(self, data):
            return super().encode(data)[::-1]

        def decode(self, data):
            return super().decode(data[::-1])

    plain = message(args=(1,))
    expected = plain.encode()[::-1]
    dramalite.set_encoder(Reversed())

    assert plain.encode() == expected
    assert Message.decode(expected) == plain


def test_a_message_travels_pickled_when_pickle_was_chosen(broker, worker, pickled):
    received = []

    @dramalite.actor
    def keep(value):
        received.append(value)

    keep.send((1, {2}, b"x"))
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert received == [(1, {2}, b"x")]


def test_a_result_that_pickle_cannot_hold_ends_a_chain_visibly(broker, worker, pickled):
    first = dramalite.actor(lambda: lambda: 1, actor_name="first", max_retries=0)
    last = dramalite.actor(print, actor_name="last")
    (first.message() | last.message()).run()
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert [letter.actor_name for letter in broker.dead_letters] == ["first"]



def test_an_encoders_own_kind_of_value_error_is_a_value_error_that_names_the_actor(broker):
    class ASCIIOnly(dramalite.JSONEncoder):
        def encode(self, data):
            "".join(data["args"]).encode("ascii")
            return super().encode(data)

    dramalite.set_encoder(ASCIIOnly())
    work = dramalite.actor(print, actor_name="work")
    with pytest.raises(ValueError, match="actor 'work': .*ascii"):
        work.send("é")

    assert broker.pending() == []


def test_a_pickled_message_is_not_unpickled_unless_pickle_was_chosen(broker, worker):
    received = []

    @dramalite.actor
    def keep(value):
        received.append(value)

    dramalite.set_encoder(dramalite.PickleEncoder())
    keep.send("pickled")
    dramalite.set_encoder(dramalite.JSONEncoder())
    keep.send("json")
    worker(broker)
    broker.join("default", timeout=DEADLINE * 1000)

    assert received == ["json"]
    assert len(broker.dead_letters) == 1


def test_an_encoder_that_makes_text_in_place_of_bytes_is_refused_by_name(broker):
    class Text(dramalite.JSONEncoder):
        def encode(self, data):
            return json.dumps(data)

    work = dramalite.actor(print, actor_name="work")
    dramalite.set_encoder(Text())
    with pytest.raises(TypeError) as raised:
        work.send(1)
    dramalite.set_encoder(dramalite.JSONEncoder())

    assert "Text" in str(raised.value) and "bytes" in str(raised.value)
    assert broker.pending() == []
