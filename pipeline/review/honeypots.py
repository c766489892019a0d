"""Images whose truth is known, mixed into a queue so that nobody can tell which they are.

They are as the rest of the queue is: of the same kinds of reasons in the same shares, at any place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

import numpy as np

from pipeline.review.candidates import Candidates, pooled
from pipeline.review.queue import Reason

T = TypeVar("T")

DRAWN: Final = [Reason(kind="random", text="chosen by chance")]


def draw_honeypots(
    found: Candidates, names: Sequence[str], *, doubtful: int, count: int, other: str = ""
) -> dict[int, list[Reason]]:
    """Choose honeypots: the most doubtful, then some by chance.

    Args:
        found: among the images whose truth is known.
        names: of the classes.
        doubtful: how many for their doubt.
        count: how many in all; fewer if there are fewer.
        other: the second table; "" without one.

    Returns:
        Reasons by id; [] if there is none but low quality.
    """
    ids, weights, reasons = pooled(
        found, names, worst=doubtful, most=len(found.lists["quality"].ids), other=other
    )
    order = np.argsort(-weights, kind="stable")[:doubtful]
    chosen = {number: reasons[number] for number in ids[order].tolist()}
    for number in found.chance.ids.tolist():
        if len(chosen) < count:
            chosen.setdefault(number, DRAWN)
    return chosen


def scattered(items: Sequence[T], others: Sequence[T], seed: int) -> list[T]:
    """Items in their order, and others anywhere between them."""
    rng = np.random.default_rng(seed)
    places = set(rng.permutation(len(items) + len(others))[: len(others)].tolist())
    first, second = iter(items), iter([others[at] for at in rng.permutation(len(others)).tolist()])
    return [next(second if at in places else first) for at in range(len(items) + len(others))]
