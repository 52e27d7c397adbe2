"""What is tried: random scripts of trees, moments and ways to end them; and what the driver tells of each."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Union, get_args

from hypothesis import strategies as st

from tests.random_trees.member import ENDS, STEPS, count_members, list_children

if TYPE_CHECKING:
    from typing_extensions import NotRequired

Ending = Literal["409", "killed", "exit-1", "success", "orphaned", "success-orphaned"]
"""The last two: the supervisor is killed, when the task runs or when it has succeeded."""
Step = Union[str, dict[str, "Script"]]

# Polite trees are gone long before the grace ends, deaf ones at its end.
POLITE_GRACE = 10.0
DEAF_GRACE = 0.2

IMPOLITE = {"deaf", "breed"}

OWN_WORDS = ["reset", "limit", "deaf"]
"""Steps of a runner."""

MAX_STEPS = 4
MAX_LEAVES = 5
MAX_EARLY = 4

MAY_BE_STOPPED: set[Ending] = {"409", "killed", "orphaned"}
"""A runner that is stopped does not end by itself."""


class Script(TypedDict):
    """What a process does, for member.py; that of the runner has the id 0."""

    id: int
    steps: list[Step]
    then: str
    inner: NotRequired[Script]
    """Of the runner of a task that it supervises."""


@dataclass(frozen=True)
class Example:
    """A tree and how it ends. `early`: how many of its members need not have grown up by then."""

    script: Script
    ending: Ending
    early: int = 0

    @property
    def polite(self) -> bool:
        """Whether SIGTERM ends every member."""
        # Only the leftovers are asked to continue, and whoever lost the supervisor.
        waits = self.ending == "409" and self.script["then"] == "stop"
        return not waits and not IMPOLITE & set(list_words(self.script))

    @property
    def succeeds(self) -> bool:
        """Whether what the task leaves is to stay."""
        return self.ending in {"success", "success-orphaned"}

    @property
    def grace(self) -> float:
        """Return the seconds between SIGTERM and SIGKILL."""
        return POLITE_GRACE if self.polite else DEAF_GRACE

    def dump(self) -> str:
        """Return what the driver takes, and `load_example`."""
        fields = {"script": self.script, "ending": self.ending, "early": self.early, "grace": self.grace}
        return json.dumps(fields)


@dataclass(frozen=True)
class Outcome:
    """What the driver saw when the supervisor returned, or was found to hang."""

    hung: bool
    alive: list[int]
    """Members of the task's tree."""
    harmed: list[str]
    """Bystanders that are dead or stopped."""
    seconds: float
    """From the 409, the order to exit or SIGKILL to the return."""
    exception: str | None = None


def load_example(text: str) -> Example:
    """Return an example that was dumped."""
    fields: dict[str, Any] = json.loads(text)
    return Example(fields["script"], fields["ending"], fields["early"])


def list_words(script: Script) -> list[str]:
    """Return the steps and ends of a script and of all that it forks."""
    words = [script["then"], *(step for step in script["steps"] if isinstance(step, str))]
    return [*words, *(word for child in list_children(script) for word in list_words(child))]


def number_members(script: Script, first: int = 0) -> Script:
    """Return the script with an id for each member."""
    steps: list[Step] = []
    following = first + 1
    for step in script["steps"]:
        if isinstance(step, dict):
            steps.append({"fork": number_members(step["fork"], following)})
            following += count_members(step["fork"])
        else:
            steps.append(step)
    numbered: Script = {"id": first, "steps": steps, "then": script["then"]}
    if "inner" in script:
        numbered["inner"] = number_members(script["inner"], following)
    return numbered


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """Draw an example. A runner stays in its session, and waits for its end."""
    # Deafness anywhere makes the whole tree wait for the end of the grace: half of them go without.
    avoided = draw(st.sampled_from([set(), IMPOLITE]))
    words = st.sampled_from([word for word in [*STEPS, "empty"] if word not in avoided])
    ends = st.sampled_from([end for end in ENDS if end not in avoided])
    leaves = build_script(st.lists(words, max_size=MAX_STEPS), ends)

    own = st.sampled_from([word for word in OWN_WORDS if word not in avoided])

    def nest(children: st.SearchStrategy[Script]) -> st.SearchStrategy[Script]:
        steps = st.lists(words | fork(children), min_size=1, max_size=MAX_STEPS)
        inner = build_runner(children, own, st.sampled_from(["stay", "stop"]))
        return build_script(steps, ends) | supervise(st.lists(words, max_size=MAX_STEPS), inner)

    members = st.recursive(leaves, nest, max_leaves=MAX_LEAVES)
    ending = draw(st.sampled_from(get_args(Ending)))
    stops = draw(st.booleans()) and ending in MAY_BE_STOPPED
    if stops:
        # Nobody can tell what a runner leads that has left its own tree, and cannot say so either.
        own = own.filter(lambda word: word != "reset")
    script = number_members(draw(build_runner(members, own, st.just("stop" if stops else "stay"))))
    example = Example(script, ending)
    if example.succeeds:
        return example
    return replace(example, early=draw(st.integers(0, min(MAX_EARLY, count_members(script) - 1))))


def build_runner(
    members: st.SearchStrategy[Script], own: st.SearchStrategy[str], ends: st.SearchStrategy[str]
) -> st.SearchStrategy[Script]:
    """Draw the script of a runner, not numbered yet."""
    return build_script(st.lists(fork(members) | own, min_size=1, max_size=MAX_STEPS), ends)


def supervise(
    steps: st.SearchStrategy[list[Step]], runner: st.SearchStrategy[Script]
) -> st.SearchStrategy[Script]:
    """Draw the script of a member that supervises a task itself."""

    def build(steps: list[Step], inner: Script) -> Script:
        return {"id": 0, "steps": steps, "then": "supervise", "inner": inner}

    return st.builds(build, steps, runner)


def build_script(
    steps: st.SearchStrategy[list[Step]], ends: st.SearchStrategy[str]
) -> st.SearchStrategy[Script]:
    """Draw the script of a member, not numbered yet."""
    return st.builds(lambda steps, then: {"id": 0, "steps": steps, "then": then}, steps, ends)


def fork(scripts: st.SearchStrategy[Script]) -> st.SearchStrategy[Step]:
    """Draw the step that starts a member."""
    return scripts.map(lambda script: {"fork": script})
