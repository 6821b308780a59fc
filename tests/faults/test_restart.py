"""Graceful restarts under load: nothing is lost and nothing runs twice."""

from __future__ import annotations

import random
import signal

import pytest
from harness import let_pass

JOBS = """
    @dramalite.actor(max_retries=0)
    def job(number):
        note("start", number)
        time.sleep(0.001 * (number % 7))
        note("end", number)

    @dramalite.actor(max_retries=5, min_backoff=1, max_backoff=20)
    def second_time_lucky(number):
        retries = dramalite.CurrentMessage.get_current_message().options.get("retries", 0)
        note(f"try{retries}", number)
        if not retries:
            raise RuntimeError("The first time fails.")
"""

PRODUCER = """
    import sys
    import time
    import jobs

    first, count = int(sys.argv[1]), int(sys.argv[2])
    for number in range(first, first + count):
        jobs.job.send(number)
        jobs.second_time_lucky.send_with_options(args=(number,), delay=number % 5 or None)
        jobs.note("accepted", number)
        time.sleep(0.003)  # A producer's own pace.
"""


@pytest.fixture
def place(place):
    place.jobs(JOBS)
    return place


def restart_under_load(place, seed, *, restarts, messages, number=signal.SIGTERM):
    """Stop and start the worker tree at random moments while two producers send."""
    draw = random.Random(seed)
    senders = [place.start_script(PRODUCER, str(index * 100_000), str(messages)) for index in range(2)]
    for _ in range(restarts):
        tree = place.worker(processes=2)
        place.wait_until(tree.output, "the worker says that it is up")
        goal = len(place.notes("start")) + draw.randrange(0, 60)
        place.wait_until(lambda: len(place.notes("start")) >= goal or not place.waiting(), "some jobs run")
        let_pass(draw.uniform(0, 0.1))
        tree.signal(number)
        assert tree.wait() == 0, tree.tail()
        assert tree.pids() == []
    place.worker(processes=2)
    for sender in senders:
        assert sender.wait() == 0, sender.tail()
    place.drained()


def assert_each_ran_once(place, accepted):
    sent = place.runs("accepted")
    assert len(sent) == accepted
    for word in ("start", "end", "try0", "try1"):
        assert place.runs(word) == sent, word
    assert place.runs("try2") == {}
    assert place.dead() == 0
    assert place.sound()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.torture)], ids=["SIGTERM", "SIGINT"]
)
def test_restarts_under_load_lose_nothing_and_repeat_nothing(place, number):
    restart_under_load(place, seed=int(number), restarts=3, messages=100, number=number)

    assert_each_ran_once(place, 200)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(4))
def test_many_restarts_under_load_lose_nothing_and_repeat_nothing(place, seed):
    restart_under_load(place, seed, restarts=25, messages=3000)

    assert_each_ran_once(place, 6000)


def test_an_in_process_worker_can_be_stopped_and_started_again_and_again_under_load(place):
    place.script(
        """
        import threading
        import dramalite
        import jobs

        def produce():
            for number in range(400):
                jobs.job.send(number)
                jobs.note("accepted", number)

        producer = threading.Thread(target=produce)
        producer.start()
        rounds = 0
        while producer.is_alive() or rounds < 8:
            worker = dramalite.Worker(jobs.broker, worker_threads=3)
            worker.start()
            seen = jobs.noted("end")
            jobs.until(lambda: jobs.noted("end") >= min(seen + 20, 400) or not producer.is_alive())
            worker.stop()
            rounds += 1
        with dramalite.Worker(jobs.broker, worker_threads=3):
            jobs.broker.join("default", timeout=100_000)
        """
    )

    assert place.runs("start") == place.runs("end") == place.runs("accepted")
    assert (len(place.runs("accepted")), place.waiting()) == (400, 0)


def test_a_stop_while_many_are_claimed_hands_them_back_in_their_order(place):
    for number in range(0, 1050, 7):  # Each of them takes no time of its own.
        place.send("job", number)
    tree = place.worker(threads=1)
    place.wait_until(lambda: len(place.notes("start")) >= 10, "some jobs run")
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0
    place.worker(threads=1)
    place.drained()

    assert [int(note[1]) for note in place.notes("start")] == list(range(0, 1050, 7))
