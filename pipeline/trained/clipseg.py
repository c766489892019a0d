"""The folder of a trained CLIPSeg: what it holds, written whole and read with care.

``decoder.safetensors`` is the decoder in the form of ``models.clipseg.weights.save_decoder``. Where its
classes can hold the model, the folder is in Hugging Face's layout as well (``config.json``,
``model.safetensors``, ...; with CLIP), so that ``load_clipseg``, ``maskmill segment --weights`` and
``transformers`` take it as it is. ``clipseg.json`` says how it came about, and ties the files together.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from models.errors import MaskMillError, WrongUse
from pipeline.files.storage import open_storage
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

    from models.clipseg.decoder import ClipSeg

RECORD_FILE = "clipseg.json"
DECODER_FILE = "decoder.safetensors"
HUGGING_FACE_FILES = (
    "config.json", "model.safetensors", "preprocessor_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "tokenizer_config.json",
)  # fmt: skip


class ClipSegRecord(TrainedRecord):
    """What ``clipseg.json`` says.

    Attributes:
        model: ``clipseg``, ``clip-deconv`` or ``vitseg``.
        clip: the frozen CLIP: ``model``, ``pretrained``, ``fingerprint``; for ViTSeg also ``tower_weights``.
        hugging_face: whether the folder is in Hugging Face's layout as well.
        data: what it was trained on.
    """

    KIND: ClassVar[str] = "clipseg"
    WHAT: ClassVar[str] = "trained CLIPSeg"
    TRAINED_BY: ClassVar[str] = "maskmill train clipseg"
    RECORD_FILE: ClassVar[str] = RECORD_FILE
    WEIGHTS_FILE: ClassVar[str] = DECODER_FILE
    SCHEMA_VERSION: ClassVar[int] = 1

    model: str
    clip: dict[str, Any]
    hugging_face: bool
    data: dict[str, Any]

    @property
    def sizes(self) -> tuple[int, int] | None:
        """Sides in pixels of the images and of the examples that it was trained on, if the recipe says."""
        settings = self.recipe.get("triplets", {})
        if "size" not in settings:
            return None
        return int(settings["size"]), int(settings.get("support_size", settings["size"]))


def is_trained(uri: str | Path) -> bool:
    """Whether a path or URI is the folder of a trained CLIPSeg; see ``is_recorded``."""
    return is_recorded(ClipSegRecord, uri)


def write_clipseg_folder(
    output: str | Path,
    model: ClipSeg,
    *,
    kind: str,
    tower_weights: str | None = None,
    recipe: Mapping[str, Any],
    data: Mapping[str, Any],
    metrics: Mapping[str, Any],
    training: Mapping[str, Any],
    versions: Mapping[str, Any],
    overwrite: bool = False,
) -> tuple[ClipSegRecord, str]:
    """Write a model into a folder, next to what the training has left there.

    The arguments not named here are fields of ``ClipSegRecord``.

    Args:
        output: local folder or object-store prefix.
        model: CLIPSeg or baseline.
        kind: ``ClipSegRecord.model``.
        tower_weights: what ViTSeg's image tower was loaded from.
        overwrite: replace a model that is already there.

    Returns:
        The record, and why Hugging Face's layout was left out, or "".

    Raises:
        MaskMillError: ``output_exists``, or the storage cannot be written.
    """
    from models.clip import toy as toyclip
    from models.clipseg.weights import save_clipseg, save_decoder

    storage = open_storage(output)
    if not overwrite:
        refuse_to_replace(ClipSegRecord, storage)
    reason = ""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_decoder(model, folder / DECODER_FILE)
        try:
            save_clipseg(model, folder)
        except MaskMillError as error:
            if error.code != "model_unsupported":
                raise
            reason = error.message
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    bundled = model.clip.pretrained == str(toyclip.weights_path())  # that path is this machine's own
    clip = {
        "model": model.clip.name,
        "pretrained": toyclip.PRETRAINED if bundled else model.clip.pretrained,
        "fingerprint": model.clip.fingerprint,
    }
    record = write_trained(
        ClipSegRecord,
        storage,
        files,
        model=kind,
        config=model.decoder.config.model_dump(mode="json"),
        clip=clip if tower_weights is None else clip | {"tower_weights": tower_weights},
        hugging_face=len(files) > 1,
        recipe=recipe,
        data=data,
        metrics=metrics,
        training=training,
        versions=versions,
    )
    return record, reason


def read_clipseg_record(uri: str | Path) -> ClipSegRecord:
    """What is recorded about a trained CLIPSeg; see ``read_trained``."""
    return read_trained(ClipSegRecord, uri)


def load_trained(
    uri: str | Path,
    *,
    extract_layers: tuple[int, ...] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> ClipSeg:
    """The model in a folder of ``write_clipseg_folder``, of any kind, in evaluation mode.

    Args:
        uri: the folder, here or in an object store.
        extract_layers: read these blocks; None takes those it was trained with. A baseline takes no others.
        device: where to.
        dtype: of CLIP and decoder; None is fp32.

    Raises:
        MaskMillError: as ``read_clipseg_record``; ``model_damaged`` if the decoder is not the recorded one;
            ``setting_invalid`` for layers that it cannot read; as ``models.clip.loading.load_clip`` if the
            CLIP beneath is not to be had.
    """
    import torch

    from models.clip.loading import load_clip
    from models.clipseg.weights import load_baseline, load_clipseg

    dtype = dtype or torch.float32
    record = read_clipseg_record(uri)
    storage = open_storage(uri)
    read_trained_weights(record)
    with contextlib.ExitStack() as stack:
        if storage.is_local:
            folder = Path(storage.path())
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for name in [DECODER_FILE, *(HUGGING_FACE_FILES if record.hugging_face else ())]:
                if storage.exists(name):
                    (folder / name).write_bytes(storage.read_bytes(name))
        file = folder / DECODER_FILE
        if record.hugging_face:
            return load_clipseg(folder, extract_layers=extract_layers, device=device, dtype=dtype)
        clip = load_clip(record.clip["model"], record.clip["pretrained"], device=device, dtype=dtype)
        if record.model == "clipseg":
            return load_clipseg(file, clip=clip, extract_layers=extract_layers, dtype=dtype)
        if extract_layers is not None:
            raise WrongUse(
                "setting_invalid",
                f"{storage.uri} holds a {record.model}, which reads the layers it was trained with.",
                "Leave extract_layers out.",
            )
        model = load_baseline(file, clip, tower=record.clip.get("tower_weights") or "pretrained")
        model.decoder.cast(dtype)
        return model
