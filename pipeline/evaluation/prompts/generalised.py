"""CLIPSeg asked for what things afford, are and have (Table 8), on any data with instances.

An image is asked for a prompt if it shows an instance of one of the classes that the prompt means; the true
mask is the union of all such instances. Images in which one of these classes is known to be marked in part
only are left out for that prompt. (The paper's reader asks image by image for one class at a time, on a crop
around it; a chair beside the sofa that is meant then counts as wrong.) Image and mask are squeezed to
S x S as on PhraseCut.

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
    """One query for each image that shows something that a prompt means.

    Class ids of the statistics are positions in ``prompts``; each prompt is a group of ``PROMPT_TEXT``.

    Args:
        dataset: with instances, every class of the prompts among its own.
        prompts: matched with this dataset.
        limit: images at most; 0 is all.
        side: of the network's input.
    """
    queries: list[Read] = []
    for sample in dataset.samples:
        if limit and len(queries) == limit:
            break
        shown, in_part = dataset.class_ids_of(sample), dataset.not_exhaustive_ids_of(sample)
        meant = [
            place
            for place, prompt in enumerate(prompts)
            if not shown.isdisjoint(prompt.class_ids) and in_part.isdisjoint(prompt.class_ids)
        ]
        if meant:
            queries.append(partial(_query, dataset, sample, prompts, meant, side))
    return queries


def _query(
    dataset: CocoDataset, sample: Sample, prompts: Sequence[MatchedPrompt], meant: Sequence[int], side: int
) -> Query:
    texts = [prompts[place].prompt.text for place in meant]
    return Query(
        image=pixels(dataset.image(sample), (side, side), align_corners=True),
        prompts=texts,
        truths=[squeezed_mask(dataset.union(sample, prompts[place].class_ids)) for place in meant],
        class_ids=meant,
        groups=[{PROMPT_TEXT: text} for text in texts],
    )
