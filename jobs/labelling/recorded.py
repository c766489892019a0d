"""The table that a labelling run adds to: which it may, and the record of a new one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.errors import WrongUse
from pipeline.files.records import now
from pipeline.files.storage import Storage
from pipeline.files.versions import versions
from pipeline.labelling.recipes import LabelRecipe, table_recipe
from pipeline.ontology.ontology import Ontology
from pipeline.table.committed import LABELS_DIR
from pipeline.table.labels import DATASET_FILE
from pipeline.table.record import TableRecord, find_table_record

if TYPE_CHECKING:
    from pipeline.labelling.labeller import PreparedLabeller

PACKAGES = (
    "maskmill",
    "torch",
    "open_clip_torch",
    "ray",
    "pyarrow",
    "pillow",
    "opencv-python-headless",
    "numpy",
)


def recorded_table(
    storage: Storage, recipe: LabelRecipe, ontology: Ontology, *, overwrite: bool = False
) -> TableRecord | None:
    """The record of an existing table that a run extends; None for a new table.

    Args:
        storage: the output.
        recipe: of the run.
        ontology: the same.
        overwrite: the run replaces the table, whatever it is.

    Raises:
        MaskMillError: ``output_differs`` or ``output_not_ours`` if the run cannot add to it.
    """
    recorded = find_table_record(storage)
    if recorded is not None and overwrite:
        return None
    if recorded is None:
        if storage.list(LABELS_DIR, recursive=True):
            raise WrongUse(
                "output_not_ours",
                f"{storage.uri} has files in {LABELS_DIR}/ but no {DATASET_FILE} that says what they are.",
                f"Name another --output, or put {DATASET_FILE} back if this is a label table.",
            )
        return None
    changed = recipe.differences(table_recipe(recorded))
    if recorded.ontology.hash != ontology.hash:
        changed.append("the classes (ontology) differ")
    if changed:
        raise WrongUse(
            "output_differs",
            f"{storage.uri} was labelled differently: {'; '.join(changed)}.",
            "One table holds one kind of label. Name another --output, go back to the recorded recipe and "
            "classes, or delete the old table and start over with --overwrite.",
        )
    return recorded


def refuse_other_weights(recorded: TableRecord | None, fingerprint: str, *, model: str, output: str) -> None:
    """Refuse to add to a table with other weights than those it was labelled with.

    Raises:
        MaskMillError: ``output_differs``.
    """
    theirs = recorded.weights["fingerprint"] if recorded else fingerprint
    if theirs != fingerprint:
        raise WrongUse(
            "output_differs",
            f"{output} was labelled with other weights of {model} ({theirs[:12]}, now {fingerprint[:12]}).",
            "Give the same weights, or name another --output.",
        )


def refuse_others_beside(recorded: TableRecord | None, prepared: PreparedLabeller, *, output: str) -> None:
    """Refuse a memory or a helper that has changed since the table was begun.

    Raises:
        MaskMillError: ``output_differs``.
    """
    for name in ("memory", "helper"):
        if recorded is not None and recorded.weights.get(name) != prepared.weights.get(name):
            raise WrongUse(
                "output_differs",
                f"{output} was labelled when the recipe's {name} was another than now.",
                "Name another --output, or start over with --overwrite.",
            )


def new_record(recipe: LabelRecipe, ontology: Ontology, prepared: PreparedLabeller) -> TableRecord:
    """The first ``dataset.json`` of a new table."""
    recipe = recipe.replace(precision=prepared.precision)
    return TableRecord(
        created=now(),
        ontology=ontology,
        recipe=recipe.to_dict() | {"hash": recipe.hash},
        weights=prepared.weights,
        precision=prepared.precision,
        versions=versions(PACKAGES),
    )
