"""Foreground statistics by groups of prompts: by object size, by class, by phrase.

A breakdown has a name and groups, such as "object size" with "below 1 %"; a prompt is in at most one group of
each breakdown. All statistics are counts, so they are additive.

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
"""Groups of ``OBJECT_SIZE`` by the share of the image that the object covers."""
WORD_COUNTS = ("1 word", "2 words", "3 words", "4 words", "5 words and more")
PHRASES = ("name alone", "with attribute", "with relation", "with both")
"""Groups of ``PHRASE`` by what a referring expression has besides the name."""
PROMPTS = ("text", "image")

_ORDER = {
    OBJECT_SIZE: SIZES,
    WORDS: WORD_COUNTS,
    PHRASE: PHRASES,
    PROMPT: PROMPTS,
}

Groups = Mapping[str, str]
"""The group of a prompt, by breakdown."""


def size_group(truth: np.ndarray) -> str:
    """``OBJECT_SIZE`` group of a mask, bool (H, W)."""
    return SIZES[bisect.bisect_right(_SIZE_LIMITS, float(truth.mean()))]


def phrase_groups(phrase: str, *, attribute: bool, relation: bool) -> dict[str, str]:
    """``WORDS`` and ``PHRASE`` groups of a referring expression."""
    count = max(1, min(len(phrase.split()), len(WORD_COUNTS)))
    return {WORDS: WORD_COUNTS[count - 1], PHRASE: PHRASES[attribute + 2 * relation]}


@dataclass(frozen=True, eq=False)
class Group:
    """Counts of a group.

    Attributes:
        prompts: number of prompts.
        statistics: their sum, as a single class.
    """

    prompts: int
    statistics: ForegroundStatistics

    def __add__(self, other: Group) -> Group:
        return Group(self.prompts + other.prompts, self.statistics + other.statistics)


Breakdowns = dict[str, dict[str, Group]]
"""Groups by breakdown and name, in display order."""


def break_down(prompts: Iterable[tuple[ForegroundStatistics, Groups]]) -> Breakdowns:
    """Sum the statistics of prompts by group.

    Args:
        prompts: statistics and groups of each prompt; all need the same thresholds.
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
    """Sum breakdowns, such as those of a benchmark's folds."""
    found: Breakdowns = {}
    for part in parts:
        for breakdown, groups in part.items():
            into = found.setdefault(breakdown, {})
            for name, group in groups.items():
                into[name] = into[name] + group if name in into else group
    return _ordered(found)


def breakdowns_to_json(breakdowns: Breakdowns) -> dict[str, Any]:
    """Convert to plain JSON values; the thresholds must be ``THRESHOLDS``."""
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
    """Sort groups by ``_ORDER``, and those not in it by name."""

    def ordered(breakdown: str, groups: dict[str, Group]) -> dict[str, Group]:
        order = _ORDER.get(breakdown, ())
        names = [name for name in order if name in groups] + sorted(groups.keys() - set(order))
        return {name: groups[name] for name in names}

    return {breakdown: ordered(breakdown, groups) for breakdown, groups in breakdowns.items()}
