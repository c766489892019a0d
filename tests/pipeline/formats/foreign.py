"""foreign.py FUNCTION ARGUMENTS, run by another Python, that of requirements-readers.txt."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def datumaro_voc(folder: str, found: str, kind: str = "voc_instance_segmentation") -> dict:
    """Read as CVAT reads "Segmentation mask 1.1"; the masks of the annotations go to a file."""
    from datumaro.components.annotation import AnnotationType
    from datumaro.components.dataset import Dataset

    dataset = Dataset.import_from(folder, kind)
    items = sorted(dataset, key=lambda item: (item.subset != "trainval", item.subset))
    if any(item.subset == "trainval" for item in items):
        items = [item for item in items if item.subset == "trainval"]
    drawn = []
    for item in items:
        masks = [one for one in item.annotations if one.type == AnnotationType.mask]
        labels = np.zeros(masks[0].image.shape if masks else (1, 1), int)
        for one in masks:
            assert not labels[one.image.astype(bool)].any()
            labels[one.image.astype(bool)] = one.label
        drawn.append(labels)
    np.savez(found, *drawn)
    names = [label.name for label in dataset.categories()[AnnotationType.label]]
    return {"labels": names, "items": [item.id for item in items]}


def labelstudio(folder: str, found: str) -> dict:
    """Convert as Label Studio does when brush labels are exported, after somebody has accepted them all."""
    from label_studio_sdk.converter import Converter
    from label_studio_sdk.label_interface import LabelInterface

    config = Path(folder, "label_config.xml").read_text(encoding="utf-8")
    tasks = json.loads(Path(folder, "tasks.json").read_text(encoding="utf-8"))
    for number, task in enumerate(tasks):
        task["id"] = number
        accepted = {"id": number, "completed_by": {"email": "x"}, "result": task["predictions"][0]["result"]}
        task["annotations"] = [accepted]
    out = Path(found, "brush")
    out.mkdir(parents=True)
    accepted_file = Path(found, "accepted.json")
    accepted_file.write_text(json.dumps(tasks), encoding="utf-8")
    Converter(config, None).convert(str(accepted_file), str(out), "BRUSH_TO_NUMPY", is_dir=False)
    interface = LabelInterface(config)
    interface.validate()
    for task in tasks:
        assert interface.validate_prediction(task["predictions"][0], return_errors=True) == []
    control = interface.get_control("label")
    return {
        "labels": list(control.labels),
        "to_name": control.to_name,
        "files": sorted(path.name for path in out.rglob("*.npy")),
        "folder": str(out),
    }


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
