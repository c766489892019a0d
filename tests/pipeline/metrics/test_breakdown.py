"""Groups of prompts against counting each group by itself."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipeline.metrics.breakdown import (
    OBJECT_SIZE,
    PHRASE,
    PHRASES,
    SIZES,
    WORDS,
    break_down,
    breakdowns_from_json,
    breakdowns_to_json,
    merge_breakdowns,
    phrase_groups,
    size_group,
)
from pipeline.metrics.foreground import THRESHOLDS, ForegroundStatistics


@pytest.mark.parametrize(
    ("pixels", "group"),
    [(0, 0), (9, 0), (10, 1), (39, 1), (40, 2), (99, 2), (100, 3), (249, 3), (250, 4), (1000, 4)],
)
def test_object_size_is_the_share_of_the_image(pixels: int, group: int) -> None:
    truth = np.arange(1000).reshape(20, 50) < pixels
    assert size_group(truth) == SIZES[group]


@pytest.mark.parametrize(
    ("phrase", "attribute", "relation", "words", "says"),
    [
        ("dog", False, False, "1 word", "name alone"),
        ("traffic light", False, False, "2 words", "name alone"),
        ("red  dog", True, False, "2 words", "with attribute"),
        ("dog on grass", False, True, "3 words", "with relation"),
        ("old red dog on the grass", True, True, "5 words and more", "with both"),
    ],
)
def test_phrases(phrase: str, attribute: bool, relation: bool, words: str, says: str) -> None:
    assert phrase_groups(phrase, attribute=attribute, relation=relation) == {WORDS: words, PHRASE: says}


def prompts(count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray, dict[str, str]]]:
    """Probability, truth and groups; some are in no group of a breakdown."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        truth = rng.random((9, 11)) < rng.choice([0.005, 0.3])
        groups = {OBJECT_SIZE: size_group(truth), "class": str(rng.choice(["cow", "ant", "bee"]))}
        if number % 2:
            groups[PHRASE] = PHRASES[number % 4]
        made.append((rng.random((9, 11), np.float32), truth, groups))
    return made


def test_groups_are_sums_of_their_prompts() -> None:
    made = prompts(14, 0)
    parts = [(ForegroundStatistics.of(p, truth, i), groups) for i, (p, truth, groups) in enumerate(made)]
    found = break_down(parts)
    assert list(found["class"]) == ["ant", "bee", "cow"]
    assert list(found[PHRASE]) == ["with attribute", "with both"]
    assert list(found[OBJECT_SIZE]) == [size for size in SIZES if size in found[OBJECT_SIZE]]
    for breakdown, groups in found.items():
        for name, group in groups.items():
            members = [(p, truth) for p, truth, own in made if own.get(breakdown) == name]
            assert group.prompts == len(members) > 0
            for place, threshold in enumerate(THRESHOLDS):
                above = [(p > np.float32(threshold), truth) for p, truth in members]
                assert group.statistics.counts[0, place].tolist() == [
                    sum(int((a & t).sum()) for a, t in above),
                    sum(int((a & ~t).sum()) for a, t in above),
                    sum(int((~a & t).sum()) for a, t in above),
                    sum(int((~a & ~t).sum()) for a, t in above),
                ]

    # In two parts, one of them through JSON, it is the same.
    halves = [break_down(parts[:5]), break_down(parts[5:])]
    halves[0] = breakdowns_from_json(json.loads(json.dumps(breakdowns_to_json(halves[0]))))
    merged = merge_breakdowns(halves)
    assert breakdowns_to_json(merged) == breakdowns_to_json(found)
    assert [list(groups) for groups in merged.values()] == [list(groups) for groups in found.values()]
