"""The label table of ``maskmill demo``, exported to COCO, and scored by pycocotools against the true maps.

    maskmill demo --output demo
    python -m benchmarks.coco_scores demo

The scenes that the demo labels have no masks on disk: they are drawn again from its seed. Both tables are
exported by ``maskmill export``. A segment of COCO is a connected component; its score is the mean confidence
of its class in its image.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.formats import maskmill
from jobs.demo import Demo
from pipeline.ontology.reading import load_ontology
from pipeline.table.labels import iter_rows
from pipeline.toyworld.scenes import generate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", type=Path, help="the --output of maskmill demo")
    parser.add_argument("--size", type=int, default=Demo.size, help="of its scenes")
    parser.add_argument("--seed", type=int, default=Demo.seed, help="of its scenes")
    arguments = parser.parse_args()
    images = sorted((arguments.demo / "images").iterdir())
    with tempfile.TemporaryDirectory(prefix="maskmill-bench-") as scratch:
        folder = Path(scratch)
        (folder / "masks").mkdir()
        scenes = generate(arguments.seed, len(images), arguments.size)
        for image, scene, labels in zip(images, scenes.images, scenes.labels, strict=True):
            assert np.array_equal(np.asarray(Image.open(image)), scene), f"{image} is of another seed or size"
            Image.fromarray(labels.astype(np.uint8)).save(folder / "masks" / image.name)
        maskmill(
            "import", "--images", arguments.demo / "images", "--truth", folder / "masks",
            "--ontology", "toyworld", "--output", folder / "truth",
        )  # fmt: skip
        for name, table in (("true", folder / "truth"), ("made", arguments.demo / "table")):
            maskmill("export", table, "--format", "coco", "--output", folder / name)
        true, made = (
            COCO(str(folder / name / "annotations/instances_train.json")) for name in ("true", "made")
        )
        sure = {
            (Path(row["uri"]).stem, segment["class_id"]): segment["mean_confidence"]
            for row in iter_rows(str(arguments.demo / "table"), ["uri", "segments"])
            for segment in row["segments"]
        }
        image_name = {image["id"]: Path(image["file_name"]).stem for image in made.dataset["images"]}
        number = {Path(image["file_name"]).stem: image["id"] for image in true.dataset["images"]}
        names = {category["id"]: category["name"] for category in made.dataset["categories"]}
        category_of = {category["name"]: category["id"] for category in true.dataset["categories"]}
        classes = load_ontology("toyworld").names
        found = []
        for one in made.dataset["annotations"]:
            image_stem, name = image_name[one["image_id"]], names[one["category_id"]]
            score = sure[image_stem, classes.index(name)]
            found.append(
                {"image_id": number[image_stem], "category_id": category_of[name], "score": score}
                | {"segmentation": one["segmentation"]}
            )
        scores = COCOeval(true, true.loadRes(found), "segm")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
        print(f"{len(images)} images, {len(true.anns):,} true segments, {len(found):,} of the table")


if __name__ == "__main__":
    main()
