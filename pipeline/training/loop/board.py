"""Where workers and driver meet while a run is under way: figures one way, the wish to stop the other.

``ray.train.report`` would do for the figures, but each call of it is a barrier for all workers that waits
until Ray's controller polls, every two seconds by default.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Line = dict[str, Any]


@dataclass
class News:
    """What has happened since somebody last looked.

    Attributes:
        attempt: counts the starts of the workers.
        step: updates that had been done when they started.
        lines: figures; all of them since the start of the run if ``attempt`` is a new one.
        notes: texts for the user.
    """

    attempt: int = 0
    step: int = 0
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Board:
    """Kept in the driver's process, or in an actor for workers of their own."""

    def __init__(self) -> None:
        self._attempt = 0
        self._step = 0
        self._lines: list[Line] = []
        self._notes: list[str] = []
        self._stop = ""

    def begin(self, step: int, lines: list[Line]) -> None:
        """Workers start, from the checkpoint of a step (0: from none) that has these figures."""
        self._attempt += 1
        self._step = step
        self._lines = list(lines)

    def add(self, line: Line) -> None:
        """One more line of figures."""
        self._lines.append(line)

    def note(self, text: str) -> None:
        """Something that the user should read."""
        self._notes.append(text)

    def stop(self, reason: str) -> None:
        """Ask the workers to write a checkpoint and stop."""
        self._stop = reason

    def stop_reason(self) -> str:
        """Why the workers should stop; empty while they should not."""
        return self._stop

    def news(self, attempt: int, lines: int, notes: int) -> News:
        """What is new to somebody who has seen so many lines of an attempt, and so many notes."""
        seen = lines if attempt == self._attempt else 0
        return News(self._attempt, self._step, self._lines[seen:], self._notes[notes:])


class BoardLink:
    """Calls a board, wherever it is; what it is told is never waited for.

    Args:
        board: a ``Board``, or the handle of an actor.
    """

    def __init__(self, board: Any) -> None:
        self._board = board

    @classmethod
    def start(cls, *, in_process: bool) -> BoardLink:
        """A new board: here, or an actor on this node."""
        if in_process:
            return cls(Board())
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Beside the driver: other nodes may be taken away.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return cls(ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote())

    def tell(self, method: str, *arguments: Any) -> None:
        """Call ``begin``, ``add``, ``note`` or ``stop``."""
        if isinstance(self._board, Board):
            getattr(self._board, method)(*arguments)
        else:
            getattr(self._board, method).remote(*arguments)

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call ``news`` or ``stop_reason``.

        Raises:
            ray.exceptions.RayError: the board cannot be reached.
        """
        if isinstance(self._board, Board):
            return getattr(self._board, method)(*arguments)
        import ray

        return ray.get(getattr(self._board, method).remote(*arguments), timeout=30)
