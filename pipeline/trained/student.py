"""The folder of a trained student: what it holds, written whole and read with care.

``model.safetensors`` holds the network with its text classifier, ``student.json`` what it means: classes,
settings, where it came from, and the fingerprint that ties the two files together. The folder may be local or
in an object store; what else the training leaves there (checkpoints, curves) is not needed to use it.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import Damaged, MaskMillError, WrongUse
from pipeline.files.images import ImageSettings
from pipeline.files.storage import Storage, open_storage
from pipeline.ontology.ontology import Ontology

if TYPE_CHECKING:
    import torch

    from models.student.deeplab import DeepLab

SCHEMA_VERSION = 1
KIND = "student"
RECORD_FILE = "student.json"
WEIGHTS_FILE = "model.safetensors"

_RETRAIN = "Restore the folder from a copy, or train again."


@dataclass(frozen=True, kw_only=True)
class StudentRecord:
    """What ``student.json`` says.

    Attributes:
        uri: canonical URI of the folder; not in the file.
        created: UTC, ISO 8601.
        fingerprint: SHA-256 (hex) of ``model.safetensors``.
        config: ``models.student.deeplab.StudentConfig``.
        ontology: the classes of the stored classifier.
        recipe: of the training, all fields and ``hash``.
        labelling: how images are decoded and resized before the student sees them.
        teacher: recipe, weights, label table and counts that it learned from.
        text: the CLIP whose text tower made the classifier: ``model``, ``pretrained``, ``fingerprint`` and
            the ``precision`` it computed in.
        metrics: figures of the training's last line, by name; what a student is worth on true labels is for
            ``maskmill evaluate`` to say.
        training: iterations, seconds, samples_per_second, workers, ….
        versions: of Python and the packages.
    """

    uri: str
    created: str
    fingerprint: str
    config: Mapping[str, Any]
    ontology: Ontology
    recipe: Mapping[str, Any]
    labelling: ImageSettings
    teacher: Mapping[str, Any]
    text: Mapping[str, Any]
    metrics: Mapping[str, Any]
    training: Mapping[str, Any]
    versions: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.uri.rstrip("/").rpartition("/")[2]

    def to_dict(self) -> dict[str, Any]:
        """The content of ``student.json``; ``from_dict`` is the inverse."""
        # A corruption is a way to measure, no way to use a student.
        labelling = self.labelling.model_dump(mode="json", exclude={"corruption"})
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "created": self.created,
            "weights": {"file": WEIGHTS_FILE, "fingerprint": self.fingerprint},
            "config": dict(self.config),
            "ontology": self.ontology.to_dict()
            | {"hash": self.ontology.hash, "names": list(self.ontology.names)},
            "recipe": dict(self.recipe),
            "labelling": labelling,
            "teacher": dict(self.teacher),
            "text": dict(self.text),
            "metrics": dict(self.metrics),
            "training": dict(self.training),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, data: Any, *, uri: str) -> StudentRecord:
        """Build from the content of ``student.json``.

        Raises:
            MaskMillError: ``model_missing`` if it describes something else, ``newer_version``,
                ``model_damaged``.
        """
        if not isinstance(data, dict) or data.get("kind") != KIND:
            raise _missing(uri, f"its {RECORD_FILE} describes no student")
        version = data.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise WrongUse(
                "newer_version",
                f"{uri} was written by a newer MaskMill (schema {version}; this one reads {SCHEMA_VERSION}).",
                "Update MaskMill.",
            )
        try:
            ontology = dict(data["ontology"])
            ontology_hash = ontology.pop("hash")
            del ontology["names"]
            record = cls(
                uri=uri,
                created=str(data["created"]),
                fingerprint=str(data["weights"]["fingerprint"]),
                ontology=Ontology.from_dict(ontology, origin=f"{uri}/{RECORD_FILE}"),
                labelling=ImageSettings.model_validate(data["labelling"]),
                **{name: dict(data[name]) for name in _SECTIONS},
            )
        except (KeyError, TypeError, ValueError, AttributeError, MaskMillError) as error:
            what = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            raise _damaged(f"{uri}/{RECORD_FILE} is incomplete or was changed: {what}.") from error
        if record.ontology.hash != ontology_hash:
            raise _damaged(f"The classes in {uri}/{RECORD_FILE} are not the ones that it was trained for.")
        return record


_SECTIONS = ("config", "recipe", "teacher", "text", "metrics", "training", "versions")


def is_student(uri: str) -> bool:
    """Whether a path or URI is the folder of a student: one look for one file, without reading it.

    Raises:
        MaskMillError: the place cannot be reached (``storage_unsupported``, ``storage_unreachable``, …).
    """
    return open_storage(uri).exists(RECORD_FILE)


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
    """Write a student into a folder, beside what the training has left there.

    The record comes last and names the weights by their fingerprint: a reader never takes one student's
    record for another one's weights.

    Args:
        output: local folder or object-store prefix.
        model: with the classifier of ``ontology``.
        ontology: see ``StudentRecord``, as for all that follows.
        recipe: see there.
        labelling: see there.
        teacher: see there.
        text: see there; at least ``model``, ``pretrained``, ``fingerprint`` and ``precision``.
        metrics: see there.
        training: see there.
        versions: see there.
        overwrite: replace a student that is already there.

    Raises:
        MaskMillError: ``output_exists``, or the storage cannot be written.
    """
    from models.student.file import write_student

    assert model.num_classes == ontology.num_classes, "the classifier must be that of the ontology"
    absent = {"model", "pretrained", "fingerprint", "precision"} - set(text)
    assert not absent, f"text lacks {sorted(absent)}"
    storage = open_storage(output)
    if not overwrite and storage.exists(RECORD_FILE):
        raise WrongUse(
            "output_exists",
            f"There is a student in {storage.uri} already.",
            "Name another --output, or replace it with --overwrite.",
        )
    with tempfile.TemporaryDirectory() as folder:
        write_student(Path(folder), model)
        weights = (Path(folder) / WEIGHTS_FILE).read_bytes()
    record = StudentRecord(
        uri=storage.uri,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        fingerprint=hashlib.sha256(weights).hexdigest(),
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
    storage.write_bytes(WEIGHTS_FILE, weights)
    storage.write_json(RECORD_FILE, record.to_dict())
    return record


def read_student_record(uri: str | Path) -> StudentRecord:
    """What is recorded about a student; the weights are not touched.

    Raises:
        MaskMillError: ``model_missing`` if this is no student's folder, ``model_damaged``,
            ``newer_version``.
    """
    storage = open_storage(uri)
    try:
        data = storage.read_json(RECORD_FILE, None)
    except MaskMillError as error:
        if error.code != "json_invalid":
            raise
        raise _damaged(error.message) from error
    if data is None:
        raise _missing(storage.uri, f"there is no {RECORD_FILE}")
    return StudentRecord.from_dict(data, uri=storage.uri)


def read_student_weights(record: StudentRecord) -> bytes:
    """The bytes of a student's weights file, proven to be the ones that the record names.

    Raises:
        MaskMillError: ``model_damaged``.
    """
    storage: Storage = open_storage(record.uri)
    try:
        data = storage.read_bytes(WEIGHTS_FILE)
    except FileNotFoundError as error:
        raise _damaged(f"{record.uri} has no {WEIGHTS_FILE}.") from error
    found = hashlib.sha256(data).hexdigest()
    if found != record.fingerprint:
        raise _damaged(
            f"{record.uri}/{WEIGHTS_FILE} (SHA-256 {found[:12]}) is not the file that its {RECORD_FILE} "
            f"names ({record.fingerprint[:12]})."
        )
    return data


def load_student(record: StudentRecord, *, device: torch.device, dtype: torch.dtype) -> DeepLab:
    """The network of a student, in evaluation mode, with the classifier of ``record.ontology``.

    Raises:
        MaskMillError: ``model_damaged``, and as ``models.student.file.read_student``.
    """
    from models.student.file import read_student

    return read_student(read_student_weights(record), device, dtype)


def _missing(uri: str, why: str) -> MaskMillError:
    return WrongUse(
        "model_missing",
        f"{uri} is no student's folder: {why}.",
        "Give the --output of a finished maskmill train; on a cluster, on storage that every node reaches.",
    )


def _damaged(message: str) -> MaskMillError:
    return Damaged("model_damaged", message, _RETRAIN)
