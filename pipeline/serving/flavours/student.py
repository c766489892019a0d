"""A student as an MLflow model: images in, masks out; see ``pipeline.serving.flavours.common``.

    model = mlflow.pyfunc.load_model("models:/pets@champion", model_config={"paths": True})
    out = model.predict([{"image": "cat.jpg"}, {"image": open("dog.png", "rb").read()}])
    mask = np.asarray(PIL.Image.open(io.BytesIO(out["mask"][0])))   # class ids at image size
    names = model.metadata.metadata["classes"]                      # names[id]; ignore_index where unsure

``mlflow models serve`` takes the same rows as JSON, images as ``data:`` URIs, and returns the PNGs in
base64.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from pipeline.files import images
from pipeline.files.storage import open_storage
from pipeline.labelling.base import BaseLabeller
from pipeline.labelling.prepare import prepare_labeller, student_recipe
from pipeline.serving.flavours.common import (
    ImageModel,
    LoggedModel,
    Row,
    example_picture,
    log_model,
    save_model,
    told,
)
from pipeline.table.labels import encode_confidence, encode_mask
from pipeline.trained.record import read_trained_weights
from pipeline.trained.student import (
    RECORD_FILE,
    WEIGHTS_FILE,
    StudentRecord,
    read_student_record,
)

if TYPE_CHECKING:
    from mlflow.models import Model
    from mlflow.tracking import MlflowClient

_ROWS_AT_ONCE = 64  # decoded images in memory


class StudentModel(ImageModel):
    """A mask of class ids for each image.

    ``mask``: PNG of class ids at image size (8 bits, 16 above 254 classes). ``confidence``: PNG of
    round(255 p) before any threshold. ``min_confidence``: pixels below it become ``ignore_index``; a class's
    own threshold takes precedence. ``batch_size`` in ``model_config``: images per batch; 0 is automatic.
    """

    ARTIFACT = "student"
    CONFIG: ClassVar = {**ImageModel.CONFIG, "batch_size": 0}
    OUTPUTS: ClassVar = {"mask": "binary", "confidence": "binary"}
    PARAMS: ClassVar = {"min_confidence": 0.0}

    _record: StudentRecord
    _labeller: BaseLabeller

    def load(self, folder: str) -> None:
        """See ``ImageModel.load``."""
        recipe, ontology = student_recipe(folder)
        recipe = recipe.replace(precision=self.config["precision"], batch_size=int(self.config["batch_size"]))
        self._record = read_student_record(folder)
        labeller = prepare_labeller(recipe, ontology).build(threads=int(self.config["threads"]))
        assert isinstance(labeller, BaseLabeller)
        self._labeller = labeller

    def answer(
        self, rows: list[Row], cells: Mapping[str, Sequence[Any]], params: Mapping[str, float]
    ) -> None:
        """See ``ImageModel.answer``."""
        thresholds = self._record.ontology.thresholds(default=params["min_confidence"])
        labeller = self._labeller.with_thresholds(() if thresholds is None else thresholds.tolist())
        todo = zip(rows, cells["image"], strict=True)
        while chosen := list(itertools.islice(todo, _ROWS_AT_ONCE)):
            self._label(labeller, chosen)

    def _label(self, labeller: BaseLabeller, chosen: list[tuple[Row, Any]]) -> None:
        buckets: dict[tuple[int, ...], list[tuple[Row, np.ndarray]]] = {}
        for row, cell in chosen:
            try:
                image = self.decode(cell, max_pixels=self._record.labelling.max_pixels)
            except images.ImageError as error:
                row["error"] = told(error)
                continue
            row["height"], row["width"] = image.shape[:2]
            seen = images.fit(image, self._record.labelling)
            buckets.setdefault(seen.shape, []).append((row, seen))
        for members in buckets.values():
            for start in range(0, len(members), labeller.batch_size):
                batch = members[start : start + labeller.batch_size]
                predictions = labeller.label(
                    [seen for _, seen in batch], [(row["height"], row["width"]) for row, _ in batch]
                )
                for (row, _), prediction in zip(batch, predictions, strict=True):
                    row["mask"] = encode_mask(prediction.labels)
                    row["confidence"] = encode_confidence(prediction.confidence)


def save_student_model(folder: str | Path, path: str | Path, *, mlflow_model: Model | None = None) -> None:
    """Write a student as an MLflow model folder.

    Args:
        folder: the student's, local or in an object store.
        path: of the model folder, which must be empty or not exist.
        mlflow_model: see ``pipeline.serving.flavours.common.save_model``.

    Raises:
        MaskMillError: as ``pipeline.trained.student.read_student_record`` and ``read_trained_weights``;
            ``output_exists``.
    """
    record = read_student_record(folder)
    read_trained_weights(record)  # they must be the ones that the record names
    save_model(
        path,
        StudentModel,
        source=open_storage(record.uri),
        files=(RECORD_FILE, WEIGHTS_FILE),
        example=pd.DataFrame({"image": [example_picture()]}),
        described={
            "classes": list(record.ontology.names),
            "ignore_index": record.ontology.ignore_index,
            "ontology_hash": record.ontology.hash,
            "student_fingerprint": record.fingerprint,
        },
        mlflow_model=mlflow_model,
    )


def log_student(
    client: MlflowClient,
    folder: str | Path,
    *,
    run_id: str,
    register_as: str | None = None,
    alias: str | None = "challenger",
    tags: Mapping[str, str] | None = None,
    description: str | None = None,
) -> LoggedModel:
    """Log a student to MLflow; see ``pipeline.serving.flavours.common.log_model``.

    Raises:
        MaskMillError: as ``save_student_model``.
        mlflow.exceptions.MlflowException: the server refuses or does not answer.
    """
    record = read_student_record(folder)
    return log_model(
        client,
        lambda path, described: save_student_model(folder, path, mlflow_model=described),
        name="student",
        params={"student_fingerprint": record.fingerprint, "ontology_hash": record.ontology.hash},
        run_id=run_id,
        register_as=register_as,
        alias=alias,
        tags=tags,
        description=description,
    )
