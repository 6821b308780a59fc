"""Jobs that kill their process: parked after some deaths, while all others are done."""

from __future__ import annotations

import re
from collections import Counter

import dramalite
import pytest
from harness import wait_until

JOBS = """
    import ctypes

    def leave():
        os._exit(7)

    def segfault():
        ctypes.string_at(0)

    def kill_itself():
        os.kill(os.getpid(), signal.SIGKILL)

    def abort():
        os.abort()

    DEATHS = {"leave": leave, "segfault": segfault, "kill": kill_itself, "abort": abort}

    @dramalite.actor(max_retries=0)
    def poison(kind):
        note("poison", kind, os.getpid())
        DEATHS[kind]()

    @dramalite.actor(max_retries=0, on_crash="fail")
    def never_twice(kind):
        note("never_twice", kind)
        DEATHS[kind]()

    @dramalite.actor(max_retries=0, on_crash="fail")
    def once(number, kills):
        note("once", number)
        if kills:
            kill_itself()


    @dramalite.actor(max_retries=0, max_crashes=1)
    def one_more_chance(kind):
        note("one_more_chance", kind)
        DEATHS[kind]()

    @dramalite.actor(max_retries=0)
    def innocent(number, seconds=0.0):
        note("start", number)
        if seconds:
            time.sleep(seconds)
        note("end", number)

    @dramalite.actor(max_retries=0)
    def dies_twice(number):
        note("dies_twice", number)
        if noted("dies_twice") <= 2:
            os._exit(1)
        note("survived", number)
"""

#: A worker without a supervisor; the test starts it again as often as it dies.
LONE_WORKER = """
    import dramalite
    import jobs

    with dramalite.Worker(jobs.broker, worker_threads=2):
        jobs.until(lambda: False, 60)  # Works until it is killed.
"""


@pytest.fixture
def place(place):
    place.jobs(JOBS)
    return place


def dead_letter_texts(place):
    """All that is stored about each dead letter, as text, the message included."""
    return ["\n".join(str(value) for value in row) for row in place.query("SELECT * FROM dramalite_dead")]


#: Sends, and has one such worker after the other, each in a fork, as if a supervisor started them again.
RESTARTED = """
    import os, sys, textwrap
    import dramalite
    import jobs

    most, sending = int(sys.argv[1]), textwrap.dedent(sys.argv[2])
    for number in range(1 + most):
        child = os.fork()
        if child == 0 and number == 0:
            exec(sending)
            sys.exit()
        if child == 0:
            with dramalite.Worker(jobs.broker, worker_threads=2):
                jobs.until(lambda: False, 60)  # Works until it is killed.
        status = os.waitpid(child, 0)[1]
        assert number or status == 0, f"Nothing was sent: {status}."
        jobs.note("sent")
"""


def restart_until_drained(place, most, sending):
    """Send, then run lone workers one after the other until nothing is left."""
    tree = place.start_script(RESTARTED, str(most), sending)
    place.wait_until(lambda: place.notes("sent") or not tree.alive(), "the messages are sent")
    place.wait_until(lambda: not tree.alive() or place.waiting() == 0, "the workers die or are done", 20.0 * most)
    assert tree.alive(), f"Still {place.waiting()} messages after {most} workers.\n{place.story()}"
    tree.kill_all()


@pytest.mark.parametrize(
    "kind", ["segfault", *(pytest.param(kind, marks=pytest.mark.torture) for kind in ("leave", "kill", "abort"))]
)
def test_a_message_that_kills_its_process_three_times_is_parked(place, kind):
    restart_until_drained(place, 6, f"jobs.poison.send({kind!r}); [jobs.innocent.send(n) for n in range(5)]")

    assert place.runs("poison") == {kind: 3}
    assert place.dead() == 1
    assert place.runs("end").keys() == {str(number) for number in range(5)}
    [letter] = place.dead_letters()
    assert (letter.actor_name, letter.args) == ("poison", (kind,))
    assert re.search(r"died|crash|killed", dead_letter_texts(place)[0])


def test_the_supervisor_outlives_all_kinds_of_poison_and_the_rest_goes_on(place):
    place.script(
        """
        import jobs
        for kind in ("leave", "segfault", "kill", "abort"):
            jobs.one_more_chance.send(kind)
            for number in range(5):
                jobs.innocent.send(f"{kind}-{number}", 0.01)
        """
    )
    tree = place.worker(processes=2, threads=2)
    place.drained()
    place.script("import jobs; jobs.innocent.send('afterwards')")
    place.wait_until(lambda: place.notes("end", "afterwards"), "the worker still works")

    assert place.dead() == 4
    assert sorted(letter.args[0] for letter in place.dead_letters()) == ["abort", "kill", "leave", "segfault"]
    assert len(place.runs("end")) == 21
    assert tree.alive()


def test_the_reason_names_the_signal_or_exit_code(place):
    place.script("import jobs; jobs.never_twice.send('segfault'); jobs.never_twice.send('leave')")
    place.worker(processes=1, threads=1)
    place.drained()

    texts = {kind: text for text in dead_letter_texts(place) for kind in ("segfault", "leave") if f'"{kind}"' in text}
    assert re.search(r"SIGSEGV|signal 11", texts["segfault"]), texts
    assert re.search(r"exit (code|status) 7|code 7|status 7", texts["leave"]), texts


def test_an_actor_that_must_never_run_twice_is_parked_at_its_first_crash(place):
    restart_until_drained(place, 3, "jobs.never_twice.send('kill'); jobs.innocent.send(1)")

    assert place.runs("never_twice") == {"kill": 1}
    assert [letter.actor_name for letter in place.dead_letters()] == ["never_twice"]
    assert place.runs("end").keys() == {"1"}


ONE_THREAD = LONE_WORKER.replace("worker_threads=2", "worker_threads=1")


def test_a_message_that_must_never_run_twice_does_not_if_its_worker_dies_right_after_it(place):
    place.script(
        """
        import jobs
        jobs.broker.enqueue_many([jobs.once.message(number, number == 40) for number in range(60)])
        """
    )
    place.start_script(ONE_THREAD).wait()
    place.start_script(ONE_THREAD)
    place.drained()

    assert place.runs("once") == {str(number): 1 for number in range(60)}


#: A lone worker that fails to write the first outcome, as on a full disk, and is killed as it writes it again.
FAILS_TO_WRITE = """
    import os, signal
    import dramalite

    exchange, failed = dramalite._Engine.exchange, []

    def fail_once(engine, slot, outcomes, *options):
        if outcomes and failed:
            os.kill(os.getpid(), signal.SIGKILL)
        if outcomes:
            failed.append(1)
            raise dramalite.BrokerError("database or disk is full")
        return exchange(engine, slot, outcomes, *options)

    dramalite._Engine.exchange = fail_once
""" + ONE_THREAD


def test_a_message_that_must_never_run_twice_does_not_if_its_worker_dies_before_it_could_write_that(place):
    place.script("import jobs; jobs.once.send(1, False)")
    assert place.start_script(FAILS_TO_WRITE).wait() == -9
    place.start_script(ONE_THREAD)
    place.drained()

    assert place.runs("once") == {"1": 1}
    assert place.dead() == 1


def test_a_worker_of_many_coroutines_that_died_is_blamed_for_nothing_that_it_had_not_begun(place):
    place.script(
        """
        import jobs
        jobs.broker.enqueue_many([jobs.once.message(number, number == 40) for number in range(200)])
        """
    )
    place.start_script(ONE_THREAD.replace("worker_threads=1", "worker_threads=1, async_concurrency=400")).wait()
    place.start_script(ONE_THREAD)
    place.drained()

    assert [letter.args for letter in place.dead_letters()] == [(40, True)]


def test_innocents_claimed_together_with_poison_are_not_blamed(place):
    restart_until_drained(
        place,
        15,
        """
        for number in range(100):
            jobs.innocent.send(number)
            if number in (35, 36):
                jobs.poison.send("kill")
        """,
    )

    assert Counter(letter.actor_name for letter in place.dead_letters()) == {"poison": 2}
    assert place.runs("end").keys() == {str(number) for number in range(100)}


def test_a_job_that_was_running_beside_poison_is_not_blamed(place):
    # The neighbour takes long enough to be there whenever the poison strikes.
    restart_until_drained(place, 8, "jobs.poison.send('kill'); jobs.innocent.send('neighbour', 0.6)")

    assert [letter.actor_name for letter in place.dead_letters()] == ["poison"]
    assert place.runs("end").keys() == {"neighbour"}


def test_a_message_that_survives_its_last_chance_is_done(place):
    restart_until_drained(place, 4, "jobs.dies_twice.send(1)")

    assert place.runs("survived") == {"1": 1}
    assert place.dead() == 0


def test_the_limit_can_be_set_for_the_whole_broker(place):
    place.jobs(JOBS)
    source = (place.folder / "jobs.py").read_text()
    (place.folder / "jobs.py").write_text(source.replace("SQLiteBroker(", "SQLiteBroker(max_crashes=2, path=", 1))
    restart_until_drained(place, 4, "jobs.poison.send('leave')")

    assert place.runs("poison") == {"leave": 2}
    assert place.dead() == 1


class ExitsOverTheDead(dramalite.Middleware):
    """Raises what is no Exception, as sys.exit() does, when it hears of a message that died with its worker."""

    def after_process_message(self, broker, message, *, result=None, exception=None):
        if isinstance(exception, dramalite.WorkerCrashed):
            raise SystemExit


def test_a_hook_that_exits_over_a_dead_workers_message_does_not_end_the_worker(place, make_file_broker, worker):
    broker = make_file_broker(durability="normal", middleware=[ExitsOverTheDead()])
    dramalite.actor(lambda kind: None, actor_name="never_twice", broker=broker)
    survived = []
    dramalite.actor(survived.append, actor_name="dies_twice", broker=broker)
    place.script("import jobs; jobs.never_twice.send('kill')")
    assert place.start_script(LONE_WORKER).wait() == -9
    worker(broker)
    wait_until(lambda: place.dead() == 1, "the dead worker's message is a dead letter")
    place.send("dies_twice", 1)

    wait_until(lambda: survived, "the worker goes on")


@pytest.mark.torture
@pytest.mark.parametrize("kind", ["leave", "segfault", "kill", "abort"])
def test_the_supervisor_parks_three_time_killers_and_comes_back_each_time(place, kind):
    place.script(f"import jobs; [jobs.poison.send({kind!r}) for _ in range(3)]; [jobs.innocent.send(n) for n in range(200)]")
    tree = place.worker(processes=2, threads=2)
    place.drained(300)

    # Two that run side by side die together, and one death counts for both.
    assert 3 <= place.runs("poison")[kind] <= 9
    assert place.dead() == 3
    assert len(place.runs("end")) == 200
    assert tree.alive()
