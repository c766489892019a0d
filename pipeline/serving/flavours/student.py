"""A student as an MLflow model: image bytes or addresses in, masks out.

The saved model is complete (``pipeline.serving.flavours.common``), with the student's two files:

    model = mlflow.pyfunc.load_model("models:/pets@champion")
    out = model.predict([{"image": "cat.jpg"}, {"image": open("dog.png", "rb").read()}])
    mask = np.asarray(PIL.Image.open(io.BytesIO(out["mask"][0])))   # class ids at image size
    names = model.metadata.metadata["classes"]                      # names[id]; ignore_index where unsure

``mlflow models serve`` takes the same rows as JSON, images as ``data:`` URIs, and answers with the PNGs in
base64. Strings are opened with the rights of the process that serves: who may send paths and URIs to it may
see the outlines of any image that it can read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from mlflow.pyfunc import PythonModel

from models.errors import WrongUse
from pipeline.files import images
from pipeline.files.storage import open_storage
from pipeline.labelling.student import StudentLabeller
from pipeline.ontology.ontology import Ontology
from pipeline.serving.flavours.common import LoggedModel, encoded, example_picture, log_model, save_model
from pipeline.table.labels import encode_confidence, encode_mask
from pipeline.trained.student import (
    RECORD_FILE,
    WEIGHTS_FILE,
    StudentRecord,
    read_student_record,
    read_student_weights,
)

if TYPE_CHECKING:
    from mlflow.models import Model
    from mlflow.tracking import MlflowClient

OUTPUT_COLUMNS = ("mask", "confidence", "height", "width", "error")
_CONFIG = {"precision": "auto", "batch_size": 0, "threads": 0}
_ROWS_AT_ONCE = 64  # decoded images in memory


class StudentModel(PythonModel):
    """What MLflow calls.

    ``model_config`` of ``mlflow.pyfunc.load_model`` may set ``precision`` (``auto``, ``fp32``, ``bf16``,
    ``fp16``), ``batch_size`` (0 chooses) and ``threads`` (of the CPU; 0 leaves torch's choice).
    """

    _record: StudentRecord
    _labeller: StudentLabeller

    def load_context(self, context: Any) -> None:
        """Load the student from the artifacts."""
        from models.device import best_device, native_precision

        config: dict[str, Any] = _CONFIG | dict(context.model_config or {})
        precision = config["precision"]
        self._record = read_student_record(context.artifacts["student"])
        self._labeller = StudentLabeller(
            uri=self._record.uri,
            thresholds=[0.0] * self._record.ontology.num_classes,
            precision=native_precision(best_device()) if precision == "auto" else precision,
            batch_size=int(config["batch_size"]),
            ignore_index=self._record.ontology.ignore_index,
            threads=int(config["threads"]),
        )

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None
    ) -> pd.DataFrame:
        """Segment images.

        Args:
            context: MLflow's; not used.
            model_input: column ``image``, one image a row: the bytes of a file, or a string: a path or URI,
                or a ``data:`` URI in base64, as JSON clients need it.
            params: ``min_confidence`` in [0, 1]: pixels below it become ``ignore_index``; a class's own
                threshold takes precedence.

        Returns:
            One row for each image, in the same order and with the same index: ``mask``, PNG bytes of class
            ids at image size (8 bits, 16 above 254 classes); ``confidence``, PNG bytes of round(255 p) before
            any threshold; ``height`` and ``width`` in pixels after the EXIF orientation is applied;
            ``error``, None or "code: message", with the others None.

        Raises:
            MaskMillError: ``setting_invalid``.
        """
        ontology = self._record.ontology
        labeller = self._labeller.with_thresholds(_thresholds(ontology, params or {}))
        cells = list(model_input["image"])
        rows: list[dict[str, Any]] = []
        for start in range(0, len(cells), _ROWS_AT_ONCE):
            rows += self._rows(labeller, cells[start : start + _ROWS_AT_ONCE])
        table = pd.DataFrame(rows, columns=list(OUTPUT_COLUMNS), index=model_input.index, dtype=object)
        return table.astype({"height": "Int64", "width": "Int64"})

    def _rows(self, labeller: StudentLabeller, cells: list[Any]) -> list[dict[str, Any]]:
        settings = self._record.labelling
        rows: list[dict[str, Any]] = [dict.fromkeys(OUTPUT_COLUMNS) for _ in cells]
        resized: dict[int, np.ndarray] = {}
        buckets: dict[tuple[int, int], list[int]] = {}
        for index, cell in enumerate(cells):
            try:
                image = images.decode(encoded(cell), max_pixels=settings.max_pixels)
            except images.ImageError as error:
                rows[index]["error"] = f"{error.code}: {error.message}"
                continue
            height, width = image.shape[:2]
            rows[index] |= {"height": height, "width": width}
            size = images.target_size(height, width, scale=settings.scale, keep_ratio=settings.keep_ratio)
            resized[index] = images.resize(image, size, method=settings.resize)
            buckets.setdefault(size, []).append(index)
        for members in buckets.values():
            for start in range(0, len(members), labeller.batch_size):
                chosen = members[start : start + labeller.batch_size]
                predictions = labeller.label(
                    [resized[index] for index in chosen],
                    [(rows[index]["height"], rows[index]["width"]) for index in chosen],
                )
                for index, prediction in zip(chosen, predictions, strict=True):
                    rows[index]["mask"] = encode_mask(prediction.labels)
                    rows[index]["confidence"] = encode_confidence(prediction.confidence)
        return rows


def save_student_model(folder: str | Path, path: str | Path, *, mlflow_model: Model | None = None) -> None:
    """Write a student as an MLflow model folder.

    Args:
        folder: the student's, local or in an object store.
        path: of the model folder; must not exist, or be empty.
        mlflow_model: see ``pipeline.serving.flavours.common.save_model``.

    Raises:
        MaskMillError: as ``pipeline.trained.student.read_student_record`` and ``read_student_weights``;
            ``output_exists``.
    """
    record = read_student_record(folder)
    with tempfile.TemporaryDirectory() as made:
        files = Path(made, "student")
        files.mkdir()
        (files / WEIGHTS_FILE).write_bytes(read_student_weights(record))
        (files / RECORD_FILE).write_bytes(open_storage(record.uri).read_bytes(RECORD_FILE))
        save_model(
            path,
            StudentModel,
            files=files,
            signature=_signature(),
            example=(pd.DataFrame({"image": [example_picture()]}), {"min_confidence": 0.0}),
            config=_CONFIG,
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
) -> LoggedModel:
    """Put a student into MLflow; see ``pipeline.serving.flavours.common.log_model``.

    Raises:
        MaskMillError: as ``save_student_model``.
        mlflow.exceptions.MlflowException: the server refuses, or does not answer.
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
    )


def _thresholds(ontology: Ontology, params: Mapping[str, Any]) -> list[float]:
    least = float(params.get("min_confidence", 0.0))
    if not 0 <= least <= 1:
        raise WrongUse(
            "setting_invalid", f"min_confidence {least:g} is no probability.", "Give one from 0 to 1."
        )
    thresholds = ontology.thresholds(default=least)
    return [0.0] * ontology.num_classes if thresholds is None else thresholds.tolist()


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType

    return ModelSignature(
        # Bytes or text: MLflow's typed columns hold one kind only.
        inputs=Schema([ColSpec(AnyType(), "image")]),
        outputs=Schema(
            [
                ColSpec(DataType.binary, "mask", required=False),
                ColSpec(DataType.binary, "confidence", required=False),
                ColSpec(DataType.long, "height", required=False),
                ColSpec(DataType.long, "width", required=False),
                ColSpec(DataType.string, "error", required=False),
            ]
        ),
        params=ParamSchema([ParamSpec("min_confidence", DataType.double, 0.0)]),
    )
