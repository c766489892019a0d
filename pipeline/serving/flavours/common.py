"""Shared by our MLflow models: rows of images in, rows of results out, and a self-contained folder.

A saved model contains its files as artifacts, the code of ``models`` and ``pipeline``, and a list of the
packages they need. The model itself is a Python file ("models from code"), and nothing is pickled. It loads
without MaskMill installed.

Images are the bytes of a file or, for JSON clients, a ``data:`` URI in base64. Paths and other URIs would be
opened with the rights of the serving process, so they are refused unless the model is loaded with
``mlflow.pyfunc.load_model(uri, model_config={"paths": True})``. Errors never quote what a file holds.
"""

from __future__ import annotations

import base64
import binascii
import io
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import mlflow
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from mlflow.pyfunc import PythonModel
from numpy.typing import NDArray
from PIL import Image

from models.device import DTYPES
from models.errors import MaskMillError, WrongUse
from pipeline.files import images
from pipeline.files.fetch import fetch
from pipeline.files.storage import Storage

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
    "platformdirs",
    "pyarrow",
    "pydantic",
    "pyyaml",
    "s3fs",
    "safetensors",
    "scipy",
    "timm",
    "torch",
    "torchvision",
    "typing_extensions",
)
"""Distributions imported by the saved code."""


Row = dict[str, Any]


class ImageModel(PythonModel):
    """The model that MLflow calls: rows with an image in, one row of results for each out.

    ``model_config`` of ``mlflow.pyfunc.load_model`` may set ``precision`` (``auto``, ``fp32``, ``bf16``,
    ``fp16``), ``threads`` (of the CPU; 0 leaves torch's choice) and ``paths`` (whether strings may name files
    and objects); a subclass may have more in ``CONFIG``.

    Attributes:
        ARTIFACT: name of the folder with the model's files.
        INPUTS: columns besides ``image``, all optional.
        OUTPUTS: MLflow type of each column that the subclass fills. Three more follow: ``height`` and
            ``width`` of the upright image in pixels, and ``error``, None or "code: message".
        PARAMS: parameters of ``predict``, in [0, 1], with their defaults.
    """

    ARTIFACT: ClassVar[str]
    CONFIG: ClassVar[dict[str, Any]] = {"precision": "auto", "threads": 0, "paths": False}
    INPUTS: ClassVar[tuple[str, ...]] = ()
    OUTPUTS: ClassVar[dict[str, str]]
    PARAMS: ClassVar[dict[str, float]]

    config: dict[str, Any]

    @abstractmethod
    def load(self, folder: str) -> None:
        """Load the model from its files, as ``self.config`` says."""

    @abstractmethod
    def answer(
        self, rows: list[Row], cells: Mapping[str, Sequence[Any]], params: Mapping[str, float]
    ) -> None:
        """Fill the results.

        Args:
            rows: one per input row, with every output column; a row with an error has no other values.
            cells: input columns; missing values are None.
            params: see ``PARAMS``.
        """

    @classmethod
    def columns(cls) -> dict[str, str]:
        """All output columns and their MLflow types."""
        return {**cls.OUTPUTS, "height": "long", "width": "long", "error": "string"}

    def load_context(self, context: Any) -> None:
        """Load the model from the artifacts.

        Raises:
            MaskMillError: ``setting_invalid``; as ``load``.
        """
        self.config = self.CONFIG | dict(context.model_config or {})
        if self.config["precision"] not in ("auto", *DTYPES):
            raise WrongUse(
                "setting_invalid",
                f"model_config: there is no precision {self.config['precision']!r}.",
                f"Use auto, {', '.join(DTYPES)}.",
            )
        self.load(context.artifacts[self.ARTIFACT])

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None
    ) -> pd.DataFrame:
        """Answer each row.

        Args:
            context: MLflow's; unused.
            model_input: column ``image`` and those of ``INPUTS``.
            params: see ``PARAMS``.

        Returns:
            One row per input row, in the same order and with the same index; see ``columns``.

        Raises:
            MaskMillError: ``setting_invalid`` for a parameter.
        """
        given = {name: _share(name, (params or {}).get(name, usual)) for name, usual in self.PARAMS.items()}
        if self.config["threads"]:
            torch.set_num_threads(int(self.config["threads"]))
        absent = pd.Series([None] * len(model_input), index=model_input.index, dtype=object)
        cells = {
            name: [None if _is_none(cell) else cell for cell in model_input.get(name, absent)]
            for name in ("image", *self.INPUTS)
        }
        columns = self.columns()
        rows: list[Row] = [dict.fromkeys(columns) for _ in range(len(model_input))]
        self.answer(rows, cells, given)
        table = pd.DataFrame(rows, columns=list(columns), index=model_input.index, dtype=object)
        numbers = {"long": "Int64", "double": "Float64"}
        return table.astype({name: numbers[kind] for name, kind in columns.items() if kind in numbers})

    def decode(self, cell: Any, *, max_pixels: int = images.MAX_PIXELS) -> NDArray[np.uint8]:
        """The image in a cell, uint8 (H, W, 3).

        Raises:
            ImageError: with a message that does not quote the file.
        """
        data = _encoded(cell, paths=bool(self.config["paths"]))
        try:
            return images.decode(data, max_pixels=max_pixels)
        except images.ImageError as error:
            raise images.ImageError(error.code, images.ERROR_CODES[error.code]) from None

    @classmethod
    def signature(cls) -> ModelSignature:
        """Of ``predict``."""
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
        from mlflow.types.schema import AnyType

        return ModelSignature(
            # Bytes or text: MLflow's typed columns hold one kind only.
            inputs=Schema(
                [
                    ColSpec(AnyType(), "image"),
                    *(ColSpec(AnyType(), name, required=False) for name in cls.INPUTS),
                ]
            ),
            outputs=Schema(
                [ColSpec(DataType[kind], name, required=False) for name, kind in cls.columns().items()]
            ),
            params=ParamSchema(
                [ParamSpec(name, DataType.double, usual) for name, usual in cls.PARAMS.items()]
            ),
        )


def told(error: MaskMillError | images.ImageError) -> str:
    """An error in the form of the column ``error``."""
    return f"{error.code}: {error.message}"


def _encoded(cell: Any, *, paths: bool) -> bytes:
    if isinstance(cell, bytes | bytearray | memoryview):
        return bytes(cell)
    if not isinstance(cell, str):
        raise images.ImageError("not_an_image", f"{type(cell).__name__} is neither bytes nor a data: URI")
    if cell.startswith("data:"):
        head, _, body = cell.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("it is not in base64")
            return base64.b64decode(body, validate=True)
        except (ValueError, binascii.Error) as error:
            raise images.ImageError("unreadable", f"data URI: {error}") from error
    if not paths:
        raise images.ImageError(
            "unsupported_uri",
            "paths and URIs are not opened unless the model is loaded with model_config={'paths': True}; "
            "send the bytes, or a data: URI in base64",
        )
    try:
        return fetch(cell)
    except images.ImageError as error:
        raise images.ImageError(error.code, images.ERROR_CODES[error.code]) from None


def _is_none(cell: Any) -> bool:
    return bool(pd.isna(cell) or cell == "") if pd.api.types.is_scalar(cell) else False


def _share(name: str, value: Any) -> float:
    share = float(value)
    if not 0 <= share <= 1:
        raise WrongUse(
            "setting_invalid", f"{name} {share:g} is not between 0 and 1.", "Give one from 0 to 1."
        )
    return share


@dataclass(frozen=True)
class LoggedModel:
    """A model in MLflow.

    Attributes:
        model_id: of the logged model.
        uri: what ``mlflow.pyfunc.load_model`` takes.
        name: in the registry; None if it was not registered.
        version: there.
        alias: that now points to it.
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
    model: type[ImageModel],
    *,
    source: Storage,
    files: Sequence[str],
    example: pd.DataFrame,
    described: Mapping[str, Any],
    mlflow_model: Model | None = None,
) -> None:
    """Write a model folder.

    Args:
        path: of the folder, which must be empty or not exist.
        model: a class of ``pipeline``, constructed without arguments.
        source: the folder that holds the model.
        files: names of files to copy into the model's artifact; missing ones are skipped.
        example: an example input.
        described: metadata of the model.
        mlflow_model: MLflow's description to which the model is added; None starts a new one.

    Raises:
        MaskMillError: ``output_exists``.
    """
    from pipeline.tracking.destination import FLUSH_TIMEOUT_S, set_limits

    set_limits(FLUSH_TIMEOUT_S)
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise WrongUse("output_exists", f"{path} already exists.", "Name another path.")
    code = Path(__file__).resolve().parents[3]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made, model.ARTIFACT)
        folder.mkdir()
        for name in files:
            if source.exists(name):
                (folder / name).write_bytes(source.read_bytes(name))
        entry = Path(made, f"{model.ARTIFACT}_model.py")
        entry.write_text(
            f"import mlflow\n\nfrom {model.__module__} import {model.__name__}\n\n"
            f"mlflow.models.set_model({model.__name__}())\n"
        )
        mlflow.pyfunc.save_model(
            path=str(path),
            python_model=str(entry),
            artifacts={model.ARTIFACT: str(folder)},
            code_paths=[str(code / "models"), str(code / "pipeline")],
            signature=model.signature(),
            input_example=(example, dict(model.PARAMS)),
            pip_requirements=_requirements(),
            model_config=dict(model.CONFIG),
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
    tags: Mapping[str, str] | None = None,
    description: str | None = None,
) -> LoggedModel:
    """Log a model to a run in MLflow and, given a name, register it as a new version.

    Only the given client is used; the process's own tracking URI and active run do not change.

    Args:
        client: from ``pipeline.tracking.destination.connect``.
        save: writes the model folder to a path, given MLflow's description.
        name: of the logged model.
        params: of the logged model.
        run_id: the run that trained it.
        register_as: name of the registered model, created if necessary.
        alias: to point to the new version; None for no alias.
        tags: of the new version; it never exists without them.
        description: of the new version, in Markdown.

    Raises:
        MaskMillError: as ``save``.
        mlflow.exceptions.MlflowException: the server refuses or does not answer.
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
        tags=dict(tags or {}),
        description=description,
        model_id=logged.model_id,
    ).version
    if alias is not None:
        client.set_registered_model_alias(register_as, alias, version)
    return LoggedModel(logged.model_id, uri, register_as, str(version), alias)


def example_picture() -> str:
    """A small picture as a ``data:`` URI, as JSON clients send it."""
    ramp = np.linspace(0, 255, 32, dtype=np.uint8)
    picture = np.stack([*np.meshgrid(ramp, ramp), np.full((32, 32), 128, np.uint8)], 2)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _ensure_registered(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _requirements() -> list[str]:
    """The packages at the versions installed here, without local labels such as ``+cu128``."""
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS]
