"""Prompts that name no class: affordances ("sit on"), attributes ("can fly") and parts ("has wheels").

CLIPSeg (arXiv 2112.10003, §5.4) evaluates them on LVIS. ``generalised_prompts.yaml`` lists the classes that
each prompt stands for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from pipeline.datasets.cocojson import spoken_names

_FILE = Path(__file__).with_name("generalised_prompts.yaml")
_SYNONYMS = "synonyms"


@dataclass(frozen=True)
class GeneralisedPrompt:
    """A prompt and the classes it stands for.

    Attributes:
        text: the model's input.
        kind: ``affordances``, ``attributes`` or ``meronymy``.
        class_names: in LVIS's spelling.
    """

    text: str
    kind: str
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class MatchedPrompt:
    """A prompt matched to the classes of a dataset.

    Attributes:
        prompt: the prompt.
        class_ids: ids in the dataset, ascending; empty if it has none of the classes.
        lacking: names of the prompt's classes that the dataset does not have.
    """

    prompt: GeneralisedPrompt
    class_ids: tuple[int, ...]
    lacking: tuple[str, ...]


@cache
def generalised_prompts() -> tuple[GeneralisedPrompt, ...]:
    """The prompts of the paper's Table 8, grouped by kind."""
    return tuple(
        GeneralisedPrompt(text, kind, tuple(names))
        for kind, prompts in _content().items()
        if kind != _SYNONYMS
        for text, names in prompts.items()
    )


def match_prompts(
    prompts: Iterable[GeneralisedPrompt], class_names: Sequence[str]
) -> tuple[MatchedPrompt, ...]:
    """Match prompts to the classes of a dataset.

    Case, underscores and LVIS's qualifiers in parentheses are ignored, so that "car_(automobile)" matches
    COCO's "car".

    Args:
        prompts: the prompts.
        class_names: names in the dataset, by id.
    """
    ids: dict[str, set[int]] = {}
    for number, name in enumerate(class_names):
        for word in spoken_names(name.casefold()):
            ids.setdefault(word, set()).add(number)
    synonyms: dict[str, list[str]] = _content()[_SYNONYMS]
    matched = []
    for prompt in prompts:
        found: set[int] = set()
        lacking = []
        for name in prompt.class_names:
            words = {word for one in (name, *synonyms.get(name, ())) for word in spoken_names(one.casefold())}
            here = set().union(*(ids.get(word, set()) for word in words))
            found |= here
            if not here:
                lacking.append(name)
        matched.append(MatchedPrompt(prompt, tuple(sorted(found)), tuple(lacking)))
    return tuple(matched)


@cache
def _content() -> dict[str, dict[str, list[str]]]:
    content: dict[str, dict[str, list[str]]] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return content
