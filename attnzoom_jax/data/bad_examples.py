"""Training examples that cannot be read: stop, or leave them out and count them.

What stands in for such an example is the next one that can be read. So the global batch stays a
pure function of (seed, step), whatever process or thread reads it.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from attnzoom_jax.data.source import Source
from attnzoom_jax.errors import unknown_name

CHOICES = ("stop", "skip")
ALLOWED = 0.01  # of a split, but at least
FEW = 10


def watch_examples(source: Source, on_bad_example: str) -> Source:
    """A source that does with unreadable examples as the config says.

    Args:
        source: whose examples raise a ValueError where they cannot be read.
        on_bad_example: "stop": raise it; "skip": print it, and give the next readable example.

    Returns:
        The source; with "skip", `examples.left_out` holds the positions that were left out so far.
        When they are more than 1 % of the split, and more than 10, a ValueError is raised.

    Raises:
        ValueError: unknown choice.
    """
    if on_bad_example not in CHOICES:
        raise unknown_name("data.on_bad_example", on_bad_example, CHOICES)
    if on_bad_example == "stop":
        return source
    return dataclasses.replace(source, examples=StandIns(source.examples, source.name))


def left_out(source: Source) -> list[int]:
    """The positions of the examples that were left out so far, in order."""
    return sorted(source.examples.left_out) if isinstance(source.examples, StandIns) else []


@dataclasses.dataclass(frozen=True)
class StandIns(Sequence[dict[str, Any]]):
    """Examples, with the next readable one in the place of each that is not."""

    examples: Sequence[dict[str, Any]]
    name: str
    left_out: set[int] = dataclasses.field(default_factory=set)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        position = range(len(self))[index]
        while True:
            try:
                return self.examples[position]
            except ValueError as error:
                self._leave_out(position, error)
            position = (position + 1) % len(self)

    def _leave_out(self, position: int, error: ValueError) -> None:
        is_new = position not in self.left_out
        self.left_out.add(position)
        if len(self.left_out) > max(FEW, ALLOWED * len(self)) or len(self.left_out) == len(self):
            raise ValueError(
                f"{len(self.left_out)} of the {len(self)} examples of {self.name} cannot be read, "
                f"too many to leave out; prepare the data set anew (the last one: {error})"
            ) from error
        if is_new:
            print(f"left out: {error}", file=sys.stderr, flush=True)
