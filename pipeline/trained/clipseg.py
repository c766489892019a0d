"""The folder of a trained CLIPSeg: what it holds, written whole and read with care.

``decoder.safetensors`` is the decoder in the form of ``models.clipseg.weights.save_decoder``. Where its
classes can hold the model, the folder is in Hugging Face's layout as well (``config.json``,
``model.safetensors``, ...; with CLIP), so that ``load_clipseg``, ``maskmill segment --weights`` and
``transformers`` take it as it is. ``clipseg.json`` says how it came about, and ties the files together.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import Damaged, MaskMillError, WrongUse
from pipeline.files.storage import open_storage

if TYPE_CHECKING:
    import torch

    from models.clipseg.decoder import ClipSeg

SCHEMA_VERSION = 1
KIND = "clipseg"
RECORD_FILE = "clipseg.json"
DECODER_FILE = "decoder.safetensors"
HUGGING_FACE_FILES = (
    "config.json", "model.safetensors", "preprocessor_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "tokenizer_config.json",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ClipSegRecord:
    """What ``clipseg.json`` says.

    Attributes:
        created: UTC, ISO 8601.
        model: ``clipseg``, ``clip-deconv`` or ``vitseg``.
        config: of the decoder.
        clip: the frozen CLIP: ``model``, ``pretrained``, ``fingerprint``; for ViTSeg also ``tower_weights``.
        fingerprint: SHA-256 (hex) of ``decoder.safetensors``.
        hugging_face: whether the folder is in Hugging Face's layout as well.
        recipe: of the training, all fields and ``hash``.
        data: what it was trained on.
        metrics: figures by name.
        training: iterations, seconds, samples_per_second, ….
        versions: of Python and the packages.
    """

    created: str
    model: str
    config: Mapping[str, Any]
    clip: Mapping[str, Any]
    fingerprint: str
    hugging_face: bool
    recipe: Mapping[str, Any]
    data: Mapping[str, Any]
    metrics: Mapping[str, Any]
    training: Mapping[str, Any]
    versions: Mapping[str, Any]

    @property
    def sizes(self) -> tuple[int, int] | None:
        """Sides in pixels of the images and of the examples that it was trained on, if the recipe says."""
        settings = self.recipe.get("triplets", {})
        if "size" not in settings:
            return None
        return int(settings["size"]), int(settings.get("support_size", settings["size"]))


def is_trained(uri: str | Path) -> bool:
    """Whether a path or URI is the folder of a trained CLIPSeg: one look for one file, without reading it.

    Raises:
        MaskMillError: the place cannot be reached (``storage_unsupported``, ``storage_unreachable``, …).
    """
    return open_storage(uri).exists(RECORD_FILE)


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
    """Write a model into a folder, beside what the training has left there; the record comes last.

    Args:
        output: local folder or object-store prefix.
        model: CLIPSeg or baseline.
        kind: ``ClipSegRecord.model``.
        tower_weights: what ViTSeg's image tower was loaded from.
        recipe: see ``ClipSegRecord``, as for all that follows.
        data: see there.
        metrics: see there.
        training: see there.
        versions: see there.
        overwrite: replace a model that is already there.

    Returns:
        The record, and why Hugging Face's layout was left out, or "".

    Raises:
        MaskMillError: ``output_exists``, or the storage cannot be written.
    """
    from models.clip import toy as toyclip
    from models.clipseg.weights import save_clipseg, save_decoder

    storage = open_storage(output)
    if not overwrite and storage.exists(RECORD_FILE):
        raise WrongUse(
            "output_exists",
            f"There is a trained CLIPSeg in {storage.uri} already.",
            "Name another --output, or replace it with --overwrite.",
        )
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
        files = sorted(path.name for path in folder.iterdir())
        for name in files:
            storage.write_bytes(name, (folder / name).read_bytes())
        fingerprint = hashlib.sha256((folder / DECODER_FILE).read_bytes()).hexdigest()
    bundled = model.clip.pretrained == str(toyclip.weights_path())  # that path is this machine's own
    clip = {
        "model": model.clip.name,
        "pretrained": toyclip.PRETRAINED if bundled else model.clip.pretrained,
        "fingerprint": model.clip.fingerprint,
    }
    record = ClipSegRecord(
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        model=kind,
        config=model.decoder.config.model_dump(mode="json"),
        clip=clip if tower_weights is None else clip | {"tower_weights": tower_weights},
        fingerprint=fingerprint,
        hugging_face=len(files) > 1,
        recipe=recipe,
        data=data,
        metrics=metrics,
        training=training,
        versions=versions,
    )
    storage.write_json(RECORD_FILE, {"schema_version": SCHEMA_VERSION, "kind": KIND, **asdict(record)})
    return record, reason


def read_clipseg_record(uri: str | Path) -> ClipSegRecord:
    """What is recorded about a trained CLIPSeg; the weights are not touched.

    Raises:
        MaskMillError: ``model_missing`` if this is no such folder, ``model_damaged``,
            ``newer_version``.
    """
    storage = open_storage(uri)
    try:
        found = storage.read_json(RECORD_FILE, None)
    except MaskMillError as error:
        if error.code != "json_invalid":
            raise
        raise _damaged(error.message) from error
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise WrongUse(
            "model_missing",
            f"{storage.uri} is no folder of a trained CLIPSeg: it has no {RECORD_FILE}.",
            "Give the --output of a finished maskmill train clipseg.",
        )
    version = found.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise WrongUse(
            "newer_version",
            f"{storage.uri} was written by a newer MaskMill (schema {version}; this one reads "
            f"{SCHEMA_VERSION}).",
            "Update MaskMill.",
        )
    names = [field.name for field in fields(ClipSegRecord)]
    absent = [name for name in names if name not in found]
    if absent:
        raise _damaged(f"{storage.uri}/{RECORD_FILE} says nothing about {', '.join(absent)}.")
    return ClipSegRecord(**{name: found[name] for name in names})


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
    with contextlib.ExitStack() as stack:
        if storage.is_local:
            folder = Path(storage.path())
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for name in [DECODER_FILE, *(HUGGING_FACE_FILES if record.hugging_face else ())]:
                if storage.exists(name):
                    (folder / name).write_bytes(storage.read_bytes(name))
        file = folder / DECODER_FILE
        if not file.is_file():
            raise _damaged(f"{storage.uri} has no {DECODER_FILE}.")
        if hashlib.sha256(file.read_bytes()).hexdigest() != record.fingerprint:
            raise _damaged(f"{storage.uri}/{DECODER_FILE} is not the file that its {RECORD_FILE} names.")
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


def _damaged(message: str) -> MaskMillError:
    return Damaged("model_damaged", message, "Restore the folder from a copy, or train again.")
