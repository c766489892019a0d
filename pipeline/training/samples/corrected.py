"""Training samples from a label table and what people say of it.

An image that people have accepted or painted is learned as they say, and nothing in it is guessed; one whose
labels they have rejected is not learned.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.ontology.ontology import Ontology
from pipeline.table.corrections import Corrections
from pipeline.table.record import read_table_record
from pipeline.table.splits import Chosen
from pipeline.table.views import TableView
from pipeline.training.samples.augment import AugmentSettings
from pipeline.training.samples.mixed import MixedSamples, mix
from pipeline.training.samples.table import TableSamples, open_table_samples


def open_corrected_samples(
    table: str,
    corrections: Corrections | None,
    *,
    ontology: Ontology,
    augment: AugmentSettings,
    view: TableView | None = None,
    chosen: Chosen | None = None,
    **how: Any,
) -> TableSamples | MixedSamples:
    """Index a label table and its corrections for training.

    Args:
        table: output of a labelling run: a path or URI.
        corrections: what people say of it; None if they have said nothing.
        ontology: training classes.
        augment: how to augment and crop.
        view: of the table. Corrections are seen through it, too.
        chosen: use only these images.
        how: what else ``open_table_samples`` is to do with the table's own labels.

    Returns:
        Samples of the table alone if no correction is to be learned.

    Raises:
        MaskMillError: as ``open_table_samples``.
    """
    guessed = open_table_samples(
        table,
        ontology=ontology,
        augment=augment,
        view=view,
        chosen=chosen,
        leave_out=None if corrections is None else corrections.rejected,
        **how,
    )
    if corrections is None:
        return guessed
    ids = np.setdiff1d(corrections.ids, corrections.rejected)
    if not len(ids) or (chosen is not None and not chosen.keep(ids).any()):
        return guessed
    others = np.union1d(corrections.outdated, corrections.elsewhere)
    believed = open_table_samples(
        corrections.place,
        ontology=ontology,
        augment=augment,
        view=None
        if view is None
        else view.view.of(read_table_record(corrections.place).ontology, where=corrections.place),
        chosen=chosen,
        leave_out=others,
        manifests=table,
    )
    # What else is left out there is what the table leaves out, too.
    left_out = {"corrections of other images": len(others)}
    return replace(
        mix(guessed, believed, whole=True),
        left_out=guessed.left_out | {why: count for why, count in left_out.items() if count},
    )
