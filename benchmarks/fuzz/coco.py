"""COCO JSON files, opened and drawn."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.fuzz.kind import Fault, Kind
from benchmarks.fuzz.mutations import JUNK, mutate_bytes, mutate_tree
from pipeline.datasets.cocojson import open_coco_json
from pipeline.ontology.ontology import Ontology

SIDE = 24
PICTURES = ("a.png", "b.png", "sub/c.png")
CLASSES = Ontology.from_dict({"name": "fuzz", "classes": ["cat", "dog"], "background": ["wall"]})


class Coco(Kind):
    """See the package."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._images = folder / "images"
        (self._images / "sub").mkdir(parents=True)
        for name in PICTURES:
            Image.new("RGB", (SIDE, SIDE - 4)).save(self._images / name)

    @classmethod
    def make(cls, rng: random.Random) -> bytes:
        """A file whose structure is mutated, and sometimes its bytes."""
        text = json.dumps(
            mutate_tree(rng, valid(rng), most=rng.randint(0, 2)), ensure_ascii=rng.random() < 0.5
        )
        data = text.encode(rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16")), "surrogatepass")
        return mutate_bytes(rng, data, most=2) if rng.random() < 0.2 else data

    def check(self, data: bytes, rng: random.Random) -> str:
        """Open the file, with and without given classes, and draw every image."""
        path = self.folder / "instances.json"
        path.write_bytes(data)
        dataset = open_coco_json(str(path), str(self._images), ontology=rng.choice((None, CLASSES)))
        drawn = 0
        for sample in dataset.samples:
            for labels in (dataset.truth(sample), dataset.union(sample, dataset.class_ids_of(sample))):
                if labels.ndim != 2 or not labels.size:
                    raise Fault(f"{sample.name} is {labels.shape}")
            ids = set(np.unique(dataset.truth(sample)).tolist())
            known = set(range(dataset.classes.num_classes)) | {dataset.ignore_index}
            if not ids <= known:
                raise Fault(f"{sample.name} has the labels {sorted(ids - known)[:5]}")
            again = dataset.truth(sample)
            if not np.array_equal(again, dataset.truth(sample)):
                raise Fault(f"{sample.name} differs when drawn again")
            drawn += 1
        return "drawn" if drawn else "no images"


def valid(rng: random.Random) -> dict[str, Any]:
    """A small valid file."""
    from pycocotools import mask as coco

    height, width = SIDE - 4, SIDE
    annotations: list[dict[str, Any]] = []
    for number in range(rng.randint(1, 4)):
        points = [round(rng.uniform(-2, SIDE + 2), 2) for _ in range(2 * rng.randint(3, 6))]
        mask = np.asfortranarray(
            np.array([[rng.random() < 0.4 for _ in range(width)] for _ in range(height)], np.uint8)
        )
        encoded = coco.encode(mask)
        runs = _runs(mask)
        segmentation: Any = rng.choice(
            (
                [points],
                [points, points[:6]],
                {"size": [height, width], "counts": encoded["counts"].decode()},
                {"size": [height, width], "counts": runs},
            )
        )
        if rng.random() < 0.15:
            segmentation = _spoilt(rng, runs, encoded["counts"].decode(), points)
        annotations.append(
            {
                "id": number + 1, "image_id": rng.randint(1, 3), "category_id": rng.randint(1, 3),
                "iscrowd": int(isinstance(segmentation, dict)), "segmentation": segmentation, "area": 1.0,
                "bbox": [0, 0, 4, 4],
            }
        )  # fmt: skip
    return {
        "info": {}, "licenses": [],
        "images": [
            {"id": place + 1, "file_name": name, "height": height, "width": width}
            for place, name in enumerate(PICTURES)
        ],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cow (animal)"}],
    }  # fmt: skip


def _runs(mask: Any) -> list[int]:
    """Uncompressed RLE: runs of zeros and ones in turn, by columns."""
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *edges.tolist(), len(flat)]).tolist()
    return [0, *lengths] if flat[0] else lengths


def _spoilt(rng: random.Random, runs: list[int], counts: str, points: list[float]) -> Any:
    size = [SIDE - 4, SIDE]
    match rng.randrange(7):
        case 0:
            return {"size": size, "counts": runs[: rng.randrange(len(runs) + 1)]}
        case 1:
            return {"size": size, "counts": [*runs, rng.choice((1, 10**6, 2**31, 2**32, -5))]}
        case 2:
            return {"size": size, "counts": counts[: rng.randrange(len(counts) + 1)]}
        case 3:
            return {"size": size, "counts": counts + rng.choice(("0", "ooooooo", "~~~~", "é", "\0"))}
        case 4:
            spoilt: list[Any] = list(points)
            spoilt[rng.randrange(len(spoilt))] = rng.choice(JUNK)
            return [spoilt]
        case 5:
            return [[rng.choice((1e9, -1e9, 1e300, 2.0**31)) for _ in range(8)]]
        case _:
            return [points[: rng.choice((1, 2, 4, 5))]]


KIND = Coco
