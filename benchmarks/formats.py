"""Every export format on real masks: exported, opened by a program of others, imported again, and compared.

    python -m benchmarks.formats [--data DIR] [--readers PYTHON] [--formats NAME ...]

The truth of COCO images becomes a label table, which ``maskmill export`` writes and ``maskmill import``
reads, each in a process of its own. Others and we must find the truth at every pixel; what a format says that
it lost is in the table. Programs that cannot be installed beside MaskMill run in another Python
(requirements-readers.txt).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from benchmarks.label_job import ROOT, processor
from pipeline.corpus.manifest import stable_id
from pipeline.datasets.base import Dataset
from pipeline.datasets.registry import open_dataset
from pipeline.files.storage import open_storage
from pipeline.formats.registry import FORMATS
from pipeline.ontology.ontology import Ontology
from pipeline.table.committed import write_part
from pipeline.table.labels import LABEL_SCHEMA, decode_mask, iter_rows, ok_row, summarise
from pipeline.table.record import TableRecord, read_table_record, write_table_record
from pipeline.table.statistics import Labels as TableLabels

DATA = ROOT.parent / "shared" / "data" / "coco_tiny"
FOREIGN = ROOT / "tests" / "pipeline" / "formats" / "foreign.py"
PART = 20
"""Rows of a file of the table."""
NOTHING = -1
"""No label: unlike any id, and equal to what a format cannot tell from it."""

Labels = npt.NDArray[np.int64]
Found = Iterator[tuple[str, Labels]]
"""Last component of a name, and labels (H, W) by the ids of the ontology."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, help="COCO: annotations/, train2017/, val2017/")
    parser.add_argument("--readers", type=Path, default=ROOT / ".readers" / "bin" / "python")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        raise SystemExit(f"no COCO images in {arguments.data}: name a folder with --data")
    with tempfile.TemporaryDirectory(prefix="maskmill-bench-") as scratch:
        folder = Path(scratch)
        ontology, truth = write_table(arguments.data, folder / "table")
        pixels = sum(labels.size for labels in truth.values())
        print(f"# Export formats ({datetime.date.today()})\n")
        print(f"{len(truth)} COCO images, {pixels / 1e6:.1f} million pixels, {ontology.num_classes} classes")
        print(f"{processor()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
        print("command: python -m benchmarks.formats\n")
        print(
            "| format | files, MB | opened by | IoU | pixels wrong | imported: IoU | pixels wrong | lost, as "
            "reported: pixels, holes, segments | export, s | import, s | peak memory of export, import, MB |"
        )
        print("|---|" + "---|" * 10)
        for name in arguments.formats:
            print(row(name, folder, truth, ontology, arguments.readers), flush=True)


def write_table(data: Path, folder: Path) -> tuple[Ontology, dict[str, Labels]]:
    """A label table of the truth of both splits; its classes, and the truth by name."""
    table = open_storage(folder)
    truth: dict[str, Labels] = {}
    rows = []
    for split in ("train2017", "val2017"):
        dataset = open_dataset("cocoobject81", root=str(data), split=split)
        assert isinstance(dataset, Dataset)
        ontology = dataset.classes
        for sample in dataset.samples:
            labels = cast(TableLabels, dataset.truth(sample))
            image = Path(sample.image).read_bytes()
            rows.append(
                ok_row(
                    id=stable_id(sample.image),
                    uri=sample.image,
                    sha256=hashlib.sha256(image).digest(),
                    height=labels.shape[0],
                    width=labels.shape[1],
                    labels=labels,
                    confidence=np.full(labels.shape, 255, np.uint8),
                    ignore_index=ontology.ignore_index,
                )
            )
            truth[Path(sample.image).stem] = np.where(
                labels == ontology.ignore_index, NOTHING, labels.astype(int)
            )
    for start in range(0, len(rows), PART):
        write_part(table, pa.Table.from_pylist(rows[start : start + PART], schema=LABEL_SCHEMA))
    weights = {"model": "truth", "pretrained": "", "fingerprint": "0" * 64}
    record = TableRecord(
        created="2026-01-01T00:00:00Z",
        ontology=ontology,
        recipe={"hash": "0" * 64},
        weights=weights,
        counts=summarise(table),
    )
    write_table_record(table, record)
    return ontology, truth


def row(name: str, folder: Path, truth: Mapping[str, Labels], ontology: Ontology, readers: Path) -> str:
    """Measure a format."""
    output = folder / "VOCdevkit" / "VOC2012" if name == "voc" else folder / name
    took, peak = maskmill(
        "export", folder / "table", "--format", name, "--output", output, "--with-images",
        "--val-share", "0.5", "--workers", "0",
    )  # fmt: skip
    record = json.loads((output / "export.json").read_text())
    files = [path for path in output.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    title, opened = OPENED[name]
    if opened in (by_sdk, by_datumaro) and not readers.exists():
        title, theirs = f"{title}: not here", "| "
    else:
        theirs = compared(opened(output, ontology, readers), truth, ontology)
    again = folder / f"{name}-again"
    import_took, import_peak = maskmill("import", "--format", name, "--input", output, "--output", again)
    lost = ", ".join(str(record["lost"][key]) for key in ("pixels", "holes", "segments"))
    own = compared(by_import(again, ontology), truth, ontology)
    return (
        f"| {name} | {len(files):,}, {size:.1f} | {title} | {theirs} | {own} | {lost} | {took:.1f} | "
        f"{import_took:.1f} | {peak / 1e6:.0f}, {import_peak / 1e6:.0f} |"
    )


def maskmill(*arguments: str | Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command, in a process of its own."""
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        peak = 0
        while process.poll() is None:
            peak = max(peak, high_water(process.pid))
            time.sleep(0.02)
        took = time.perf_counter() - began
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"maskmill {arguments[0]} failed:\n{log.read()}")
    return took, peak


def high_water(process: int) -> int:
    """Most resident bytes of a process so far. What wait() tells counts the memory of its parent, too."""
    with contextlib.suppress(OSError), open(f"/proc/{process}/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def compared(found: Found, truth: Mapping[str, Labels], ontology: Ontology) -> str:
    """Mean IoU of the classes that are there, and the number of pixels with a class that differ."""
    count = ontology.num_classes
    confusion = np.zeros((count, count + 1), np.int64)
    missing = dict(truth)
    for name, labels in found:
        wanted = missing.pop(name)
        assert labels.shape == wanted.shape, (name, labels.shape, wanted.shape)
        known = wanted != NOTHING
        joint = wanted[known] * (count + 1) + np.where(labels[known] == NOTHING, count, labels[known])
        confusion += np.bincount(joint, minlength=confusion.size).reshape(confusion.shape)
    assert not missing, f"{len(missing)} images are missing"
    hits = confusion.diagonal()
    union = confusion.sum(1) + confusion[:, :count].sum(0) - hits
    present = confusion.sum(1) > 0
    return f"{(hits[present] / union[present]).mean():.6f} | {confusion.sum() - hits.sum():,}"


def by_import(table: Path, ontology: Ontology) -> Found:
    """What ``maskmill import`` made of an export."""
    classes = read_table_record(str(table)).ontology
    assert classes.names == ontology.names
    for line in iter_rows(str(table), ["uri", "mask"]):
        labels = decode_mask(line["mask"]["bytes"]).astype(np.int64)
        labels[labels == classes.ignore_index] = NOTHING
        # Images of shards and Parquet are unpacked, with a number in front of their names.
        yield Path(line["uri"]).stem.removesuffix("_leftImg8bit").rpartition("_")[2], labels


# --- programs of others ---


def by_pillow(output: Path, ontology: Ontology, readers: Path) -> Found:
    with (output / "images.csv").open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            yield Path(line["name"]).name, _ids(np.asarray(Image.open(output / line["mask"])), ontology)


def by_pycocotools(output: Path, ontology: Ontology, readers: Path) -> Found:
    yield from _by_pycocotools(output, "instances", ontology, 0)


def by_stuff(output: Path, ontology: Ontology, readers: Path) -> Found:
    yield from _by_pycocotools(output, "stuff", ontology, NOTHING)


def _by_pycocotools(output: Path, kind: str, ontology: Ontology, unlabelled: int) -> Found:
    from pycocotools.coco import COCO

    for path in sorted((output / "annotations").glob(f"{kind}_*.json")):
        with contextlib.redirect_stdout(io.StringIO()):  # it reports progress there
            coco = COCO(str(path))
        for number in coco.getImgIds():
            (image,) = coco.loadImgs(number)
            labels = np.full((image["height"], image["width"]), unlabelled)
            for one in coco.loadAnns(coco.getAnnIds(imgIds=number, iscrowd=None)):
                (category,) = coco.loadCats(one["category_id"])
                labels[coco.annToMask(one).astype(bool)] = ontology.names.index(category["name"])
            yield Path(image["file_name"]).stem, labels


def by_panoptic(output: Path, ontology: Ontology, readers: Path) -> Found:
    for path in sorted((output / "annotations").glob("panoptic_*.json")):
        content = json.loads(path.read_text())
        categories = {one["id"]: ontology.names.index(one["name"]) for one in content["categories"]}
        for one in content["annotations"]:
            colors = np.asarray(Image.open(path.with_suffix("") / one["file_name"]), np.int64)
            segments = colors @ (1, 256, 65536)
            labels = np.full(segments.shape, NOTHING)
            for segment in one["segments_info"]:
                labels[segments == segment["id"]] = categories[segment["category_id"]]
            yield Path(one["file_name"]).stem, labels


def by_datasets(output: Path, ontology: Ontology, readers: Path) -> Found:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        for split in datasets.load_dataset(str(output), cache_dir=cache).values():
            for line in split:
                yield Path(line["name"]).name, _ids(np.asarray(line["mask"]), ontology)


def by_webdataset(output: Path, ontology: Ontology, readers: Path) -> Found:
    import webdataset

    urls = [str(path) for path in sorted(output.glob("*.tar"))]
    wanted = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("json", "mask.png")
    for info, mask in wanted:
        yield Path(info["name"]).name, _ids(np.asarray(mask.convert("L")), ontology)


def by_torchvision_voc(output: Path, ontology: Ontology, readers: Path) -> Found:
    from torchvision.datasets import VOCSegmentation

    for split in ("train", "val"):
        dataset = VOCSegmentation(str(output.parents[1]), year="2012", image_set=split)
        for path, (_, mask) in zip(dataset.masks, dataset, strict=True):
            yield Path(path).stem, _ids(np.asarray(mask), ontology)


def by_torchvision_cityscapes(output: Path, ontology: Ontology, readers: Path) -> Found:
    from torchvision.datasets import Cityscapes

    for split in ("train", "val"):
        dataset = Cityscapes(str(output), split=split, mode="fine", target_type="semantic")
        for path, (_, mask) in zip(dataset.images, dataset, strict=True):
            yield Path(path).stem.removesuffix("_leftImg8bit"), _ids(np.asarray(mask), ontology)


def by_supervision(output: Path, ontology: Ontology, readers: Path) -> Found:
    import supervision

    for split in ("train", "val"):
        for folder in sorted({path.parent for path in (output / "images" / split).rglob("*.*")}):
            below = folder.relative_to(output / "images")
            dataset = supervision.DetectionDataset.from_yolo(
                str(folder), str(output / "labels" / below), str(output / "data.yaml"), force_masks=True
            )
            for path, image, found in dataset:
                labels = np.zeros(image.shape[:2], np.int64)  # what is in no polygon is background
                if found.class_id is not None and found.mask is not None:
                    for number, mask in zip(found.class_id, found.mask, strict=True):
                        labels[mask] = number + 1
                yield Path(path).stem, labels


def by_sdk(output: Path, ontology: Ontology, readers: Path) -> Found:
    with tempfile.TemporaryDirectory() as scratch:
        found = _foreign(readers, "labelstudio", str(output), f"{scratch}/found")
        masks: dict[int, list[str]] = {}
        for file in found["files"]:
            masks.setdefault(int(file.split("-")[1]), []).append(file)
        for number, task in enumerate(json.loads((output / "tasks.json").read_text())):
            labels = np.zeros((task["data"]["height"], task["data"]["width"]), np.int64)
            for file in masks.get(number, ()):
                name = file.partition("-label-")[2].rpartition("-")[0]
                labels[np.load(Path(found["folder"], file)) > 0] = (
                    NOTHING if name == "ignored" else ontology.names.index(name)
                )
            yield Path(task["data"]["name"]).name, labels


def by_datumaro(output: Path, ontology: Ontology, readers: Path) -> Found:
    with tempfile.TemporaryDirectory() as scratch:
        found = _foreign(readers, "datumaro_voc", str(output), f"{scratch}/found.npz")
        assert found["labels"][:-1] == list(ontology.names)
        with np.load(f"{scratch}/found.npz") as drawn:
            for number, name in enumerate(found["items"]):
                labels = drawn[f"arr_{number}"]
                size = Image.open(next((output / "SegmentationClass").glob(f"{name}.png"))).size
                yield (
                    Path(name).name,
                    labels if labels.shape == size[::-1] else np.zeros(size[::-1], np.int64),
                )


def _foreign(readers: Path, *arguments: str) -> Any:
    done = subprocess.run([readers, FOREIGN, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _ids(mask: npt.NDArray[Any], ontology: Ontology) -> Labels:
    return np.where(mask == ontology.ignore_index, NOTHING, mask.astype(np.int64))


OPENED: Mapping[str, tuple[str, Callable[[Path, Ontology, Path], Found]]] = {
    "png": ("Pillow", by_pillow),
    "coco": ("pycocotools", by_pycocotools),
    "coco-panoptic": ("Pillow, by COCO's definition", by_panoptic),
    "coco-stuff": ("pycocotools", by_stuff),
    "hf": ("datasets", by_datasets),
    "webdataset": ("webdataset", by_webdataset),
    "voc": ("torchvision VOCSegmentation", by_torchvision_voc),
    "cityscapes": ("torchvision Cityscapes", by_torchvision_cityscapes),
    "yolo": ("supervision from_yolo", by_supervision),
    "labelstudio": ("label-studio-sdk Converter", by_sdk),
    "cvat": ("datumaro, as CVAT", by_datumaro),
}

if __name__ == "__main__":
    main()
