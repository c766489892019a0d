"""Which class of the labels is which of the truth, when they do not have the same classes.

Classes are matched by a mapping that the user gives, then by name, then by synonyms; the words of a
background are not synonyms. Several classes of the labels may be one of the truth, and one of the labels
several of the truth; what is measured is then the coarser of the two. ``others`` says what becomes of
classes without a counterpart:

- ``background``: it counts as background on its side, for that is what the other side calls it. An aeroplane
  of the truth that the labels call a cat is a mistake.
- ``ignored``: pixels of the truth are left out, and labels without a counterpart are no class, which is wrong
  where the truth has a measured one.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import yaml
from typing_extensions import Self

from models.errors import WrongUse
from pipeline.datasets.base import Dataset, Labels, Sample
from pipeline.files.documents import parsed_yaml, read_document
from pipeline.files.storage import open_storage
from pipeline.ontology.ontology import BACKGROUND, Ontology
from pipeline.table.views import find_class, position_of

NO_CLASS = 65_535
"""Id of labels without a counterpart: never a class."""

Others = Literal["background", "ignored"]
Given = Mapping[str, Sequence[str]]
"""Classes of the truth by class of the labels; none for a class without a counterpart."""

_FORM = "Write lines such as puppy: dog, pet: [cat, dog] or sky: null."


@dataclass(frozen=True)
class Measured:
    """One class that is measured: its name, and the classes that it is made of on either side."""

    name: str
    labels: tuple[str, ...]
    truth: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ClassMatch:
    """The classes that labels and truth have in common.

    Attributes:
        classes: what is measured, in the order of the truth's ids.
        only_labels: names of the labels' classes without a counterpart.
        only_truth: names of the truth's classes without one.
        others: what becomes of those.
        ontology: of the measured classes; its ids are positions in ``classes``.
        labels: measured id, or ``NO_CLASS``, by id of the labels, for all 65,536 values.
        truth: measured id, or the ignore index of ``ontology``, by id of the truth, for all 65,536 values.
    """

    classes: tuple[Measured, ...]
    only_labels: tuple[str, ...]
    only_truth: tuple[str, ...]
    others: Others
    ontology: Ontology
    labels: npt.NDArray[np.uint16]
    truth: npt.NDArray[Any]


def match_classes(
    labels: Ontology,
    truth: Ontology,
    *,
    given: Given | None = None,
    partial: bool = True,
    others: Others | None = None,
) -> ClassMatch:
    """Find the counterpart of each class.

    Args:
        labels: classes of the labels.
        truth: classes of the truth.
        given: counterparts that the user names, in any case; the other classes are matched by name and
            synonym.
        partial: whether classes of the truth may lack a counterpart.
        others: what becomes of classes without a counterpart; None is ``background`` if both have one.

    Raises:
        MaskMillError: ``classes_differ`` for a name that is not there, a class that is used twice, nothing in
            common, or a class of the truth without a counterpart that needs one.
    """
    pairs = _given_pairs(given or {}, labels, truth)
    settled = {position_of(name, labels.names) for name in given or {}}
    pairs |= _found_pairs(labels, truth, settled, pairs)
    groups = _groups(pairs, labels, truth)
    if not groups:
        raise WrongUse(
            "classes_differ",
            f"Labels and truth have no class in common: {_some(labels.names)}; and {_some(truth.names)}.",
            "Say which is which in a file: --mapping FILE. " + _FORM,
        )
    of_labels = {number for ids, _ in groups for number in ids}
    of_truth = {number for _, ids in groups for number in ids}
    only_labels = [name for number, name in enumerate(labels.names) if number not in of_labels]
    only_truth = [name for number, name in enumerate(truth.names) if number not in of_truth]
    if only_truth and not partial:
        raise WrongUse(
            "classes_differ",
            f"The labels have no counterpart of the truth's {_some(only_truth)}.",
            "Add them to the mapping, or measure what both have in common: --common.",
        )
    background = _background(groups, labels, truth)
    if others == "background" and background is None:
        raise WrongUse(
            "wrong_use",
            "Labels and truth do not both have a class called background.",
            "Use --others ignored, or --mapping to say which class is the background.",
        )
    if others is None:
        others = "ignored" if background is None else "background"
    classes = tuple(
        Measured(
            truth.names[theirs[0]] if len(theirs) == 1 else labels.names[ours[0]],
            tuple(labels.names[number] for number in ours),
            tuple(truth.names[number] for number in theirs),
        )
        for ours, theirs in groups
    )
    ontology = _ontology(classes, [theirs[0] for _, theirs in groups], truth)
    rest = background if others == "background" and background is not None else None
    to_measured = np.full(1 << 16, NO_CLASS, np.uint16)
    from_truth = np.full(1 << 16, ontology.ignore_index, ontology.mask_dtype)
    if rest is not None:
        to_measured[: labels.num_classes] = rest
        from_truth[: truth.num_classes] = rest
    for number, (ours, theirs) in enumerate(groups):
        to_measured[list(ours)] = number
        from_truth[list(theirs)] = number
    return ClassMatch(
        classes, tuple(only_labels), tuple(only_truth), others, ontology, to_measured, from_truth
    )


def read_mapping(path: str) -> dict[str, tuple[str, ...]]:
    """Read a file that says which class of the labels is which of the truth.

    Args:
        path: path or URI of a YAML file: ``label class: truth class``, a list of them, or null.

    Raises:
        MaskMillError: ``classes_differ``, naming the line where there is one.
    """
    code = "classes_differ"
    folder, slash, file = path.rpartition("/")
    place = open_storage(folder or slash or ".")
    try:
        data = read_document(place, file, code=code)
    except FileNotFoundError:
        raise WrongUse(code, f"There is no file {path}.", "Check the path.") from None
    where = place.uri_of(file)
    fields = parsed_yaml(data, where, code=code)
    if not isinstance(fields, dict) or not fields:
        raise WrongUse(code, f"{where} maps no class.", _FORM)
    _refuse_repeated(data, where)
    found: dict[str, tuple[str, ...]] = {}
    for name, counterparts in fields.items():
        listed = [] if counterparts is None else counterparts
        listed = listed if isinstance(listed, list) else [listed]
        strange = [entry for entry in (name, *listed) if not isinstance(entry, str)]
        if strange:
            raise WrongUse(
                code,
                f"{where}: YAML reads {strange[0]!r} as something else than a word.",
                "Put it in quotes.",
            )
        found[name] = tuple(listed)
    return found


def _refuse_repeated(data: bytes, where: str) -> None:
    node = yaml.compose(data, Loader=yaml.SafeLoader)
    assert isinstance(node, yaml.MappingNode)
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen:
            raise WrongUse(
                "classes_differ", f"{where}:{key.start_mark.line + 1}: {key.value} is there twice.", _FORM
            )
        seen.add(key.value)


# --- matching ---

_Pairs = set[tuple[int, int]]
"""Ids of the labels and of the truth."""


def _given_pairs(given: Given, labels: Ontology, truth: Ontology) -> _Pairs:
    pairs: _Pairs = set()
    used: dict[int, str] = {}
    for name, counterparts in given.items():
        number = find_class(name, labels.names, "the labels")
        if number in used:
            raise WrongUse(
                "classes_differ", f"The mapping has {used[number]} and {name}, the same class.", _FORM
            )
        used[number] = name
        for counterpart in counterparts:
            pair = number, find_class(counterpart, truth.names, "the truth")
            if pair in pairs:
                raise WrongUse("classes_differ", f"The mapping names {counterpart} twice for {name}.", _FORM)
            pairs.add(pair)
    return pairs


def _found_pairs(labels: Ontology, truth: Ontology, settled: set[int | None], given: _Pairs) -> _Pairs:
    """Pairs by name and synonym.

    Args:
        settled: ids of the labels that the user has mapped.
        given: what the user has mapped; what is a part of a coarser class of the labels stays so.
    """
    parts = Counter(ours for ours, _ in given)
    taken = {theirs for ours, theirs in given if parts[ours] > 1}
    open_labels = [number for number in range(labels.num_classes) if number not in settled]
    pairs: _Pairs = set()
    names = {name.casefold(): number for number, name in enumerate(truth.names)}
    synonyms = {word: number for number, words in _synonyms(truth).items() for word in words}
    for number in open_labels:
        name = labels.names[number].casefold()
        found = names.get(name, synonyms.get(name))
        if found is not None and found not in taken:
            pairs.add((number, found))
    # A class that names several of the truth as its synonyms takes those that are still free.
    matched = {number for number, _ in pairs}
    free = set(range(truth.num_classes)) - {number for _, number in pairs | given}
    own = _synonyms(labels)
    for number in open_labels:
        if number in matched:
            continue
        for word in own.get(number, ()):
            found = names.get(word)
            if found in free:
                free.discard(found)
                pairs.add((number, found))
    return pairs


def _synonyms(ontology: Ontology) -> dict[int, list[str]]:
    """Synonyms by class id, without the words of a background."""
    offset = int(ontology.background is not None)
    return {
        number: [word.casefold() for word in entry.synonyms]
        for number, entry in enumerate(ontology.classes, offset)
    }


def _groups(
    pairs: _Pairs, labels: Ontology, truth: Ontology
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pairs as classes to measure: ids of the labels, ids of the truth; one of them has a single id."""
    groups = []
    for first in sorted({number for _, number in pairs}):
        ours = tuple(sorted(label for label, number in pairs if number == first))
        theirs = tuple(sorted({number for label, number in pairs if label in ours}))
        if len(ours) > 1 and len(theirs) > 1:
            raise WrongUse(
                "classes_differ",
                f"{_some([labels.names[number] for number in ours])} of the labels and "
                f"{_some([truth.names[number] for number in theirs])} of the truth are mixed up: one of them "
                "would have to be a single class.",
                "Map several classes to one, or one to several.",
            )
        if first == theirs[0]:
            groups.append((ours, theirs))
    return groups


def _background(
    groups: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], labels: Ontology, truth: Ontology
) -> int | None:
    """The measured class that is the background on both sides."""
    ours, theirs = position_of(BACKGROUND, labels.names), position_of(BACKGROUND, truth.names)
    return next((at for at, (a, b) in enumerate(groups) if ours in a and theirs in b), None)


def _ontology(classes: Sequence[Measured], firsts: Sequence[int], truth: Ontology) -> Ontology:
    """The classes that are measured, in the truth's colours."""
    palette = truth.palette()[list(firsts)].tolist()
    fits = truth.ignore_index >= len(classes) and (truth.ignore_index <= 255 or len(classes) > 254)
    return Ontology.from_dict(
        {
            "name": f"{truth.name} in common",
            "classes": [
                {"name": one.name, "color": "#{:02x}{:02x}{:02x}".format(*color)}
                for one, color in zip(classes, palette, strict=True)
            ],
            "ignore_index": truth.ignore_index if fits else None,
        },
        origin="the classes in common",
    )


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# --- the truth ---


@dataclass(frozen=True)
class MatchedDataset(Dataset):
    """A dataset whose truth has the classes that it has in common with some labels; see ``matched``.

    Attributes:
        whole: the dataset itself.
        ids: id in ``classes`` by id of ``whole``.
    """

    whole: Dataset
    ids: npt.NDArray[Any]

    @property
    def has_truth(self) -> bool:
        """See ``Dataset.has_truth``."""
        return self.whole.has_truth

    def truth(self, sample: Sample) -> Labels:
        """See ``Dataset.truth``."""
        found: Labels = self.ids[self.whole.truth(sample)]
        return found

    def image(self, sample: Sample) -> npt.NDArray[np.uint8]:
        """See ``Dataset.image``."""
        return self.whole.image(sample)

    def reader(self) -> Self:
        """See ``Dataset.reader``."""
        return replace(self, samples=(), whole=self.whole.reader())


def matched(dataset: Dataset, match: ClassMatch) -> MatchedDataset:
    """The dataset with the classes of a match."""
    chosen = [[one.name, one.labels, one.truth] for one in match.classes]
    text = json.dumps([dataset.fingerprint(), chosen, match.others], ensure_ascii=False)
    return MatchedDataset(
        name=dataset.name,
        split=dataset.split,
        classes=match.ontology,
        samples=dataset.samples,
        identity=hashlib.sha256(text.encode()).hexdigest(),
        left_out=dataset.left_out,
        whole=dataset,
        ids=match.truth,
    )
