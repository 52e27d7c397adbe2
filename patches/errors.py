"""The one exception for what the user can set right."""

from __future__ import annotations


class PatchError(Exception):
    """Says what is wrong and what to do about it, in one sentence per argument."""

    @property
    def sentences(self) -> tuple[str, ...]:
        """The arguments."""
        return self.args

    def __str__(self) -> str:
        """Give one sentence per line."""
        return "\n".join(self.sentences)
