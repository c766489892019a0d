"""CLIPSeg's protocol for affordances, attributes and parts (Table 8), on any dataset with instances.

A prompt is evaluated on every image with an instance of one of its classes; the true mask is the union of
all such instances. Images in which one of these classes is not annotated exhaustively are skipped for that
prompt. (The paper's reader takes one class at a time, on a crop around it, so a chair next to the wanted sofa
counts as wrong.) Image and mask are squeezed to S x S, as on PhraseCut.

Shapes: S = 352.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from models.clipseg.decoder import IMAGE_SIZE
from pipeline.datasets.base import Sample
from pipeline.datasets.cocojson import CocoDataset
from pipeline.datasets.generalised import MatchedPrompt
from pipeline.evaluation.prompts.pixels import pixels, squeezed_mask
from pipeline.evaluation.prompts.protocols import Query, Read
from pipeline.metrics.breakdown import PROMPT_TEXT


def generalised_queries(
    dataset: CocoDataset, prompts: Sequence[MatchedPrompt], *, limit: int = 0, side: int = IMAGE_SIZE
) -> list[Read]:
    """One query per image that shows a class of any prompt.

    The class ids of the statistics are positions in ``prompts``; each prompt is a group of ``PROMPT_TEXT``.

    Args:
        dataset: the images and instances.
        prompts: prompts matched to this dataset.
        limit: maximum number of images; 0 for all.
        side: side of the network's input.
    """
    queries: list[Read] = []
    for sample in dataset.samples:
        if limit and len(queries) == limit:
            break
        shown, incomplete = dataset.class_ids_of(sample), dataset.not_exhaustive_ids_of(sample)
        usable = [
            index
            for index, prompt in enumerate(prompts)
            if not shown.isdisjoint(prompt.class_ids) and incomplete.isdisjoint(prompt.class_ids)
        ]
        if usable:
            queries.append(partial(_query, dataset, sample, prompts, usable, side))
    return queries


def _query(
    dataset: CocoDataset, sample: Sample, prompts: Sequence[MatchedPrompt], usable: Sequence[int], side: int
) -> Query:
    texts = [prompts[index].prompt.text for index in usable]
    return Query(
        image=pixels(dataset.image(sample), (side, side), align_corners=True),
        prompts=texts,
        truths=[squeezed_mask(dataset.union(sample, prompts[index].class_ids)) for index in usable],
        class_ids=usable,
        groups=[{PROMPT_TEXT: text} for text in texts],
    )
