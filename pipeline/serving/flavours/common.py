"""What our models have in common in MLflow: a folder that is complete, and a place in a run and the registry.

A saved model holds its files as artifacts, the code of ``models`` and ``pipeline``, and the names of the
packages that they need; the model itself is a file of code ("models from code"), and nothing in it is
pickled. It loads without MaskMill installed.
"""

from __future__ import annotations

import base64
import binascii
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel

from models.errors import WrongUse
from pipeline.files import images

if TYPE_CHECKING:
    from mlflow.models import Model, ModelSignature
    from mlflow.tracking import MlflowClient

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


@dataclass(frozen=True)
class LoggedModel:
    """Where a model is in MLflow.

    Attributes:
        model_id: of the logged model.
        uri: what ``mlflow.pyfunc.load_model`` takes.
        name: in the registry; None if it was not registered.
        version: there.
        alias: that was moved to it.
    """

    model_id: str
    uri: str
    name: str | None = None
    version: str | None = None
    alias: str | None = None

    def __str__(self) -> str:
        if self.name is None:
            return self.uri
        return f"{self.uri}, {self.name} version {self.version}{f' ({self.alias})' if self.alias else ''}"


def save_model(
    path: str | Path,
    model: type[PythonModel],
    *,
    files: Path,
    signature: ModelSignature,
    example: tuple[Any, Mapping[str, Any]],
    config: Mapping[str, Any],
    described: Mapping[str, Any],
    mlflow_model: Model | None = None,
) -> None:
    """Write a model folder.

    Args:
        path: of the folder; must not exist, or be empty.
        model: a class of ``pipeline`` that is made without arguments.
        files: local folder that becomes the model's artifact, of the same name.
        signature: of ``predict``.
        example: an input and its parameters.
        config: default of ``model_config``.
        described: metadata of the model.
        mlflow_model: MLflow's description that the model is added to; None starts a new one.

    Raises:
        MaskMillError: ``output_exists``.
    """
    from pipeline.tracking.destination import FLUSH_TIMEOUT_S, set_limits

    set_limits(FLUSH_TIMEOUT_S)
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise WrongUse("output_exists", f"There is something at {path} already.", "Name another path.")
    source = Path(__file__).resolve().parents[3]
    with tempfile.TemporaryDirectory() as made:
        entry = Path(made, f"{files.name}_model.py")
        entry.write_text(
            f"import mlflow\n\nfrom {model.__module__} import {model.__name__}\n\n"
            f"mlflow.models.set_model({model.__name__}())\n"
        )
        mlflow.pyfunc.save_model(
            path=str(path),
            python_model=str(entry),
            artifacts={files.name: str(files)},
            code_paths=[str(source / "models"), str(source / "pipeline")],
            signature=signature,
            input_example=example,
            pip_requirements=_requirements(),
            model_config=dict(config),
            metadata=dict(described),
            mlflow_model=mlflow_model,
        )


def log_model(
    client: MlflowClient,
    save: Callable[[Path, Model], None],
    *,
    name: str,
    params: Mapping[str, str],
    run_id: str,
    register_as: str | None = None,
    alias: str | None = "challenger",
) -> LoggedModel:
    """Put a model into MLflow as one of a run and, if it gets a name, as a version in the registry.

    Works through the client that it is given; the process's own tracking URI and active run stay as they are.

    Args:
        client: as ``pipeline.tracking.destination.connect`` makes it.
        save: writes the model folder to a path, given MLflow's description.
        name: of the logged model.
        params: of the logged model.
        run_id: the run that trained it.
        register_as: name of the registered model, made if there is none.
        alias: moved to the new version; None moves none.

    Raises:
        MaskMillError: as ``save``.
        mlflow.exceptions.MlflowException: the server refuses, or does not answer.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    experiment = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(
        experiment_id=experiment,
        name=name,
        source_run_id=run_id,
        model_type="segmentation",
        params=dict(params),
    )
    try:
        with tempfile.TemporaryDirectory() as made:
            described = Model(
                artifact_path=logged.artifact_location,
                model_uuid=logged.model_id,
                run_id=run_id,
                model_id=logged.model_id,
            )
            save(Path(made, "model"), described)
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
            client.log_model_artifacts(logged.model_id, str(Path(made, "model")))
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    uri = f"models:/{logged.model_id}"
    if register_as is None:
        return LoggedModel(logged.model_id, uri)
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
    return LoggedModel(logged.model_id, uri, register_as, str(version), alias)


def encoded(cell: Any) -> bytes:
    """The bytes of an image file, from what a row holds: them, a path or URI, or a ``data:`` URI in base64.

    Raises:
        ImageError: ``not_an_image``, ``unreadable``; as ``pipeline.files.images.fetch``.
    """
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


def example_picture() -> str:
    """A small picture as JSON clients send it."""
    import cv2

    ramp = np.linspace(0, 255, 32, dtype=np.uint8)
    picture = np.stack([*np.meshgrid(ramp, ramp), np.full((32, 32), 128, np.uint8)], 2)
    data = cv2.imencode(".png", picture)[1].tobytes()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _ensure_registered(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _requirements() -> list[str]:
    """The packages with the versions that are installed here, without local labels such as ``+cu128``."""
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS]
