"""CLIPSeg's training data: open a dataset or label table as a source of pairs, by a recipe's settings.

To add a data source, see ``pipeline.training.clipseg.sources.base`` and add a line to ``SOURCES``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from models.errors import WrongUse
from models.settings import Settings
from pipeline.datasets.base import Dataset
from pipeline.datasets.cocojson import CocoDataset
from pipeline.datasets.cocoobject import coco_object_ontology
from pipeline.datasets.oneshot import BENCHMARKS
from pipeline.datasets.phrasecut import PhraseCutDataset
from pipeline.datasets.toy import ToyDataset
from pipeline.datasets.zeroshot import SPLITS
from pipeline.ontology.ontology import BACKGROUND, Ontology
from pipeline.ontology.reading import load_ontology
from pipeline.table.corrections import Corrections
from pipeline.table.splits import Chosen
from pipeline.table.views import TableView
from pipeline.training.clipseg.sources.base import TripletSource
from pipeline.training.clipseg.sources.benchmarks import (
    open_class_source,
    open_instance_source,
    open_phrase_source,
)
from pipeline.training.clipseg.sources.joined import join_sources
from pipeline.training.clipseg.sources.table import open_table_source
from pipeline.training.clipseg.sources.toy import KINDS, Kind, open_toy_source
from pipeline.training.clipseg.unseen import affordance_phrases, class_phrases, voc_phrases

AFFORDANCES = "affordances"


class SourceSettings(Settings):
    """Which image-phrase pairs to train on."""

    unseen: tuple[str, ...] = ()
    """Classes to leave out of the truth, or of the table if there is no truth: names; a zero-shot split
    (``pascal-unseen10``); the test classes of a one-shot fold (``pascal5i:0``, ``coco20i:3``);
    ``affordances``, the paper's list of words. Referring expressions that name such a class are dropped: for
    a class of PASCAL VOC by any word that WordNet lists below it, for others by the word itself in singular
    and plural."""
    toy_phrases: tuple[Kind, ...] = KINDS
    """Toy world: which kinds of phrases to ask for; see ``pipeline.training.clipseg.sources.toy``."""
    synonyms: bool = True
    """Also call classes by their synonyms."""
    min_area: Annotated[int, Field(ge=1)] = 1
    """Label maps: pixels that a class needs in an image to be asked for."""
    min_quality: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Label table: minimum quality score of an image's labels."""
    min_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Label table: minimum share of an image that a class must cover to be asked for."""
    min_confidence: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Label table: minimum mean confidence of a class in an image to be asked for."""


def _open_phrases(dataset: PhraseCutDataset, settings: SourceSettings) -> TripletSource:
    return open_phrase_source(dataset, drop=unseen_phrases(settings.unseen))


def _open_toy(dataset: ToyDataset, settings: SourceSettings) -> TripletSource:
    seen = seen_ids(settings.unseen, dataset.class_names)
    return open_toy_source(dataset, kinds=settings.toy_phrases, class_ids=seen)


def _open_instances(dataset: CocoDataset, settings: SourceSettings) -> TripletSource:
    seen = seen_ids(settings.unseen, dataset.class_names)
    return open_instance_source(dataset, class_ids=seen, synonyms=settings.synonyms)


def _open_classes(dataset: Dataset, settings: SourceSettings) -> TripletSource:
    seen = seen_ids(settings.unseen, dataset.class_names)
    return open_class_source(dataset, class_ids=seen, synonyms=settings.synonyms, min_area=settings.min_area)


SOURCES: Mapping[type[Any], Callable[[Any, SourceSettings], TripletSource]] = {
    PhraseCutDataset: _open_phrases,
    ToyDataset: _open_toy,
    CocoDataset: _open_instances,
    Dataset: _open_classes,
}
"""Opener of each kind of dataset, given the dataset and the settings; the first matching kind wins."""


def open_source(
    settings: SourceSettings,
    *,
    labels: str | None = None,
    ontology: Ontology | None = None,
    dataset: Dataset | None = None,
    view: TableView | None = None,
    chosen: Chosen | None = None,
    corrections: Corrections | None = None,
) -> TripletSource:
    """Open the training data: a label table, a dataset, or both.

    Args:
        labels: label table, for training without annotation.
        ontology: class names of the table; None takes its own, or those of the view.
        dataset: images with truth, or PhraseCut. Given with a table, the seen classes are learnt from truth
            and the unseen ones from the table.
        view: of the table.
        chosen: use only these images of the table.
        corrections: what people say of the table, which is believed instead of its labels.

    Raises:
        MaskMillError: ``ontology_invalid``; ``wrong_use`` if both are given and no class is unseen; errors of
            the source.
    """
    if labels is not None:
        classes = ontology or (recorded_ontology(labels) if view is None else view.ontology)
        seen = seen_ids(settings.unseen, classes.names)
        of_table = functools.partial(
            _table_source, settings, labels, classes, view=view, chosen=chosen, corrections=corrections
        )
        if dataset is None:
            return of_table(seen)
        if seen is None:
            raise WrongUse(
                "wrong_use",
                "There are truth and labels, but nothing says which classes to learn from the labels.",
                "Name them with --unseen; or leave out the labels or the truth.",
            )
        unseen = tuple(
            number for number, name in enumerate(classes.names) if number not in seen and name != BACKGROUND
        )
        truth = open_source(settings, dataset=dataset)
        return join_sources(truth, of_table(unseen))
    assert dataset is not None, "either a table or a dataset is given"
    opener = next(opener for kind, opener in SOURCES.items() if isinstance(dataset, kind))
    return opener(dataset, settings)


def _table_source(
    settings: SourceSettings,
    labels: str,
    ontology: Ontology,
    class_ids: Sequence[int] | None,
    *,
    view: TableView | None,
    chosen: Chosen | None,
    corrections: Corrections | None,
) -> TripletSource:
    return open_table_source(
        labels,
        ontology=ontology,
        class_ids=class_ids,
        synonyms=settings.synonyms,
        min_quality=settings.min_quality,
        min_share=settings.min_share,
        min_confidence=settings.min_confidence,
        view=view,
        chosen=chosen,
        corrections=corrections,
    )


def recorded_ontology(labels: str) -> Ontology:
    """The ontology that a label table was made with."""
    from pipeline.table.record import read_table_record

    return read_table_record(labels).ontology


def unseen_names(unseen: Sequence[str]) -> tuple[str, ...]:
    """Expand names, splits and folds to class names.

    Raises:
        MaskMillError: ``ontology_invalid`` for an unknown fold.
    """
    names: list[str] = []
    for entry in unseen:
        benchmark, colon, fold = entry.rpartition(":")
        if colon:
            known = BENCHMARKS.get(benchmark)
            if known is None or not fold.isdecimal() or int(fold) >= len(known.folds):
                raise WrongUse(
                    "ontology_invalid",
                    f"unseen: there is no fold {entry!r}.",
                    f"Write NAME:FOLD with a fold from 0 to 3 of {', '.join(BENCHMARKS)}.",
                )
            voc = known.dataset.startswith("voc")
            classes = load_ontology(known.dataset) if voc else coco_object_ontology()
            names += [classes.names[number] for number in known.folds[int(fold)]]
        elif entry in SPLITS:
            names += SPLITS[entry].unseen
        else:
            names.append(entry)
    return tuple(dict.fromkeys(names))


def seen_ids(unseen: Sequence[str], names: Sequence[str]) -> tuple[int, ...] | None:
    """Ids of the classes to train on, without background; None if nothing is unseen.

    Args:
        unseen: see ``SourceSettings.unseen``.
        names: class names by id.

    Raises:
        MaskMillError: ``ontology_invalid`` for an unseen class that is not among the names.
    """
    if not unseen:
        return None
    left_out = unseen_names(unseen)
    absent = [name for name in left_out if name not in names]
    if absent:
        raise WrongUse(
            "ontology_invalid",
            f"Of the unseen classes, {', '.join(absent)} are not among those of the data.",
            f"Known: {', '.join(names[:30])}; splits: {', '.join(SPLITS)}; folds: pascal5i:0, coco20i:0, ….",
        )
    return tuple(number for number, name in enumerate(names) if name not in left_out and name != BACKGROUND)


def unseen_phrases(unseen: Sequence[str]) -> Callable[[str], bool]:
    """Return a predicate: whether a phrase names an unseen class; see ``SourceSettings.unseen``."""
    voc = load_ontology("voc21").names
    names = unseen_names([entry for entry in unseen if entry != AFFORDANCES])
    listed = [voc.index(name) for name in names if name in voc and name != BACKGROUND]
    others = [name for name in names if name not in voc]
    tests: list[Callable[[str], bool]] = []
    if listed:
        tests.append(voc_phrases(listed))
    if others:
        tests.append(class_phrases(others))
    if AFFORDANCES in unseen:
        tests.append(affordance_phrases())
    return lambda phrase: any(test(phrase) for test in tests)
