"""The folder of a trained student: the network with its text classifier, and what it means."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, field_serializer

from pipeline.files.images import ImageSettings
from pipeline.files.storage import open_storage
from pipeline.ontology.ontology import Ontology, RecordedOntology
from pipeline.trained.record import (
    TrainedRecord,
    is_recorded,
    read_trained,
    read_trained_weights,
    refuse_to_replace,
    write_trained,
)

if TYPE_CHECKING:
    import torch

    from models.student.deeplab import DeepLab

RECORD_FILE = "student.json"
WEIGHTS_FILE = "model.safetensors"


def _check_hash(value: Any) -> Any:
    if isinstance(value, dict) and Ontology.from_record(value, origin=RECORD_FILE).hash != value.get("hash"):
        raise ValueError("these classes are not the ones that it was trained for")
    return value


class StudentRecord(TrainedRecord):
    """What ``student.json`` says.

    Attributes:
        ontology: the classes of the stored classifier.
        labelling: how images are decoded and resized before the student sees them.
        teacher: recipe, weights, label table and counts that it learned from.
        text: the CLIP whose text tower made the classifier: ``model``, ``pretrained``, ``fingerprint`` and
            the ``precision`` it computed in.
    """

    KIND: ClassVar[str] = "student"
    WHAT: ClassVar[str] = "student"
    TRAINED_BY: ClassVar[str] = "maskmill train maskclip-plus"
    RECORD_FILE: ClassVar[str] = RECORD_FILE
    WEIGHTS_FILE: ClassVar[str] = WEIGHTS_FILE
    SCHEMA_VERSION: ClassVar[int] = 2

    ontology: Annotated[RecordedOntology, BeforeValidator(_check_hash)]
    labelling: ImageSettings
    teacher: dict[str, Any]
    text: dict[str, Any]

    @field_serializer("labelling")
    def _without_corruption(self, labelling: ImageSettings) -> dict[str, Any]:
        # A corruption is a way to measure, not a way to use a student.
        return labelling.model_dump(mode="json", exclude={"corruption"})


def is_student(uri: str | Path) -> bool:
    """Whether a path or URI is the folder of a student; see ``is_recorded``."""
    return is_recorded(StudentRecord, uri)


def write_student_folder(
    output: str | Path,
    model: DeepLab,
    *,
    ontology: Ontology,
    recipe: Mapping[str, Any],
    labelling: ImageSettings,
    teacher: Mapping[str, Any],
    text: Mapping[str, Any],
    metrics: Mapping[str, Any],
    training: Mapping[str, Any],
    versions: Mapping[str, Any],
    overwrite: bool = False,
) -> StudentRecord:
    """Write a student into a folder, next to what the training has left there.

    The arguments not named here are fields of ``StudentRecord``.

    Args:
        output: local folder or object-store prefix.
        model: with the classifier of ``ontology``.
        overwrite: replace a student that is already there.

    Raises:
        MaskMillError: ``output_exists``, or the storage cannot be written.
    """
    from models.student.file import write_student

    assert model.num_classes == ontology.num_classes, "the classifier must be that of the ontology"
    absent = {"model", "pretrained", "fingerprint", "precision"} - set(text)
    assert not absent, f"text lacks {sorted(absent)}"
    storage = open_storage(output)
    if not overwrite:
        refuse_to_replace(StudentRecord, storage)
    with tempfile.TemporaryDirectory() as folder:
        write_student(Path(folder), model)
        weights = (Path(folder) / WEIGHTS_FILE).read_bytes()
    return write_trained(
        StudentRecord,
        storage,
        {WEIGHTS_FILE: weights},
        config=model.config.model_dump(mode="json"),
        ontology=ontology,
        recipe=recipe,
        labelling=labelling,
        teacher=teacher,
        text=text,
        metrics=metrics,
        training=training,
        versions=versions,
    )


def read_student_record(uri: str | Path) -> StudentRecord:
    """What is recorded about a student; see ``read_trained``."""
    return read_trained(StudentRecord, uri)


def load_student(record: StudentRecord, *, device: torch.device, dtype: torch.dtype) -> DeepLab:
    """The network of a student, in evaluation mode, with the classifier of ``record.ontology``.

    Raises:
        MaskMillError: ``model_damaged``, and as ``models.student.file.read_student``.
    """
    from models.student.file import read_student

    return read_student(read_trained_weights(record), device, dtype)
