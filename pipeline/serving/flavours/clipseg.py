"""A trained CLIPSeg as an MLflow model: images and prompts in, masks and probabilities out.

The saved model is self-contained (``pipeline.serving.flavours.common``) and includes the CLIP below the
decoder. Each row is one prompt for one image: text, an example picture, or both:

    model = mlflow.pyfunc.load_model("models:/finder@champion", model_config={"paths": True})
    out = model.predict([
        {"image": "street.jpg", "text": "a red car"},
        {"image": "street.jpg", "example": "cup.jpg", "example_mask": "cup.png"},
    ], params={"threshold": 0.3})
    mask = np.asarray(PIL.Image.open(io.BytesIO(out["mask"][0])))   # 255 on the object, at image size

Rows of the same image share one pass through CLIP. ``mlflow models serve`` takes the same rows as JSON,
pictures as ``data:`` URIs, and returns the PNGs in base64.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch

from models.errors import MaskMillError, WrongUse
from pipeline.files import images
from pipeline.files.storage import open_storage
from pipeline.labelling.clipseg.model import THRESHOLD, ClipSegWeights
from pipeline.labelling.clipseg.pictures import as_picture
from pipeline.labelling.clipseg.prompting import Finder, levels
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
from pipeline.trained.clipseg import DECODER_FILE, HUGGING_FACE_FILES, RECORD_FILE, read_clipseg_record

if TYPE_CHECKING:
    from mlflow.models import Model
    from mlflow.tracking import MlflowClient


class ClipSegModel(ImageModel):
    """A mask and a probability map for each row.

    A row needs ``text`` or ``example``; None, NaN, NA and "" count as missing. ``example_mask`` has the size
    of the example and is non-black on the object; without it, the whole example shows the object. ``mask``:
    PNG, 255 on the object and 0 elsewhere, at image size; ``probability``: PNG of round(255 p).
    ``threshold``: minimum probability of a pixel in the mask; ``text_weight``: weight of the text in rows
    with text and example.
    """

    ARTIFACT = "clipseg"
    INPUTS = ("text", "example", "example_mask")
    OUTPUTS: ClassVar = {"mask": "binary", "probability": "binary", "max_probability": "double"}
    PARAMS: ClassVar = {"threshold": THRESHOLD, "text_weight": 0.5}

    _finder: Finder

    def load(self, folder: str) -> None:
        """See ``ImageModel.load``."""
        self._finder = Finder(ClipSegWeights(folder), precision=self.config["precision"])
        assert self._finder.model is not None, "loaded now"

    def answer(
        self, rows: list[Row], cells: Mapping[str, Sequence[Any]], params: Mapping[str, float]
    ) -> None:
        """See ``ImageModel.answer``."""
        known: dict[Hashable, torch.Tensor | str] = {}
        for members in _grouped(cells["image"]).values():
            asked = {}
            for index in members:
                prompt = [cells[name][index] for name in self.INPUTS]
                key = tuple(_key(cell, index) for cell in prompt)
                if key not in known:
                    known[key] = self._conditional(*prompt, text_weight=params["text_weight"])
                conditional = known[key]
                if isinstance(conditional, str):
                    rows[index]["error"] = conditional
                else:
                    asked[index] = conditional
            if asked:
                self._find(cells["image"][members[0]], asked, params["threshold"], rows)

    def _conditional(self, text: Any, example: Any, mask: Any, *, text_weight: float) -> torch.Tensor | str:
        """The conditional (E,), or the error in the prompt."""
        try:
            if text is None and example is None:
                raise WrongUse("prompt_invalid", "the row has neither text nor example", "Give one.")
            if example is None and mask is not None:
                raise WrongUse("prompt_invalid", "the row has an example_mask but no example", "Give both.")
            shown = None
            if example is not None:
                picture = as_picture(self.decode(example), None if mask is None else self.decode(mask))
                shown = self._finder.show(picture)
            words = None if text is None else str(text)
            return self._finder.embed([(words, shown)], text_weight=text_weight)[0]
        except (MaskMillError, images.ImageError) as error:
            return told(error)

    def _find(self, cell: Any, asked: Mapping[int, torch.Tensor], threshold: float, rows: list[Row]) -> None:
        """Fill the rows of one image that have no error."""
        try:
            image = self.decode(cell)
        except images.ImageError as error:
            for index in asked:
                rows[index]["error"] = told(error)
            return
        size = image.shape[0], image.shape[1]
        for index, p in zip(
            asked, self._finder.find(image, torch.stack([*asked.values()]), size), strict=True
        ):
            rows[index] |= {
                "mask": encode_mask((p >= threshold).astype(np.uint8) * 255),
                "probability": encode_confidence(levels(p)),
                "max_probability": float(p.max()),
                "height": size[0],
                "width": size[1],
            }


def save_clipseg_model(folder: str | Path, path: str | Path, *, mlflow_model: Model | None = None) -> None:
    """Write a trained CLIPSeg as an MLflow model folder.

    Args:
        folder: of ``pipeline.trained.clipseg.write_clipseg_folder``, local or in an object store.
        path: of the model folder, which must be empty or not exist.
        mlflow_model: see ``pipeline.serving.flavours.common.save_model``.

    Raises:
        MaskMillError: as ``read_clipseg_record``; ``model_unsupported`` if the folder does not
            include the towers, as with a baseline on a large CLIP; ``output_exists``.
    """
    record = read_clipseg_record(folder)
    # The toy CLIP comes with the code; of others only Hugging Face's layout holds the weights.
    toy = record.clip["model"] == "toyclip" and record.model != "vitseg"
    if not (record.hugging_face or toy):
        raise WrongUse(
            "model_unsupported",
            f"{folder} holds a {record.model} decoder without its CLIP, so it cannot be saved as one model.",
            "Load it from its folder instead.",
        )
    rows = {
        "image": [example_picture()] * 2,
        "text": ["something red", ""],
        "example": ["", example_picture()],
    }
    save_model(
        path,
        ClipSegModel,
        source=open_storage(folder),
        files=(RECORD_FILE, DECODER_FILE, *HUGGING_FACE_FILES),
        example=pd.DataFrame(rows),
        described={"clip": record.clip["model"], "decoder_fingerprint": record.fingerprint},
        mlflow_model=mlflow_model,
    )


def log_clipseg(
    client: MlflowClient,
    folder: str | Path,
    *,
    run_id: str,
    register_as: str | None = None,
    alias: str | None = "challenger",
    tags: Mapping[str, str] | None = None,
    description: str | None = None,
) -> LoggedModel:
    """Log a trained CLIPSeg to MLflow; see ``pipeline.serving.flavours.common.log_model``.

    Raises:
        MaskMillError: as ``save_clipseg_model``.
        mlflow.exceptions.MlflowException: the server refuses or does not answer.
    """
    record = read_clipseg_record(folder)
    return log_model(
        client,
        lambda path, described: save_clipseg_model(folder, path, mlflow_model=described),
        name=ClipSegModel.ARTIFACT,
        params={"decoder_fingerprint": record.fingerprint, "clip_fingerprint": record.clip["fingerprint"]},
        run_id=run_id,
        register_as=register_as,
        alias=alias,
        tags=tags,
        description=description,
    )


def _grouped(cells: Sequence[Any]) -> dict[Hashable, list[int]]:
    """Positions of the rows of each image, in order."""
    groups: dict[Hashable, list[int]] = {}
    for index, cell in enumerate(cells):
        groups.setdefault(_key(cell, index), []).append(index)
    return groups


def _key(cell: Any, index: int) -> Hashable:
    """Equal for equal cells; a cell that is neither text nor bytes equals no other."""
    return (type(cell).__name__, cell) if cell is None or isinstance(cell, str | bytes) else index
