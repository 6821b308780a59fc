"""Errors: their tree, their attributes, their texts."""

import pickle

import pytest

import dramalite


@pytest.mark.parametrize(
    "name, parent",
    [
        ("DramaliteError", "Exception"),
        ("DecodeError", "DramaliteError"),
        ("BrokerError", "DramaliteError"),
        ("ActorNotFound", "BrokerError"),
        ("QueueNotFound", "BrokerError"),
        ("BrokerConnectionError", "BrokerError"),
        ("ConnectionFailed", "BrokerConnectionError"),
        ("ConnectionClosed", "BrokerConnectionError"),
        ("QueueJoinTimeout", "DramaliteError"),
        ("RateLimitExceeded", "DramaliteError"),
        ("Retry", "DramaliteError"),
        ("ResultError", "DramaliteError"),
        ("ResultTimeout", "ResultError"),
        ("ResultMissing", "ResultError"),
        ("ResultFailure", "ResultError"),
        ("MiddlewareError", "Exception"),
        ("SkipMessage", "MiddlewareError"),
        ("Interrupt", "BaseException"),
        ("TimeLimitExceeded", "Interrupt"),
        ("Shutdown", "Interrupt"),
    ],
)
def test_each_error_stands_under_its_parent(name, parent):
    expected = {"Exception": Exception, "BaseException": BaseException}.get(parent) or getattr(
        dramalite, parent
    )

    assert getattr(dramalite, name).__bases__[0] == expected


def test_dramatiqs_name_for_the_base_error_works_too():
    assert dramalite.DramatiqError is dramalite.DramaliteError


def test_middleware_errors_are_not_dramalite_errors():
    assert not issubclass(dramalite.MiddlewareError, dramalite.DramaliteError)


def test_except_exception_does_not_catch_an_interrupt():
    assert not issubclass(dramalite.Interrupt, Exception)


def test_an_error_keeps_its_message_and_shows_it():
    error = dramalite.BrokerError("The file is gone.")

    assert error.message == "The file is gone."
    assert str(error) == "The file is gone."


def test_an_error_whose_message_is_no_text_shows_it_all_the_same():
    assert str(dramalite.BrokerError(404)) == "404"


@pytest.mark.parametrize(
    "name", ["DramaliteError", "BrokerError", "ActorNotFound", "QueueNotFound", "QueueJoinTimeout"]
)
def test_an_error_needs_a_message(name):
    with pytest.raises(TypeError):
        getattr(dramalite, name)()


def test_a_decode_error_keeps_the_data_and_the_cause():
    cause = ValueError("bad")
    error = dramalite.DecodeError("Failed.", b"\xff", cause)

    assert (error.message, error.data, error.error) == ("Failed.", b"\xff", cause)
    assert error.args == ("Failed.", b"\xff", cause)
    assert str(error) == "Failed."


def test_retry_has_no_message_and_no_delay_by_default():
    error = dramalite.Retry()

    assert error.message == ""
    assert error.delay is None
    assert str(error) == "''"


def test_retry_keeps_its_delay():
    error = dramalite.Retry("Later.", delay=1500)

    assert error.delay == 1500
    assert str(error) == "Later."


def test_a_retry_delay_of_zero_is_kept():
    assert dramalite.Retry(delay=0).delay == 0


def test_a_result_failure_names_the_original_exception():
    error = dramalite.ResultFailure("actor raised ValueError: no", "ValueError", "no")

    assert (error.orig_exc_type, error.orig_exc_msg) == ("ValueError", "no")
    assert str(error) == "actor raised ValueError: no"


def test_a_result_failure_can_be_made_without_arguments():
    error = dramalite.ResultFailure()

    assert (error.message, error.orig_exc_type, error.orig_exc_msg) == ("", "", "")


def test_retry_survives_pickling_with_its_delay():
    copy = pickle.loads(pickle.dumps(dramalite.Retry("Later.", delay=7)))

    assert type(copy) is dramalite.Retry
    assert (copy.message, copy.delay) == ("Later.", 7)


def test_a_result_failure_survives_pickling_with_its_attributes():
    copy = pickle.loads(pickle.dumps(dramalite.ResultFailure("text", "KeyError", "'a'")))

    assert type(copy) is dramalite.ResultFailure
    assert (copy.message, copy.orig_exc_type, copy.orig_exc_msg) == ("text", "KeyError", "'a'")
