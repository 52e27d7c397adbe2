"""Who may live when a task ends, told from the script of its tree alone."""

from __future__ import annotations

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


@dataclass
class Member:
    """A process of a tree that is fully grown."""

    parent: Member | None
    """None for the runner, and for those whose parent is gone."""
    session: Session
    mark: Mark | None
    """None if it has lifted the limit."""
    mark_around: Mark | None
    then: str
    leads_group: bool = False
    children: list[Member] = field(default_factory=list)

    @property
    def marked(self) -> bool:
        """Whether it can be told by itself for the task's."""
        return TASK in self.marks

    @property
    def marks(self) -> set[Mark]:
        """Return what it carries: whoever has no mark of its own has left the tree around, too."""
        return set(filter(None, [self.mark, self.mark_around])) if self.mark else set()

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
    if example.ending != "success":
        limit = example.grace if example.polite else example.grace + OVERTIME + SLACK
        if outcome.seconds > limit:
            faults.append(f"it took {outcome.seconds:.2f} s instead of {limit:.2f} s at the most")
    return faults


def tell_fates(example: Example) -> dict[int, Fate]:
    """Return the fate of each member, and of what it starts of its own accord; the runner is 0."""
    runner = Member(None, Session(), TASK, None, then="stay", leads_group=True)
    members: dict[int, Member] = {}
    play(example.script, runner, members)
    known = find_known(members, runner_lives=True)
    known_after = known if example.ending == "409" else find_known(members, runner_lives=False)
    fates = {
        number: tell_fate(member, example, members[0], known=number in known, surely=number in known_after)
        for number, member in members.items()
    }
    return {**fates, 0: "ends"}


def play(script: Script, member: Member, members: dict[int, Member]) -> None:
    """Have a member do what its script says."""
    members[script["id"]] = member
    for step in script["steps"]:
        if isinstance(step, dict):
            then = step["fork"]["then"]
            child = Member(member, member.session, member.mark, member.mark_around, then)
            member.children.append(child)
            play(step["fork"], child, members)
        elif step == "setsid" and not member.leads_group:
            member.session, member.leads_group = Session(), True
        elif step == "setpgid":
            member.leads_group = True
        elif step == "orphan":
            member.lose_children()
            member.parent, member.leads_group = None, False
        elif step == "reset":
            member.mark = None
        elif step == "nest":
            member.mark, member.mark_around = Mark(), member.mark
    if member.then == "exit":
        member.lose_children()


def find_known(members: dict[int, Member], *, runner_lives: bool) -> set[int]:
    """Return the members that belong to the task by mark, session or descent, or are tied so to one that does."""
    runner = members[0]
    alive = {number: member for number, member in members.items() if member.then != "exit" and number}
    if runner_lives:
        alive[0] = runner
    marks, sessions, known = {TASK}, {runner.session}, {0} & set(alive)
    ids = {id(member): number for number, member in members.items()}
    while found := {
        number
        for number, member in alive.items()
        if number not in known
        and (member.marks & marks or member.session in sessions or ids.get(id(member.parent)) in known)
    }:
        known |= found
        marks |= {mark for number in known if (mark := alive[number].mark)}
        sessions |= {alive[number].session for number in known}
    return known


def tell_fate(member: Member, example: Example, runner: Member, *, known: bool, surely: bool) -> Fate:
    """Return the fate of a member other than the runner.

    `known`: whether it belongs to the task while the runner lives; `surely`: also when the task is looked at.
    """
    if example.ending == "success":
        return "ends" if member.then == "exit" else "lives"
    if example.early:
        # Of those that can be recognised by descent alone, some had lost their parents already, and others had not.
        return "ends" if keeps_a_sign(member, runner) else "either"
    if member.then == "exit":
        return "ends"
    if not known:
        return "lives"  # it has opted out
    if not surely:
        return "either"
    # An unmarked heir descends from nobody.
    return "either" if member.then == "heir" and not member.marked else "ends"


def keeps_a_sign(member: Member, runner: Member) -> bool:
    """Tell whether a member, and all that it starts of its own accord, can be recognised whoever its parent is."""
    return member.marked or (member.session is runner.session and member.then not in {"heir", "breed"})
