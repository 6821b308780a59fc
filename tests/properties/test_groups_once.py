"""A group tells once that all its members have succeeded, and once that all have ended."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

import dramalite

from world import PATIENT, crashes, open_broker, places, retries, run_with, simulated, worlds


class Leaf(NamedTuple):
    """A message: it fails so often and then ends like this."""

    end: str = "ok"  # Or "dead", "skip", or "kill": its worker, at each attempt.
    fails: int = 0
    takes_ms: int = 0
    delay: int | None = None

    def succeeds(self):
        return self.end == "ok"


class Chain(NamedTuple):
    """A pipeline of leaves, or of leaves with groups between them."""

    steps: list

    def succeeds(self):
        return all(step.succeeds() for step in self.steps)


class Group(NamedTuple):
    children: list
    tells_success: bool
    tells_end: bool

    def succeeds(self):
        return all(child.succeeds() for child in self.children)


leaves = st.builds(
    Leaf,
    end=st.sampled_from(["ok", "ok", "ok", "ok", "dead", "skip"]),
    fails=st.sampled_from([0, 0, 1]),
    takes_ms=st.sampled_from([0, 0, 9]),
    delay=st.sampled_from([None, None, 20]),
)
chains = st.builds(Chain, st.lists(leaves, min_size=1, max_size=3))


flags = st.sampled_from([True, True, True, False])


def groups_of(members, min_size=0):
    return st.builds(Group, st.lists(members, min_size=min_size, max_size=3), flags, flags)


#: Groups of messages, of pipelines and of groups.
flat_groups = groups_of(leaves | chains)
nested_groups = groups_of(leaves | chains | flat_groups, min_size=1)
groups = flat_groups | nested_groups | groups_of(nested_groups | leaves)


def mixed_chains_of(leaves, min_groups=0):
    """Pipelines of messages with a group between each two."""
    chains = st.builds(Chain, st.lists(leaves, min_size=1, max_size=2))
    pairs = st.tuples(leaves, groups_of(leaves | chains, min_size=1))
    return st.builds(
        lambda pairs, last: Chain([step for pair in pairs for step in pair] + [last]),
        st.lists(pairs, min_size=min_groups, max_size=2),
        leaves,
    )


good_leaves = leaves.map(lambda leaf: leaf._replace(end="ok"))
mixed_chains = mixed_chains_of(leaves)
groups_of_mixed_chains = st.builds(
    Group, st.lists(mixed_chains, min_size=1, max_size=2), st.just(True), st.just(True)
)


class Plan:
    """A tree of messages, its numbers, and what is to come of it and what has."""

    def __init__(self, broker):
        self.broker = broker
        self.leaves = []  # By number.
        self.mended = set()  # Those that succeed from now on, whatever they did before.
        self.groups = []  # (the group, the numbers of its leaves).
        self.told = []  # (number of a group, what it told, the leaves that had succeeded by then).
        self.sim = None

        @dramalite.actor(broker=broker, throws=ArithmeticError, **PATIENT)
        def member(number, *received):
            leaf = self.leaves[number]
            dramalite.simulated_work(leaf.takes_ms)
            if retries() < leaf.fails:
                raise ValueError("not yet")
            if leaf.end == "kill":
                self.sim.crash()
            if leaf.end != "ok" and number not in self.mended:
                raise ArithmeticError if leaf.end == "dead" else dramalite.SkipMessage
            return [number, *received]

        @dramalite.actor(broker=broker, **PATIENT)
        def tell(number, what):
            done = {e.message.args[0] for e in self.sim.events if e.actor == "member" and e.outcome == "done"}
            self.told.append((number, what, done))

        self.member, self.tell = member, tell

    def build(self, node):
        """The message, pipeline or group of a node."""
        if isinstance(node, Leaf):
            self.leaves.append(node)
            options = {} if node.delay is None else {"delay": node.delay}
            return self.member.message_with_options(args=(len(self.leaves) - 1,), **options)
        if isinstance(node, Chain):
            return dramalite.pipeline([self.build(step) for step in node.steps], broker=self.broker)
        first = len(self.leaves)
        built = dramalite.group([self.build(child) for child in node.children], broker=self.broker)
        number = len(self.groups)
        self.groups.append((node, set(range(first, len(self.leaves)))))
        if node.tells_success:
            built.add_completion_callback(self.tell.message(number, "success"))
        if node.tells_end:
            built.add_completion_callback(self.tell.message(number, "end"), whatever=True)
        return built

    def expected(self):
        """What is to be told, each once, if all groups begin."""
        told = Counter()
        for number, (group, _leaves) in enumerate(self.groups):
            told[number, "success"] = int(group.tells_success and group.succeeds())
            told[number, "end"] = int(group.tells_end)
        return +told


def run(place, world, node, faults=()):
    """A plan that was run."""
    with open_broker(place) as broker:
        plan = Plan(broker)
        with dramalite.simulate(broker, **world) as plan.sim:
            plan.build(node).run()
            run_with(plan.sim, world, faults)
            assert broker.pending() == []
        return plan


def told(plan):
    """What was told how often; a crash may repeat the telling, so it counts when it has succeeded."""
    return Counter(tuple(e.message.args) for e in plan.sim.events if e.actor == "tell" and e.outcome == "done")


@simulated
@given(places, worlds, groups)
def test_a_group_tells_of_its_success_and_its_end_once_each(place, world, group):
    plan = run(place, world, group)

    assert Counter(entry[:2] for entry in plan.told) == plan.expected()


@simulated
@given(places, worlds, groups, crashes)
def test_crashes_neither_lose_nor_repeat_nor_hurry_what_a_group_tells(place, world, group, faults):
    plan = run(place, world, group, faults)

    assert told(plan) == plan.expected()
    for number, what, done in plan.told:
        assert what == "end" or plan.groups[number][1] <= done


resent = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=6)


@simulated
@given(places, worlds, groups, resent)
@example("memory", {}, Group([Leaf("dead"), Leaf("dead")], True, True), [(0, True), (0, True)])
@example("memory", {}, Group([Group([Leaf("dead")], True, True), Leaf("skip")], True, True), [(0, False), (0, True)])
def test_a_dead_member_that_is_sent_again_and_again_counts_once_and_once_it_succeeds(place, world, group, resent):
    with open_broker(place) as broker:
        plan = Plan(broker)
        with dramalite.simulate(broker, **world) as plan.sim:
            plan.build(group).run()
            plan.sim.run_until_idle(max_steps=5000)
            letters = list(broker.dead_letters)
            for index, succeeds in resent if letters else ():
                letter = letters[index % len(letters)]
                if succeeds:
                    plan.mended.add(letter.args[0])
                broker.enqueue(letter.copy(options={"retries": 0}))
                plan.sim.run_until_idle(max_steps=5000)

    good = {number for number, leaf in enumerate(plan.leaves) if leaf.succeeds() or number in plan.mended}
    wanted = Counter()
    for number, (group, leaves) in enumerate(plan.groups):
        wanted[number, "success"] = int(group.tells_success and leaves <= good)
        wanted[number, "end"] = int(group.tells_end)
    assert Counter(entry[:2] for entry in plan.told) == +wanted


@simulated
@given(places, worlds, groups | groups_of_mixed_chains)
@example("memory", {}, Group([Chain([Group([Leaf(), Leaf()], False, False), Leaf()])], True, True))
def test_the_end_is_told_when_nothing_of_the_group_is_left(place, world, group):
    plan = run(place, world, group)
    ended = {}  # By leaf: the index of its last event.
    for index, event in enumerate(plan.sim.events):
        if event.actor == "member":
            ended[event.message.args[0]] = index

    for index, event in enumerate(plan.sim.events):
        if event.actor == "tell":
            members = plan.groups[event.message.args[0]][1]
            assert all(ended[leaf] < index for leaf in members if leaf in ended)


@simulated
@given(places, worlds, st.lists(leaves, max_size=4), st.none() | st.integers(0, 30))
def test_members_start_after_the_longer_of_their_own_delay_and_the_groups(place, world, members, delay):
    with open_broker(place) as broker:
        plan = Plan(broker)
        with dramalite.simulate(broker, **world) as plan.sim:
            sent = broker.clock.time_ms()
            plan.build(Group(members, tells_success=True, tells_end=False)).run(delay=delay)
            plan.sim.run_until_idle()

    for event in plan.sim.events:
        if event.actor == "member" and event.attempt == 1:
            own = members[event.message.args[0]].delay
            assert event.started_ms >= sent + max(own or 0, delay or 0)


killers = leaves | st.just(Leaf("kill"))


@simulated
@given(places, groups_of(killers | st.builds(Chain, st.lists(killers, min_size=1, max_size=3)), min_size=1))
def test_a_member_that_kills_its_workers_has_ended_when_it_is_buried(place, group):
    with open_broker(place) as broker:
        plan = Plan(broker)
        plan.member.options["max_crashes"] = 2
        with dramalite.simulate(broker) as plan.sim:
            plan.build(group).run()
            plan.sim.run_until_idle(max_steps=5000)

    assert told(plan) == plan.expected()


def results_of_members(plan):
    return [e.result for e in plan.sim.events if e.actor == "member" and e.outcome == "done"]


@simulated
@given(places, worlds, mixed_chains_of(good_leaves, min_groups=1), crashes)
def test_the_step_after_a_group_gets_its_results_in_order_whatever_crashes(place, world, chain, faults):
    plan = run(place, world, chain, faults)

    assert results_of_members(plan)[-1] == expected_result(chain, 0, ())[0]


@simulated
@given(places, worlds, mixed_chains, crashes)
def test_a_step_before_or_after_a_group_runs_once_and_only_if_all_before_succeed(place, world, chain, faults):
    plan = run(place, world, chain, faults)
    numbers = [number for number, *_received in results_of_members(plan)]

    assert len(numbers) == len(set(numbers))
    assert (len(plan.leaves) - 1 in numbers) == chain.succeeds()


@simulated
@given(places, worlds, groups_of_mixed_chains)
def test_a_group_of_pipelines_with_groups_tells_of_its_success_once(place, world, group):
    plan = run(place, world, group)

    assert told(plan)[len(plan.groups) - 1, "success"] == int(group.succeeds())


@settings(simulated, phases=[Phase.explicit, Phase.generate])  # No better example is needed.
@given(places, worlds, groups_of_mixed_chains)
@example("memory", {}, Group([Chain([Leaf("dead"), Group([Leaf()], False, False)])], True, True))
@example("memory", {}, Group([Chain([Group([Leaf("dead")], False, False), Leaf()])], True, True))
def test_a_group_of_pipelines_with_groups_tells_of_its_end_once(place, world, group):
    plan = run(place, world, group)

    assert told(plan)[len(plan.groups) - 1, "end"] == 1


def expected_result(node, number, received):
    """What a node returns where its first leaf has this number, and the number of the leaf after it."""
    if isinstance(node, Leaf):
        return [number, *received], number + 1
    if isinstance(node, Group):
        results = []
        for child in node.children:
            result, number = expected_result(child, number, received)
            results.append(result)
        return results, number
    for step in node.steps:
        result, number = expected_result(step, number, received)
        received = (result,)
    return result, number
