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


@dataclass
class Member:
    """A process of a tree that is fully grown."""

    parent: Member | None
    """None for the runner, and for those whose parent is gone."""
    marked: bool
    in_session: bool
    then: str
    leads_group: bool = False
    children: list[Member] = field(default_factory=list)

    @property
    def is_runner(self) -> bool:
        """Whether it leads the session."""
        return self.in_session and self.leads_group and self.parent is None

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
    runner = Member(None, marked=True, in_session=True, then="stay", leads_group=True)
    members: dict[int, Member] = {}
    play(example.script, runner, members)
    fates = {number: tell_fate(member, example) for number, member in members.items()}
    return {**fates, 0: "ends"}


def play(script: Script, member: Member, members: dict[int, Member]) -> None:
    """Have a member do what its script says."""
    members[script["id"]] = member
    for step in script["steps"]:
        if isinstance(step, dict):
            child = Member(member, member.marked, member.in_session, step["fork"]["then"])
            member.children.append(child)
            play(step["fork"], child, members)
        elif step == "setsid" and not member.leads_group:
            member.in_session, member.leads_group = False, True
        elif step == "setpgid":
            member.leads_group = True
        elif step == "orphan":
            member.lose_children()
            member.parent, member.leads_group = None, False
        elif step == "reset":
            member.marked = False
    if member.then == "exit":
        member.lose_children()


def tell_fate(member: Member, example: Example) -> Fate:
    """Return the fate of a member other than the runner."""
    if example.ending == "success":
        return "ends" if member.then == "exit" else "lives"
    if example.early:
        # Of those that can be recognised by descent alone, some had lost their parents already, and others had not.
        return "ends" if keeps_a_sign(member) else "either"
    if member.then == "exit":
        return "ends"
    if not is_known(member, runner_lives=True):
        return "lives"  # it has opted out
    if not is_known(member, runner_lives=example.ending == "409"):
        return "either"
    # An unmarked heir descends from nobody.
    return "either" if member.then == "heir" and not member.marked else "ends"


def keeps_a_sign(member: Member) -> bool:
    """Tell whether a member, and all that it starts of its own accord, can be recognised whoever its parent is."""
    return member.marked or (member.in_session and member.then not in {"heir", "breed"})


def is_known(member: Member, *, runner_lives: bool) -> bool:
    """Tell whether a member belongs to the task by mark, session or descent."""
    if member.is_runner:
        return runner_lives
    if member.marked or member.in_session:
        return True
    return member.parent is not None and is_known(member.parent, runner_lives=runner_lives)
