"""A student as an MLflow model: image bytes or addresses in, masks out.

The saved model is complete: the student's two files as artifacts, the code of ``models`` and ``pipeline``,
and the packages that they need. Its weights are safetensors, and the model itself is a file of code; nothing
in it is pickled. It loads without MaskMill installed:

    model = mlflow.pyfunc.load_model("models:/pets@champion")
    out = model.predict([{"image": "cat.jpg"}, {"image": open("dog.png", "rb").read()}])
    mask = np.asarray(PIL.Image.open(io.BytesIO(out["mask"][0])))   # class ids at image size
    names = model.metadata.metadata["classes"]                      # names[id]; ignore_index where unsure

``mlflow models serve`` takes the same rows as JSON, images as ``data:`` URIs, and answers with the PNGs in
base64. Strings are opened with the rights of the process that serves: who may send paths and URIs to it may
see the outlines of any image that it can read.
"""

from __future__ import annotations

import base64
import binascii
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from mlflow.pyfunc import PythonModel

from models.errors import MaskMillError
from pipeline import images
from pipeline.labels import encode_confidence, encode_mask
from pipeline.ontology import Ontology
from pipeline.storage import open_storage
from pipeline.student import (
    RECORD_FILE,
    WEIGHTS_FILE,
    StudentRecord,
    read_student_record,
    read_student_weights,
)
from pipeline.student_labeller import StudentLabeller

if TYPE_CHECKING:
    from mlflow.models import Model
    from mlflow.tracking import MlflowClient

OUTPUT_COLUMNS = ("mask", "confidence", "height", "width", "error")
REQUIREMENTS = (
    "mlflow",
    "fsspec",
    "numpy",
    "open_clip_torch",
    "opencv-python-headless",
    "pandas",
    "pillow",
    "pyarrow",
    "pydantic",
    "pyyaml",
    "s3fs",
    "safetensors",
    "timm",
    "torch",
    "torchvision",
)
"""Distributions that the saved code imports."""

_ENTRY = """\
import mlflow

from pipeline.student_pyfunc import StudentModel

mlflow.models.set_model(StudentModel())
"""
"""What MLflow runs to get the model ("models from code")."""
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
        from models.precision import best_device, native_precision

        config: dict[str, Any] = {"precision": "auto", "batch_size": 0, "threads": 0} | dict(
            context.model_config or {}
        )
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
            MaskMillError: ``min_confidence_invalid``.
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
                image = images.decode(_encoded(cell), max_pixels=settings.max_pixels)
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
        mlflow_model: MLflow's description that the model is added to; None starts a new one.

    Raises:
        MaskMillError: as ``pipeline.student.read_student_record`` and ``read_student_weights``;
            ``model_exists``.
    """
    from pipeline.tracking.destination import FLUSH_TIMEOUT_S, set_limits

    set_limits(FLUSH_TIMEOUT_S)
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise MaskMillError("model_exists", f"There is something at {path} already.", "Name another path.")
    record = read_student_record(folder)
    source = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as made:
        entry, student = Path(made, "student_model.py"), Path(made, "student")
        entry.write_text(_ENTRY)
        student.mkdir()
        (student / WEIGHTS_FILE).write_bytes(read_student_weights(record))
        (student / RECORD_FILE).write_bytes(open_storage(record.uri).read_bytes(RECORD_FILE))
        mlflow.pyfunc.save_model(
            path=str(path),
            python_model=str(entry),
            artifacts={"student": str(student)},
            code_paths=[str(source / "models"), str(source / "pipeline")],
            signature=_signature(),
            input_example=_example(),
            pip_requirements=_requirements(),
            model_config={"precision": "auto", "batch_size": 0, "threads": 0},
            metadata={
                "classes": list(record.ontology.names),
                "ignore_index": record.ontology.ignore_index,
                "ontology_hash": record.ontology.hash,
                "student_fingerprint": record.fingerprint,
            },
            mlflow_model=mlflow_model,
        )


@dataclass(frozen=True)
class LoggedStudent:
    """Where a student is in MLflow.

    Attributes:
        model_id: of the logged model.
        uri: what ``mlflow.pyfunc.load_model`` takes.
        version: in the registry; None if it was not registered.
    """

    model_id: str
    uri: str
    version: str | None


def log_student(
    client: MlflowClient,
    folder: str | Path,
    *,
    run_id: str,
    register_as: str | None = None,
    alias: str | None = "challenger",
) -> LoggedStudent:
    """Put a student into MLflow as a model of a run and, if it gets a name, as a version in the registry.

    Works through the client that it is given; the process's own tracking URI and active run stay as they are.

    Args:
        client: as ``pipeline.tracking.destination.connect`` makes it.
        folder: the student's.
        run_id: the run that trained it.
        register_as: name of the registered model, made if there is none.
        alias: moved to the new version; None moves none.

    Raises:
        MaskMillError: as ``save_student_model``.
        mlflow.exceptions.MlflowException: the server refuses, or does not answer.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    record = read_student_record(folder)
    experiment = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(
        experiment_id=experiment,
        name="student",
        source_run_id=run_id,
        model_type="segmentation",
        params={"student_fingerprint": record.fingerprint, "ontology_hash": record.ontology.hash},
    )
    try:
        with tempfile.TemporaryDirectory() as made:
            described = Model(
                artifact_path=logged.artifact_location,
                model_uuid=logged.model_id,
                run_id=run_id,
                model_id=logged.model_id,
            )
            save_student_model(folder, Path(made, "model"), mlflow_model=described)
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
            client.log_model_artifacts(logged.model_id, str(Path(made, "model")))
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    uri = f"models:/{logged.model_id}"
    if register_as is None:
        return LoggedStudent(logged.model_id, uri, None)
    _ensure_registered(client, register_as)
    version = client.create_model_version(
        register_as,
        # Not the models:/ URI: a database's registry would look that up in the process's own tracking URI.
        source=logged.artifact_location,
        run_id=run_id,
        model_id=logged.model_id,
    ).version
    if alias is not None:
        client.set_registered_model_alias(register_as, alias, version)
    return LoggedStudent(logged.model_id, uri, str(version))


def _ensure_registered(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _thresholds(ontology: Ontology, params: Mapping[str, Any]) -> list[float]:
    least = float(params.get("min_confidence", 0.0))
    if not 0 <= least <= 1:
        raise MaskMillError(
            "min_confidence_invalid", f"min_confidence {least:g} is no probability.", "Give one from 0 to 1."
        )
    thresholds = ontology.thresholds(default=least)
    return [0.0] * ontology.num_classes if thresholds is None else thresholds.tolist()


def _encoded(cell: Any) -> bytes:
    """The bytes of an image file, from what a row holds."""
    if isinstance(cell, bytes | bytearray | memoryview):
        return bytes(cell)
    if not isinstance(cell, str):
        raise images.ImageError("not_an_image", f"{type(cell).__name__} is neither bytes nor an address")
    if cell.startswith("data:"):
        head, _, body = cell.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("it is not in base64")
            return base64.b64decode(body, validate=True)
        except (ValueError, binascii.Error) as error:
            raise images.ImageError("unreadable", f"data URI: {error}") from error
    return images.fetch(cell)


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


def _example() -> tuple[pd.DataFrame, dict[str, float]]:
    """One small picture as JSON clients send it, and the parameters."""
    import cv2

    ramp = np.linspace(0, 255, 32, dtype=np.uint8)
    picture = np.stack([*np.meshgrid(ramp, ramp), np.full((32, 32), 128, np.uint8)], 2)
    encoded = cv2.imencode(".png", picture)[1].tobytes()
    text = f"data:image/png;base64,{base64.b64encode(encoded).decode()}"
    return pd.DataFrame({"image": [text]}), {"min_confidence": 0.0}


def _requirements() -> list[str]:
    """The packages with the versions that are installed here, without local labels such as ``+cu128``."""
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS]
