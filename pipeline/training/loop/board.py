"""The message board between workers and driver: figures one way, stop requests the other.

``ray.train.report`` could carry the figures, but each call is a barrier for all workers until Ray's
controller polls, every two seconds by default.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Line = dict[str, Any]


@dataclass
class News:
    """What is new since the last poll.

    Attributes:
        attempt: how often workers have been started.
        step: updates done when they started last.
        lines: new figures; if ``attempt`` is new, all figures since the start of the run.
        notes: new messages for the user.
    """

    attempt: int = 0
    step: int = 0
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Board:
    """Collects figures and messages; lives in the driver's process if that trains, else in an actor."""

    def __init__(self) -> None:
        self._attempt = 0
        self._step = 0
        self._lines: list[Line] = []
        self._notes: list[str] = []
        self._stop = ""

    def begin(self, step: int, lines: list[Line]) -> None:
        """Record that workers start from the checkpoint of a step (0: none) with these figures."""
        self._attempt += 1
        self._step = step
        self._lines = list(lines)

    def add(self, line: Line) -> None:
        """Add a line of figures."""
        self._lines.append(line)

    def note(self, text: str) -> None:
        """Add a message for the user."""
        self._notes.append(text)

    def stop(self, reason: str) -> None:
        """Ask the workers to write a checkpoint and stop."""
        self._stop = reason

    def stop_reason(self) -> str:
        """Why the workers should stop, or an empty string."""
        return self._stop

    def news(self, attempt: int, lines: int, notes: int) -> News:
        """What is new for a reader that has seen so many lines of an attempt, and so many notes."""
        seen = lines if attempt == self._attempt else 0
        return News(self._attempt, self._step, self._lines[seen:], self._notes[notes:])


class BoardLost(Exception):
    """The board cannot be reached."""


class BoardLink:
    """Calls a board in this process or in an actor."""

    def __init__(self, board: Any) -> None:
        self._board = board

    @classmethod
    def start(cls, *, in_process: bool) -> BoardLink:
        """Create a board in this process, or as an actor on this node."""
        if in_process:
            return cls(Board())
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Pin it to the driver's node: others may be preempted.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return cls(ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote())

    def tell(self, method: str, *arguments: Any) -> None:
        """Call ``begin``, ``add``, ``note`` or ``stop`` without waiting."""
        if isinstance(self._board, Board):
            getattr(self._board, method)(*arguments)
        else:
            getattr(self._board, method).remote(*arguments)

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call ``news`` or ``stop_reason``.

        Raises:
            BoardLost: it cannot be reached.
        """
        if isinstance(self._board, Board):
            return getattr(self._board, method)(*arguments)
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get(getattr(self._board, method).remote(*arguments), timeout=30)
        except RayError as error:
            raise BoardLost(str(error)) from error
