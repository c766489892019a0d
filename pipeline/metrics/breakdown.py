"""Foreground statistics apart for groups of prompts: by the size of the object, by class, by the phrase.

A breakdown has a name and groups, such as "object size" with "below 1 %"; a prompt is in at most one group of
each. Everything is counts, so parts sum.

T thresholds.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.metrics.foreground import THRESHOLDS, ForegroundStatistics

OBJECT_SIZE, CLASS, PROMPT, PROMPT_TEXT = "object size", "class", "prompt", "prompt text"
WORDS, PHRASE = "number of words", "phrase"
"""Names of breakdowns."""

_SIZE_LIMITS = (0.01, 0.04, 0.10, 0.25)
SIZES = ("below 1 %", "1 to 4 %", "4 to 10 %", "10 to 25 %", "25 % and more")
"""Groups of ``OBJECT_SIZE``: the share of the image that the object covers."""
WORD_COUNTS = ("1 word", "2 words", "3 words", "4 words", "5 words and more")
PHRASES = ("name alone", "with attribute", "with relation", "with both")
"""Groups of ``PHRASE``: what a referring expression says besides the name."""
PROMPTS = ("text", "image")

_ORDER = {
    OBJECT_SIZE: SIZES,
    WORDS: WORD_COUNTS,
    PHRASE: PHRASES,
    PROMPT: PROMPTS,
}

Groups = Mapping[str, str]
"""Group by breakdown of one prompt."""


def size_group(truth: np.ndarray) -> str:
    """Group of ``OBJECT_SIZE`` of a mask, bool (H, W)."""
    return SIZES[bisect.bisect_right(_SIZE_LIMITS, float(truth.mean()))]


def phrase_groups(phrase: str, *, attribute: bool, relation: bool) -> dict[str, str]:
    """Groups of ``WORDS`` and ``PHRASE`` of a referring expression."""
    count = max(1, min(len(phrase.split()), len(WORD_COUNTS)))
    return {WORDS: WORD_COUNTS[count - 1], PHRASE: PHRASES[attribute + 2 * relation]}


@dataclass(frozen=True, eq=False)
class Group:
    """Counts of a group.

    Attributes:
        prompts: how many.
        statistics: of all of them as one class.
    """

    prompts: int
    statistics: ForegroundStatistics

    def __add__(self, other: Group) -> Group:
        return Group(self.prompts + other.prompts, self.statistics + other.statistics)


Breakdowns = dict[str, dict[str, Group]]
"""Groups by name, by the name of the breakdown; groups in the order they are shown in."""


def break_down(prompts: Iterable[tuple[ForegroundStatistics, Groups]]) -> Breakdowns:
    """Sum the statistics of prompts by group.

    Args:
        prompts: statistics of one prompt each, all at the same thresholds, with its groups.
    """
    sums: dict[str, dict[str, tuple[int, np.ndarray, tuple[float, ...]]]] = {}
    for statistics, groups in prompts:
        counts = statistics.counts.sum(0)
        for breakdown, group in groups.items():
            found = sums.setdefault(breakdown, {})
            number, total, _ = found.get(group, (0, 0, ()))
            found[group] = number + 1, total + counts, statistics.thresholds
    return _ordered(
        {
            breakdown: {
                group: Group(number, ForegroundStatistics(np.zeros(1, np.int64), total[None], thresholds))
                for group, (number, total, thresholds) in found.items()
            }
            for breakdown, found in sums.items()
        }
    )


def merge_breakdowns(parts: Iterable[Breakdowns]) -> Breakdowns:
    """Sum of several, such as those of the folds of a benchmark."""
    found: Breakdowns = {}
    for part in parts:
        for breakdown, groups in part.items():
            into = found.setdefault(breakdown, {})
            for name, group in groups.items():
                into[name] = into[name] + group if name in into else group
    return _ordered(found)


def breakdowns_to_json(breakdowns: Breakdowns) -> dict[str, Any]:
    """Plain lists and numbers; the thresholds must be ``THRESHOLDS``."""
    return {
        breakdown: {
            name: {"prompts": group.prompts, "counts": group.statistics.counts[0].tolist()}
            for name, group in groups.items()
        }
        for breakdown, groups in breakdowns.items()
    }


def breakdowns_from_json(data: Mapping[str, Any]) -> Breakdowns:
    """Inverse of ``breakdowns_to_json``."""
    return {
        breakdown: {
            name: Group(
                int(group["prompts"]),
                ForegroundStatistics(
                    np.zeros(1, np.int64),
                    np.array(group["counts"], np.int64).reshape(1, len(THRESHOLDS), 4),
                ),
            )
            for name, group in groups.items()
        }
        for breakdown, groups in data.items()
    }


def _ordered(breakdowns: Breakdowns) -> Breakdowns:
    """Groups as ``_ORDER`` has them, and by name where it has no order."""

    def ordered(breakdown: str, groups: dict[str, Group]) -> dict[str, Group]:
        order = _ORDER.get(breakdown, ())
        names = [name for name in order if name in groups] + sorted(groups.keys() - set(order))
        return {name: groups[name] for name in names}

    return {breakdown: ordered(breakdown, groups) for breakdown, groups in breakdowns.items()}
