"""A trained CLIPSeg as an MLflow model: images and prompts in, masks and probabilities out.

The saved model is complete (``pipeline.serving.flavours.common``), with the CLIP beneath the decoder. One
row is one question to one image: words, an example picture, or both:

    model = mlflow.pyfunc.load_model("models:/finder@champion")
    out = model.predict([
        {"image": "street.jpg", "text": "a red car"},
        {"image": "street.jpg", "example": "cup.jpg", "example_mask": "cup.png"},
    ], params={"threshold": 0.3})
    mask = np.asarray(PIL.Image.open(io.BytesIO(out["mask"][0])))   # 255 where it is, at image size

Rows of the same image share one pass through CLIP. ``mlflow models serve`` takes the same rows as JSON,
pictures as ``data:`` URIs, and answers with the PNGs in base64. Strings are opened with the rights of the
process that serves: who may send paths and URIs to it may see the outlines of any image that it can read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from mlflow.pyfunc import PythonModel

from models.clipseg.decoder import ClipSeg
from models.errors import MaskMillError, WrongUse
from pipeline.files import images
from pipeline.files.storage import open_storage
from pipeline.labelling.clipseg.labeller import stretched
from pipeline.labelling.clipseg.model import THRESHOLD, VISUAL_PROMPT, ClipSegWeights
from pipeline.labelling.clipseg.prompting import (
    decode_picture,
    embed_prompts,
    parse_style,
    probability_maps,
    visual_prompt_of,
)
from pipeline.serving.flavours.common import LoggedModel, encoded, example_picture, log_model, save_model
from pipeline.table.labels import encode_confidence, encode_mask
from pipeline.trained.clipseg import DECODER_FILE, HUGGING_FACE_FILES, RECORD_FILE, read_clipseg_record

if TYPE_CHECKING:
    from mlflow.models import Model
    from mlflow.tracking import MlflowClient

OUTPUT_COLUMNS = ("mask", "probability", "max_probability", "height", "width", "error")
_ARTIFACT = "clipseg"
_TEXT_WEIGHT = 0.5
_CONFIG = {"precision": "auto", "threads": 0}


class ClipSegModel(PythonModel):
    """What MLflow calls.

    ``model_config`` of ``mlflow.pyfunc.load_model`` may set ``precision`` (``auto``, ``fp32``, ``bf16``,
    ``fp16``) and ``threads`` (of the CPU; 0 leaves torch's choice).
    """

    _model: ClipSeg
    _size: int
    _example_size: int
    _threads: int

    def load_context(self, context: Any) -> None:
        """Load the model from the artifacts.

        Raises:
            MaskMillError: ``setting_invalid``; as ``ClipSegWeights.load``.
        """
        from models.device import DTYPES, best_device, native_precision

        config: dict[str, Any] = _CONFIG | dict(context.model_config or {})
        device = best_device()
        precision = native_precision(device) if config["precision"] == "auto" else config["precision"]
        if precision not in DTYPES:
            raise WrongUse(
                "setting_invalid",
                f"model_config: there is no precision {precision!r}.",
                f"Use auto, {', '.join(DTYPES)}.",
            )
        weights = ClipSegWeights(context.artifacts[_ARTIFACT])
        self._model = weights.load(device=device, dtype=DTYPES[precision])
        self._size, self._example_size = weights.sizes()
        self._threads = int(config["threads"])

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None
    ) -> pd.DataFrame:
        """Look for what each row asks for in its image.

        Args:
            context: MLflow's; not used.
            model_input: column ``image``, and ``text``, ``example`` and ``example_mask``, of which a row
                needs ``text`` or ``example`` (None, NaN, NA or "" is none). ``text``: words. The pictures are
                the bytes of a file, or a string: a path or URI, or a ``data:`` URI in base64, as JSON clients
                need it. ``example_mask`` is of its example's size, not black on the object; without one the
                whole example shows it.
            params: ``threshold`` in [0, 1], least probability of the mask's pixels; ``text_weight`` in
                [0, 1], share of the words where a row has words and an example.

        Returns:
            One row for each question, in the same order and with the same index: ``mask``, PNG bytes, 255
            where it is and 0 elsewhere, at image size; ``probability``, PNG bytes of round(255 p);
            ``max_probability``; ``height`` and ``width`` in pixels after the EXIF orientation is applied;
            ``error``, None or "code: message", with the others None.

        Raises:
            MaskMillError: ``threshold_invalid``, ``text_weight_invalid``.
        """
        threshold = _share(params, "threshold", THRESHOLD)
        text_weight = _share(params, "text_weight", _TEXT_WEIGHT)
        if self._threads:
            torch.set_num_threads(self._threads)
        absent = pd.Series([None] * len(model_input), index=model_input.index, dtype=object)
        cells = {name: list(model_input.get(name, absent)) for name in ("image", *_PROMPT)}
        rows: list[dict[str, Any]] = [dict.fromkeys(OUTPUT_COLUMNS) for _ in range(len(model_input))]
        known: dict[Hashable, torch.Tensor | str] = {}
        for members in _grouped(cells["image"]).values():
            asked = {}
            for index in members:
                prompt = tuple(cells[name][index] for name in _PROMPT)
                key = tuple(_key(cell, index) for cell in prompt)
                if key not in known:
                    known[key] = self._conditional(*prompt, text_weight=text_weight)
                conditional = known[key]
                if isinstance(conditional, str):
                    rows[index]["error"] = conditional
                else:
                    asked[index] = conditional
            self._answer(cells["image"][members[0]], asked, threshold, rows)
        table = pd.DataFrame(rows, columns=list(OUTPUT_COLUMNS), index=model_input.index, dtype=object)
        return table.astype({"height": "Int64", "width": "Int64", "max_probability": "Float64"})

    def _conditional(self, text: Any, example: Any, mask: Any, *, text_weight: float) -> torch.Tensor | str:
        """(E,), or what is wrong with the prompt."""
        try:
            if _is_none(text) and _is_none(example):
                raise WrongUse("prompt_invalid", "there is neither text nor example", "Give one.")
            if _is_none(example) and not _is_none(mask):
                raise WrongUse(
                    "example_unreadable", "there is an example_mask without its example", "Give both."
                )
            shown = None
            if not _is_none(example):
                picture = decode_picture(encoded(example), None if _is_none(mask) else encoded(mask))
                style = parse_style(VISUAL_PROMPT, self._example_size)
                shown = visual_prompt_of(picture, style, self._example_size)
            words = None if _is_none(text) else str(text)
            return embed_prompts(self._model, [(words, shown)], text_weight=text_weight)[0]
        except (MaskMillError, images.ImageError) as error:
            return f"{error.code}: {error.message}"

    def _answer(
        self, cell: Any, asked: Mapping[int, torch.Tensor], threshold: float, rows: list[dict[str, Any]]
    ) -> None:
        """Fill the rows of one image; those that have an error keep it."""
        if not asked:
            return
        try:
            image = images.decode(encoded(cell))
        except images.ImageError as error:
            for index in asked:
                rows[index]["error"] = f"{error.code}: {error.message}"
            return
        height, width = image.shape[:2]
        maps = probability_maps(self._model, image, torch.stack([*asked.values()]), size=self._size)
        for index, small in zip(asked, maps, strict=True):
            p = stretched(small[None], (height, width))[0].clamp(0, 1).cpu().numpy()
            rows[index] |= {
                "mask": encode_mask((p >= threshold).astype(np.uint8) * 255),
                "probability": encode_confidence(np.rint(p * 255).astype(np.uint8)),
                "max_probability": float(p.max()),
                "height": height,
                "width": width,
            }


_PROMPT = ("text", "example", "example_mask")


def save_clipseg_model(folder: str | Path, path: str | Path, *, mlflow_model: Model | None = None) -> None:
    """Write a trained CLIPSeg as an MLflow model folder.

    Args:
        folder: of ``pipeline.trained.clipseg.write_clipseg_folder``, local or in an object store.
        path: of the model folder; must not exist, or be empty.
        mlflow_model: see ``pipeline.serving.flavours.common.save_model``.

    Raises:
        MaskMillError: as ``read_clipseg_record``; ``model_unsupported`` where the folder does not hold the
            towers beneath, as that of a baseline over a large CLIP; ``output_exists``.
    """
    record = read_clipseg_record(folder)
    # The toy CLIP comes with the code; of others only Hugging Face's layout holds the weights.
    toy = record.clip["model"] == "toyclip" and record.model != "vitseg"
    if not (record.hugging_face or toy):
        raise WrongUse(
            "model_unsupported",
            f"{folder} holds a {record.model} decoder without the CLIP beneath it, and is not complete.",
            "Use it from its folder.",
        )
    storage = open_storage(folder)
    with tempfile.TemporaryDirectory() as made:
        files = Path(made, _ARTIFACT)
        files.mkdir()
        for name in (RECORD_FILE, DECODER_FILE, *HUGGING_FACE_FILES):
            if storage.exists(name):
                (files / name).write_bytes(storage.read_bytes(name))
        save_model(
            path,
            ClipSegModel,
            files=files,
            signature=_signature(),
            example=_example(),
            config=_CONFIG,
            described={"clip": record.clip["model"], "decoder_fingerprint": record.fingerprint},
            mlflow_model=mlflow_model,
        )


def log_clipseg(
    client: MlflowClient, folder: str | Path, *, run_id: str, register_as: str | None = None
) -> LoggedModel:
    """Put a trained CLIPSeg into MLflow; see ``pipeline.serving.flavours.common.log_model``.

    Raises:
        MaskMillError: as ``save_clipseg_model``.
        mlflow.exceptions.MlflowException: the server refuses, or does not answer.
    """
    record = read_clipseg_record(folder)
    return log_model(
        client,
        lambda path, described: save_clipseg_model(folder, path, mlflow_model=described),
        name=_ARTIFACT,
        params={"decoder_fingerprint": record.fingerprint, "clip_fingerprint": record.clip["fingerprint"]},
        run_id=run_id,
        register_as=register_as,
    )


def _grouped(cells: list[Any]) -> dict[Hashable, list[int]]:
    """Positions of the rows of each image, in order."""
    groups: dict[Hashable, list[int]] = {}
    for index, cell in enumerate(cells):
        groups.setdefault(_key(cell, index), []).append(index)
    return groups


def _key(cell: Any, index: int) -> Hashable:
    """What is the same where cells are; odd ones are like no other."""
    if _is_none(cell):
        return None
    return (type(cell).__name__, cell) if isinstance(cell, str | bytes) else index


def _is_none(cell: Any) -> bool:
    return bool(pd.isna(cell) or cell == "") if pd.api.types.is_scalar(cell) else False


def _share(params: Mapping[str, Any] | None, name: str, default: float) -> float:
    value = float((params or {}).get(name, default))
    if not 0 <= value <= 1:
        raise WrongUse(
            "setting_invalid", f"{name} {value:g} is not between 0 and 1.", "Give one from 0 to 1."
        )
    return value


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType

    return ModelSignature(
        # Bytes or text: MLflow's typed columns hold one kind only.
        inputs=Schema(
            [
                ColSpec(AnyType(), "image"),
                *(ColSpec(AnyType(), name, required=False) for name in _PROMPT),
            ]
        ),
        outputs=Schema(
            [
                ColSpec(DataType.binary, "mask", required=False),
                ColSpec(DataType.binary, "probability", required=False),
                ColSpec(DataType.double, "max_probability", required=False),
                ColSpec(DataType.long, "height", required=False),
                ColSpec(DataType.long, "width", required=False),
                ColSpec(DataType.string, "error", required=False),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("threshold", DataType.double, THRESHOLD),
                ParamSpec("text_weight", DataType.double, _TEXT_WEIGHT),
            ]
        ),
    )


def _example() -> tuple[pd.DataFrame, dict[str, float]]:
    """One image, asked with words and with a picture, as JSON clients send it, and the parameters."""
    picture = example_picture()
    rows = pd.DataFrame({"image": [picture] * 2, "text": ["something red", ""], "example": ["", picture]})
    return rows, {"threshold": THRESHOLD, "text_weight": _TEXT_WEIGHT}
