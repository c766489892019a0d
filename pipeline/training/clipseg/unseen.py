"""Find phrases that name unseen classes, to exclude them from zero-shot and one-shot training on PhraseCut.

CLIPSeg uses the lemma names of a class's WordNet synset and of all its hyponyms. They are listed in
``unseen_words.yaml``, so WordNet need not be installed.
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
"""Words that the paper excludes from training before it tests affordances and parts (its ``aff``)."""

_FILE = Path(__file__).with_name("unseen_words.yaml")
# WordNet's plural endings and their singulars.
_ENDINGS = (
    ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("ves", "f"),
    ("men", "man"), ("ies", "y"),
)  # fmt: skip
_PUNCTUATION = ".,;:!?\"'()"


@dataclass(frozen=True)
class PhraseMatcher:
    """Picklable predicate: whether a phrase contains one of a set of names.

    A phrase matches if it contains a name of several words, or if one of its words, or the singular of one,
    is a name. The reference only compares singulars, so it keeps "glasses" if "glasses" but not "glass" is a
    name; here such a phrase matches as well.

    Attributes:
        words: names of one word, lower case.
        expressions: names of several words.
        plurals: (plural, singular) of irregular words.
    """

    words: frozenset[str]
    expressions: tuple[str, ...] = ()
    plurals: frozenset[tuple[str, str]] = frozenset()

    @classmethod
    def of(cls, names: Iterable[str], plurals: Iterable[tuple[str, str]] = ()) -> PhraseMatcher:
        """Build from names of one or several words, in any case."""
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


def voc_phrases(class_ids: Sequence[int]) -> PhraseMatcher:
    """Match phrases that name classes of PASCAL VOC or any of their hyponyms in WordNet 3.0.

    For a fold of Pascal-5i, pass ``BENCHMARKS["pascal5i"].folds[fold]`` (``pipeline.datasets.oneshot``); for
    generalised zero-shot, ``zero_shot_split("pascal-unseen10").unseen_ids`` (``pipeline.datasets.zeroshot``).

    Args:
        class_ids: 1 (airplane) to 20 (tv monitor).

    Raises:
        MaskMillError: ``wrong_use``.
    """
    if not class_ids or not 1 <= min(class_ids) <= max(class_ids) <= len(VOC_SYNSETS):
        raise WrongUse(
            "wrong_use",
            f"{list(class_ids)} are not classes of PASCAL VOC with words in WordNet.",
            f"Give ids from 1 to {len(VOC_SYNSETS)}.",
        )
    words, plurals = _listed()
    return PhraseMatcher.of(
        (name for number in class_ids for name in words[VOC_SYNSETS[number - 1]]), plurals
    )


def class_phrases(names: Iterable[str]) -> PhraseMatcher:
    """Match phrases that name classes of any other dataset, singular or plural.

    Unlike ``voc_phrases`` it knows no hyponyms ("poodle" for "dog"), so pass them as names too.
    """
    return PhraseMatcher.of(names, _listed()[1])


def affordance_phrases() -> PhraseMatcher:
    """Match phrases with a word of ``AFFORDANCE_WORDS``."""
    return PhraseMatcher(AFFORDANCE_WORDS)


@cache
def _listed() -> tuple[dict[str, tuple[str, ...]], tuple[tuple[str, str], ...]]:
    """Names by synset, and (plural, singular) of irregular words."""
    content = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    words = {synset: tuple(text.split("; ")) for synset, text in content["synsets"].items()}
    pairs = (entry.split(" ") for entry in content["plurals"].split("; "))
    return words, tuple((many, one) for many, one in pairs)
