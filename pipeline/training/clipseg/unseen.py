"""Phrases that name unseen classes, to be left out of training: zero-shot and one-shot with PhraseCut.

CLIPSeg takes the lemma names of a class's WordNet synset and of all its hyponyms. They lie here as a list
(``unseen_words.yaml``), so that WordNet need not be installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from models.errors import WrongUse

VOC_SYNSETS: tuple[str, ...] = (
    "aeroplane.n.01", "bicycle.n.01", "bird.n.01", "vessel.n.02", "bottle.n.01", "bus.n.01", "car.n.01",
    "cat.n.01", "chair.n.01", "cattle.n.01", "table.n.02", "dog.n.01", "horse.n.01", "motorcycle.n.01",
    "person.n.01", "pot_plant.n.01", "sheep.n.01", "sofa.n.01", "train.n.01", "television.n.03",
)  # fmt: skip
"""Class i of PASCAL VOC is ``VOC_SYNSETS[i - 1]``."""

AFFORDANCE_WORDS: frozenset[str] = frozenset(
    {
        "drink", "drinks", "drinking", "sit", "sits", "sitting", "ride", "rides", "riding", "fly", "flies",
        "flying", "drive", "drives", "driving", "driven", "swim", "swims", "swimming", "wheels", "wheel",
        "legs", "leg", "ear", "ears",
    }
)  # fmt: skip
"""Words that the paper leaves out before it asks for affordances and parts (its ``aff``)."""

_FILE = Path(__file__).with_name("unseen_words.yaml")
# WordNet's endings of plural nouns and what they stand for.
_ENDINGS = (
    ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("ves", "f"),
    ("men", "man"), ("ies", "y"),
)  # fmt: skip
_PUNCTUATION = ".,;:!?\"'()"


@dataclass(frozen=True)
class NamesAny:
    """Tells of a phrase whether it names one of some things: picklable, and called with the phrase.

    A phrase does if it holds a name of several words anywhere, or if one of its words, or what that is the
    plural of, is a name. The reference looks up each word's singular in WordNet first and takes no other
    form, so that it keeps "glasses" where "glasses" but not "glass" is a name; here such a phrase goes as
    well.

    Attributes:
        words: names of one word, lower case.
        expressions: names of several words.
        plurals: (plural, singular) of irregular words.
    """

    words: frozenset[str]
    expressions: tuple[str, ...] = ()
    plurals: frozenset[tuple[str, str]] = frozenset()

    @classmethod
    def of(cls, names: Iterable[str], plurals: Iterable[tuple[str, str]] = ()) -> NamesAny:
        """From names of one word or several, in any case."""
        lower = {" ".join(name.casefold().replace("_", " ").split()) for name in names}
        return cls(
            frozenset(name for name in lower if " " not in name),
            tuple(sorted(name for name in lower if " " in name)),
            frozenset(plurals),
        )

    def __call__(self, phrase: str) -> bool:
        text = " ".join(phrase.casefold().replace("_", " ").split())
        if any(expression in text for expression in self.expressions):
            return True
        return any(not self.words.isdisjoint(self._forms(word)) for word in text.split())

    def _forms(self, word: str) -> set[str]:
        word = word.strip(_PUNCTUATION)
        regular = {word[: -len(old)] + new for old, new in _ENDINGS if word.endswith(old)}
        return {word} | regular | {one for many, one in self.plurals if many == word}


def voc_phrases(class_ids: Sequence[int]) -> NamesAny:
    """Phrases that name classes of PASCAL VOC or anything that WordNet 3.0 puts below them.

    For a fold of Pascal-5i give ``BENCHMARKS["pascal5i"].folds[fold]`` (``pipeline.datasets.oneshot``); for
    generalised zero-shot ``zero_shot_split("pascal-unseen10").unseen_ids`` (``pipeline.datasets.zeroshot``).

    Args:
        class_ids: 1 (airplane) to 20 (tv monitor).

    Raises:
        MaskMillError: ``wrong_use``.
    """
    if not class_ids or not 1 <= min(class_ids) <= max(class_ids) <= len(VOC_SYNSETS):
        raise WrongUse(
            "wrong_use",
            f"{list(class_ids)} are no classes of PASCAL VOC with words in WordNet.",
            f"Give ids from 1 to {len(VOC_SYNSETS)}.",
        )
    words, plurals = _listed()
    return NamesAny.of((name for number in class_ids for name in words[VOC_SYNSETS[number - 1]]), plurals)


def class_phrases(names: Iterable[str]) -> NamesAny:
    """Phrases that name classes of any other data by these words themselves, singular or plural.

    Narrower than what ``voc_phrases`` does for PASCAL VOC: no narrower terms ("poodle" for "dog") are known,
    so give them as well.
    """
    return NamesAny.of(names, _listed()[1])


def affordance_phrases() -> NamesAny:
    """Phrases with a word of ``AFFORDANCE_WORDS``."""
    return NamesAny(AFFORDANCE_WORDS)


@cache
def _listed() -> tuple[dict[str, tuple[str, ...]], tuple[tuple[str, str], ...]]:
    """Names by synset, and irregular plurals."""
    content = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    words = {synset: tuple(text.split("; ")) for synset, text in content["synsets"].items()}
    pairs = (entry.split(" ") for entry in content["plurals"].split("; "))
    return words, tuple((many, one) for many, one in pairs)
