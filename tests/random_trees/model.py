"""Who may live when a task ends, told from the script of its tree alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tests.random_trees.examples import Example, Outcome, Script

Fate = Literal["ends", "lives", "either"]

OVERTIME = 1.0
"""Seconds that a kill may last longer than its grace."""
SLACK = 6.0
"""Seconds that a busy machine may add."""


class Session:
    """Is told from others by being another one."""


class Mark:
    """What a leader gives to all that it starts; likewise."""


TASK = Mark()
"""That of the tree's runner."""
ORIGIN = Mark()
"""What tells that runner's supervisor."""


@dataclass
class Member:
    """A process of a tree that is fully grown."""

    parent: Member | None
    """None for the runner, and for those whose parent is gone."""
    session: Session
    mark: Mark | None
    """None if it has lifted the limit."""
    mark_around: Mark | None
    origin: Mark
    then: str
    leads_group: bool = False
    limited: bool = False
    """Whether it has set the limit of the mark for itself."""
    has_opted_out: bool = False
    """Whether it, or whoever has forked it, was without any mark for a while."""
    emptied: bool = False
    """Whether it has gone on in an empty environment, which is without the SDK."""
    children: list[Member] = field(default_factory=list)

    @property
    def marked(self) -> bool:
        """Whether it can be told by itself for the task's."""
        return bool({TASK, ORIGIN} & self.marks)

    @property
    def own_mark(self) -> Mark | None:
        """Return what it shares with all of the innermost tree."""
        return self.origin if self.limited else self.mark

    @property
    def marks(self) -> set[Mark]:
        """Return what it carries: whoever has no mark of its own has left the tree around, too."""
        return (
            {self.mark, *filter(None, [self.mark_around])}
            if self.mark
            else set(filter(None, [self.own_mark]))
        )

    def fork(self, then: str) -> Member:
        """Return a child, which has all that it inherits."""
        child = dataclasses.replace(self, parent=self, then=then, leads_group=False, children=[])
        self.children.append(child)
        return child

    def lead_inner_tree(self) -> None:
        """Take a mark of its own, and keep that of the tree around it."""
        self.mark, self.mark_around, self.limited = Mark(), self.mark, False

    def lose_children(self) -> None:
        """Leave them to init."""
        for child in self.children:
            child.parent = None
        self.children = []


def find_faults(example: Example, outcome: Outcome) -> list[str]:
    """Return what must not have happened, in words."""
    faults = [f"{name} was harmed" for name in outcome.harmed]
    if outcome.hung:
        return [*faults, f"the supervisor hangs, {outcome.alive} are alive"]
    if outcome.exception:
        faults.append(f"the supervisor died of {outcome.exception}")
    for member, fate in tell_fates(example).items():
        if fate == "ends" and member in outcome.alive:
            faults.append(f"member {member} is left")
        if fate == "lives" and member not in outcome.alive:
            faults.append(f"member {member} was harmed")
    if not example.succeeds:
        limit = example.grace if example.polite else example.grace + OVERTIME + SLACK
        if outcome.seconds > limit:
            faults.append(f"it took {outcome.seconds:.2f} s instead of {limit:.2f} s at the most")
    return faults


def tell_fates(example: Example) -> dict[int, Fate]:
    """Return the fate of each member, and of what it starts of its own accord; the runner is 0."""
    runner = Member(None, Session(), TASK, None, ORIGIN, then="stay", leads_group=True)
    members: dict[int, Member] = {}
    inner: list[InnerTask] = []
    play(example.script, runner, members, inner)
    runs = {number: member for number, member in members.items() if member.then != "exit" and number}
    known = find_known({**runs, 0: runner}, {TASK, ORIGIN}, runner)
    # A supervisor remembers whom it has seen when the runner was there, and so does a watchdog.
    looks_in_time = example.ending in {"409", "orphaned"}
    known_after = known if looks_in_time else find_known(runs, {TASK, ORIGIN}, runner)
    fates = {
        number: tell_fate(member, example, known=number in known, surely=number in known_after)
        for number, member in members.items()
    }
    if not example.succeeds:
        reached = set(known)
        # A supervisor precedes those that its task starts.
        for task in sorted(inner, key=lambda task: task.supervisor):
            # It may end what nobody else can tell for the task's, or be killed before it has.
            if task.supervisor in reached:
                reached |= find_known(runs, task.marks, task.runner)
        for number in reached:
            fates[number] = "either" if fates[number] == "lives" else fates[number]
    return {**fates, 0: "ends"}


@dataclass
class InnerTask:
    """A task that a member supervises."""

    supervisor: int
    runner: Member
    marks: set[Mark]


def play(script: Script, member: Member, members: dict[int, Member], inner: list[InnerTask]) -> None:
    """Have a member do what its script says."""
    members[script["id"]] = member
    for step in script["steps"]:
        if isinstance(step, dict):
            play(step["fork"], member.fork(step["fork"]["then"]), members, inner)
        else:
            take_step(step, member)
    if "inner" in script:
        runner = member.fork(script["inner"]["then"])
        # Without the SDK it is just forked.
        if not member.emptied:
            runner.session, runner.leads_group, runner.origin = Session(), True, Mark()
            runner.lead_inner_tree()
            inner.append(InnerTask(script["id"], runner, {*filter(None, [runner.mark]), runner.origin}))
        play(script["inner"], runner, members, inner)
    if member.then == "exit":
        member.lose_children()


def take_step(step: str, member: Member) -> None:
    """Have a member take one of STEPS."""
    if step == "setsid" and not member.leads_group:
        member.session, member.leads_group = Session(), True
    elif step == "setpgid":
        member.leads_group = True
    elif step == "orphan":
        member.lose_children()
        member.parent, member.leads_group = None, False
    elif step in {"reset", "limit"}:
        member.mark, member.limited = None, step == "limit"
        member.has_opted_out |= step == "reset"
    elif step == "nest":
        member.lead_inner_tree()
    elif step == "empty":
        member.emptied = True


def find_known(alive: dict[int, Member], marks: set[Mark], runner: Member) -> set[int]:
    """Return the members that belong to a task by mark, session or descent, or are tied so to one that does."""
    ids = {id(member): number for number, member in alive.items()}
    marks, sessions, known = set(marks), {runner.session}, {ids[id(runner)]} if id(runner) in ids else set()
    while found := {
        number
        for number, member in alive.items()
        if number not in known
        and (member.marks & marks or member.session in sessions or ids.get(id(member.parent)) in known)
    }:
        known |= found
        marks |= {mark for number in known if (mark := alive[number].own_mark)}
        sessions |= {alive[number].session for number in known}
    return known


def tell_fate(member: Member, example: Example, *, known: bool, surely: bool) -> Fate:
    """Return the fate of a member other than the runner.

    `known`: whether it belongs to the task while the runner lives; `surely`: also when the task is looked at.
    """
    if example.succeeds:
        return "ends" if member.then == "exit" else "lives"
    if example.early:
        # Some that can be recognised by descent or session alone had lost their parents, or were started while their
        # session mates were ended; others were not. Whoever lifts the limit has no sign until it sets another one.
        return "ends" if member.marked and not member.has_opted_out else "either"
    if member.then == "exit":
        return "ends"
    if not known:
        return "lives"  # it has opted out
    if not surely:
        return "either"
    # An unmarked heir descends from nobody.
    return "either" if member.then == "heir" and not member.marked else "ends"
