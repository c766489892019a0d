"""``maskmill segment``: images and prompts → masks, heat maps and overlays, with CLIPSeg."""

from __future__ import annotations

import functools
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import unquote

import numpy as np
from PIL import Image
from rich.console import Console
from tyro.conf import Positional, UseAppendAction, arg

from jobs.console import counted, duration, stderr_console, timed
from jobs.options import Flag, Maybe, Repeated, refuse_missing_file
from models.errors import WrongUse
from pipeline.corpus.manifest import ADDRESS, build_manifest
from pipeline.files.fetch import fetch, max_bytes
from pipeline.files.images import MAX_PIXELS, ImageError, decode, target_size
from pipeline.files.outputs import check_output_folder
from pipeline.files.records import now
from pipeline.files.redaction import without_signature
from pipeline.files.storage import open_storage
from pipeline.labelling.clipseg.model import THRESHOLD, VISUAL_PROMPT, ClipSegWeights
from pipeline.labelling.clipseg.options import PREFIXES, RELEASED, Prefix
from pipeline.labelling.clipseg.pictures import read_picture

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.labelling.clipseg.prompting import Finder

SCHEMA_VERSION = 1
RESULT_FILE = "results.json"
NO_MASK = "-"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Find what words or example pictures describe (CLIPSeg): masks, heat maps and overlays.

    maskmill segment photos/ --prompt "a red car" --prompt-image cup.jpg --prompt-mask cup.png --output found

    Attributes:
        images: files, folders, globs ("photos/*.jpg") and list files of images.
        output: folder for pictures and results.json.
        prompts: what to find, in words; may be repeated.
        prompt_images: an example picture of what to find; may be repeated.
        prompt_masks: the object in the example: a picture of the same size, black outside the object. If
            given, one for each --prompt-image, in the same order; - for an example without a mask.
        text_weight: join the first --prompt with the first --prompt-image, and so on; this is the weight of
            the words, 0 to 1 (the released models were trained with up to 0.5). Default: words and pictures
            are separate prompts.
        thresholds: a mask's pixels have at least this probability; one for all prompts, or repeated for each,
            words first. Default: 0.3, the paper's; 0.1 finds more.
        prefix: template around the words: none (plain), "a photo of a {}." (fixed), the mean over the
            templates of the paper's training (shuffle, shuffle+).
        visual_prompt: how to emphasise the object of an example with a mask: crop_blur_highlight352
            (the paper's), blur_highlight, blur3_highlight, blur3_highlight01, crop, crop_blur_highlight,
            highlight, highlight2, overlay, image_only.
        blur: sigma in pixels of the blur on the background; 0 is none.
        background: brightness of the background, from 1 (unchanged) to 0 (grey).
        context: margin around the object when cropping, as a share of its extent.
        crop: keep the whole picture.
        crop_size: side that the crop is resized to; default: --example-size.
        example_size: side of the square that examples are resized to first; default: as in training, 352.
        weights: a decoder file (rd64-uni.pth), the --output of maskmill train clipseg, a folder in Hugging
            Face's layout, or a hub name.
        clip: NAME:PRETRAINED of the CLIP under a decoder file; default: what the file says, or
            ViT-B-16-quickgelu:openai.
        extract_layers: blocks of CLIP that the decoder reads; default: those of the weights, else 3 6 9.
        size: side of the square that images are resized to; default: as in training, 352.
        keep_ratio: keep the aspect ratio: the short side becomes --size, the long one at most four times it.
        precision: number format; auto is the fastest that the processor computes natively.
        max_pixels: larger images are recorded as failed (too_large).
        overwrite: replace the results of an earlier run in --output.
    """

    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE...", help_behavior_hint="")]
    output: str
    prompts: Annotated[Repeated, arg(name="prompt")] = ()
    prompt_images: Annotated[Repeated, arg(name="prompt-image")] = ()
    prompt_masks: Annotated[Repeated, arg(name="prompt-mask")] = ()
    text_weight: Maybe[float] = None
    thresholds: Annotated[
        UseAppendAction[tuple[float, ...]], arg(name="threshold", help_behavior_hint="")
    ] = ()
    prefix: Prefix = "plain"
    visual_prompt: str = VISUAL_PROMPT
    blur: Maybe[float] = None
    background: Maybe[float] = None
    context: Maybe[float] = None
    crop: Flag = True
    crop_size: Maybe[int] = None
    example_size: Maybe[int] = None
    weights: str = RELEASED
    clip: Annotated[str | None, arg(name="model", help_behavior_hint="")] = None
    extract_layers: Annotated[Maybe[tuple[int, ...]], arg(metavar="INT ...")] = None
    size: Maybe[int] = None
    keep_ratio: Flag = False
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    max_pixels: int = MAX_PIXELS
    overwrite: Flag = False

    @property
    def style(self) -> str:
        """The visual prompt in the notation of ``pipeline.labelling.clipseg.prompting.parse_style``."""
        knobs = {
            "blur": self.blur,
            "background": self.background,
            "context": self.context if self.crop else "none",
            "size": self.crop_size,
        }
        return ",".join(
            [self.visual_prompt, *(f"{knob}={value}" for knob, value in knobs.items() if value is not None)]
        )

    def run(self, console: Console | None = None) -> int:
        """Segment, and print a summary; see ``segment``."""
        return segment(self, console)


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt: words, an example, or both.

    Attributes:
        title: its name in pictures.
        threshold: least probability of the mask's pixels.
        text: the words, if any.
        image, mask: paths of the example, if any.
        shown: fp32 (3, S, S), the visual prompt.
    """

    title: str
    threshold: float
    text: str | None = None
    image: str | None = None
    mask: str | None = None
    shown: Tensor | None = None


def segment(job: Segment, console: Console | None = None) -> int:
    """Segment, and print a summary.

    Returns:
        0, or 1 if some images could not be read; these are recorded as failed.

    Raises:
        MaskMillError: for anything the user can fix.
    """
    console = console or stderr_console()
    _check(job)
    refuse_missing_file(job.weights)
    addresses = {
        row["uri"]: row.get(ADDRESS) or row["uri"]
        for source in job.images
        for row in build_manifest(source, notice=functools.partial(_say, console)).to_pylist()
    }
    uris = list(addresses)
    weights = ClipSegWeights(job.weights, job.clip, job.extract_layers)
    folder = Path(job.output)
    earlier = _earlier_files(folder, overwrite=job.overwrite)

    from pipeline.labelling.clipseg.prompting import Finder

    finder = Finder(
        weights,
        precision=job.precision,
        size=job.size,
        keep_ratio=job.keep_ratio,
        example_size=job.example_size,
        visual_prompt=job.style,
    )
    prompts = _prompts(job, finder)
    began = time.monotonic()
    clip = weights.known_clip()
    toy = " (a toy: it knows the toy world only)" if clip and clip[0] == "toyclip" else ""
    _say(console, f"{_count(uris, 'image')}, {_count(prompts, 'prompt')}, {job.weights}{toy} → {folder}")
    with timed(console, "reading the weights"):
        conditionals = finder.embed(
            [(one.text, one.shown) for one in prompts],
            PREFIXES[job.prefix],
            text_weight=job.text_weight or 0.0,
        )
        model = finder.model
    _remove(earlier, folder)  # only now that weights and examples have been read
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "created": now(),
        "model": {
            "weights": job.weights,
            "clip": model.clip.name,
            "extract_layers": list(model.decoder.extract_layers),
            "fingerprint": model.fingerprint,
            "precision": finder.precision,
            "device": model.clip.device.type,
        },
        "settings": {
            "size": finder.size,
            "keep_ratio": job.keep_ratio,
            "prefix": job.prefix,
            "text_weight": job.text_weight,
            "visual_prompt": job.style,
            "example_size": finder.example_size,
        },
        "prompts": [
            {
                "title": one.title,
                "text": one.text,
                "image": one.image and without_signature(one.image),
                "mask": one.mask and without_signature(one.mask),
                "threshold": one.threshold,
            }
            for one in prompts
        ],
        "images": [],
    }
    names = _folder_names(uris)
    try:
        with counted(console, "segmenting", "images") as report:
            for done, uri in enumerate(uris, start=1):
                record["images"].append(
                    _segment(job, finder, conditionals, prompts, uri, addresses[uri], folder, names[uri])
                )
                report(done, len(uris))
    finally:  # an interrupted run records its files too, so that they can be overwritten
        status = Counter(entry["status"] for entry in record["images"])
        record["counts"] = dict(sorted(status.items()))
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        open_storage(folder).write_bytes(RESULT_FILE, text.encode())
    return _summary(console, folder, status, record, time.monotonic() - began)


# --- prompts ------------------------------------------------------------------------------------------------


def _check(job: Segment) -> None:
    texts, pictures, masks = len(job.prompts), len(job.prompt_images), len(job.prompt_masks)
    asked = max(texts, pictures) if job.text_weight is not None else texts + pictures
    for wrong, message, remedy in (
        (
            job.context is not None and not job.crop,
            "--context says how to crop.",
            "Leave out either it or --no-crop.",
        ),
        (not job.images, "No image is given.", "Name files, folders or globs: maskmill segment photos/."),
        (not asked, "Nothing is asked for.", 'Add --prompt "a red car" or --prompt-image cup.jpg.'),
        (any(not text.strip() for text in job.prompts), "A --prompt is empty.", "Give it words."),
        (
            masks and masks != pictures,
            f"There are {masks} --prompt-mask and {pictures} --prompt-image.",
            f"Give a mask for each example image, in the same order, or {NO_MASK} for one without.",
        ),
        (
            job.text_weight is not None and texts != pictures,
            f"--text-weight joins each --prompt with a --prompt-image; there are {texts} and {pictures}.",
            "Give as many of one as of the other, in the same order, or leave --text-weight out.",
        ),
        (
            job.text_weight is not None and not 0 <= job.text_weight <= 1,
            f"--text-weight {job.text_weight} is not between 0 and 1.",
            "The released models were trained with 0 to 0.5.",
        ),
        (
            len(job.thresholds) not in (0, 1, asked),
            f"There are {len(job.thresholds)} thresholds and {asked} prompts.",
            "Give one --threshold for all, or one for each: first the texts, then the example images.",
        ),
        (
            any(not 0 <= threshold <= 1 for threshold in job.thresholds),
            "A --threshold is not between 0 and 1.",
            f"It is a probability; the paper has 0.1 to {THRESHOLD}.",
        ),
        (
            any(size is not None and size < 1 for size in (job.size, job.example_size, job.max_pixels)),
            "A size is below 1.",
            "Give pixels: 352.",
        ),
    ):
        if wrong:
            raise WrongUse("wrong_use", message, remedy)


def _prompts(job: Segment, finder: Finder) -> list[Prompt]:
    """The prompts, texts before examples; reads the examples before the weights are loaded."""
    masks = [None if mask == NO_MASK else mask for mask in job.prompt_masks] or [None] * len(
        job.prompt_images
    )
    shown = [
        finder.show(read_picture(image, mask)) for image, mask in zip(job.prompt_images, masks, strict=True)
    ]
    asked: list[tuple[str | None, int | None]]
    if job.text_weight is not None:
        asked = [(text, index) for index, text in enumerate(job.prompts)]
    else:
        asked = [(text, None) for text in job.prompts] + [(None, index) for index in range(len(shown))]
    thresholds = job.thresholds or (THRESHOLD,)
    if len(thresholds) == 1:
        thresholds = thresholds * len(asked)
    prompts = []
    for (text, index), threshold in zip(asked, thresholds, strict=True):
        image = None if index is None else job.prompt_images[index]
        words = [text] * (text is not None) + [_stem(image)] * (image is not None)
        prompts.append(
            Prompt(
                title=" + ".join(word for word in words if word),
                threshold=threshold,
                text=text,
                image=image,
                mask=None if index is None else masks[index],
                shown=None if index is None else shown[index],
            )
        )
    return prompts


# --- one image ----------------------------------------------------------------------------------------------


def _segment(
    job: Segment,
    finder: Finder,
    conditionals: Tensor,
    prompts: Sequence[Prompt],
    uri: str,
    address: str,
    folder: Path,
    name: str,
) -> dict[str, Any]:
    """Segment an image for all prompts, write its files, and return its entry in the record.

    ``address`` is where to fetch it from: ``uri`` with its signature, if it has one.
    """
    from pipeline.labelling.clipseg.prompting import levels, shown_pixels
    from pipeline.report.pictures import Found, heat_map, overlay_mask, overview

    entry: dict[str, Any] = {"uri": uri}
    try:
        image = decode(fetch(address, max_bytes=max_bytes(job.max_pixels)), max_pixels=job.max_pixels)
    except ImageError as error:
        return entry | {"status": error.code, "error": error.message}
    height, width = image.shape[:2]
    sizes = finder.images
    here = folder / name
    here.mkdir(parents=True, exist_ok=True)
    found, results = [], []
    maps = finder.find(image, conditionals, (height, width))
    for number, (prompt, p) in enumerate(zip(prompts, maps, strict=True), start=1):
        mask = p >= prompt.threshold
        level = levels(p)
        files = {
            kind: f"{name}/{number:02d}-{_slug(prompt.title)}-{kind}.png"
            for kind in ("mask", "heat", "overlay")
        }
        _save(Image.fromarray(mask.astype(np.uint8) * 255), folder / files["mask"])
        _save(heat_map(level), folder / files["heat"])
        _save(Image.fromarray(overlay_mask(image, mask)), folder / files["overlay"])
        area, highest = int(mask.sum()), float(p.max())
        results.append(
            {
                "prompt": number - 1,
                "max_probability": round(highest, 6),
                "mean_probability": round(float(p.mean()), 6),
                "mask_probability": round(float(p[mask].mean()), 6) if area else None,
                "area": area,
                "share": area / mask.size,
                "bbox": _box(mask),
                "files": files,
            }
        )
        found.append(
            Found(
                title=prompt.title,
                probability=level,
                mask=mask,
                caption=f"{100 * area / mask.size:.1f} % at p >= {prompt.threshold:g}, highest {highest:.2f}",
                example=None if prompt.shown is None else shown_pixels(prompt.shown),
            )
        )
    sheet = f"{name}/overview.png"
    _save(overview(_name(uri), image, found), folder / sheet)
    return entry | {
        "status": "ok",
        "height": height,
        "width": width,
        "network_size": list(target_size(height, width, scale=sizes.scale, keep_ratio=sizes.keep_ratio)),
        "overview": sheet,
        "prompts": results,
    }


def _box(mask: np.ndarray) -> list[int] | None:
    """Bounding box [x, y, width, height] of a mask; None if it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


# --- files --------------------------------------------------------------------------------------------------


def _earlier_files(folder: Path, *, overwrite: bool) -> list[Path]:
    """The files of an earlier run that this one replaces; refuses a folder with other content.

    Raises:
        MaskMillError: ``output_exists``, ``output_not_ours``.
    """
    check_output_folder(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return []
    earlier = folder / RESULT_FILE
    if not earlier.is_file():
        raise WrongUse(
            "output_not_ours",
            f"{folder} holds files, and no {RESULT_FILE} that says that they are from here.",
            "Name another --output.",
        )
    if not overwrite:
        raise WrongUse(
            "output_exists",
            f"{folder} holds a result already.",
            "Name another --output, or say --overwrite.",
        )
    try:
        images = json.loads(earlier.read_text(encoding="utf-8"))["images"]
        names = [
            name
            for image in images
            if image["status"] == "ok"
            for name in [*(n for one in image["prompts"] for n in one["files"].values()), image["overview"]]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WrongUse(
            "output_not_ours", f"{earlier} is not a result of maskmill segment.", "Name another --output."
        ) from error
    inside = folder.resolve()
    paths = [(inside / str(name)).resolve() for name in names]
    return [*(path for path in paths if inside in path.parents), inside / RESULT_FILE]


def _remove(files: Sequence[Path], folder: Path) -> None:
    """Delete files, and the folders below ``folder`` that this leaves empty."""
    for path in files:
        path.unlink(missing_ok=True)
    for parent in {path.parent for path in files} - {folder.resolve()}:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def _save(picture: Image.Image, path: Path) -> None:
    # Level 1 takes a third of the time of Pillow's default, for files a tenth larger.
    picture.save(path, compress_level=1)


def _folder_names(uris: Sequence[str]) -> dict[str, str]:
    """A folder name for each image: its name without the suffix, numbered if several share it."""
    names: dict[str, str] = {}
    used: set[str] = set()
    for uri in uris:
        wanted = _slug(_stem(uri), letters=80) or "image"
        name, number = wanted, 1
        while name.casefold() in used:
            number += 1
            name = f"{wanted}-{number}"
        used.add(name.casefold())
        names[uri] = name
    return names


def _name(uri: str) -> str:
    return unquote(uri).rstrip("/").rpartition("/")[2]


def _stem(uri: str | None) -> str:
    return "" if uri is None else Path(_name(uri)).stem


def _slug(text: str, letters: int = 40) -> str:
    """A portable file name: letters and digits of any script, joined by hyphens."""
    words = "".join(letter if letter.isalnum() or letter == "_" else " " for letter in text).split()
    return "-".join(words)[:letters].strip("-")


# --- output -------------------------------------------------------------------------------------------------


def _summary(
    console: Console, folder: Path, status: Counter[str], record: dict[str, Any], seconds: float
) -> int:
    failed = status.total() - status["ok"]
    _say(console, f"Segmented {status['ok']:,} images in {duration(seconds)}.")
    for number, prompt in enumerate(record["prompts"]):
        shares = [entry["prompts"][number]["share"] for entry in record["images"] if entry["status"] == "ok"]
        hits = sum(share > 0 for share in shares)
        mean = 100 * sum(shares) / len(shares) if shares else 0.0
        _say(
            console,
            f"  {prompt['title']}: found in {hits} of {len(shares)} images, {mean:.1f} % of their pixels",
        )
    if failed:
        codes = ", ".join(f"{count:,} {code}" for code, count in sorted(status.items()) if code != "ok")
        _say(console, f"  {failed:,} failed: {codes} ({RESULT_FILE} says which)")
    _say(console, f"Look at:  {folder}/*/overview.png\nFigures:  {folder / RESULT_FILE}")
    return 1 if failed else 0


def _count(items: Sequence[object], word: str) -> str:
    return f"{len(items):,} {word}{'s' if len(items) != 1 else ''}"


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
