"""``maskmill evaluate`` on label tables and truth as people have them: what is told, counted and refused."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.corpus.manifest import stable_id
from pipeline.files.storage import canonical_uri
from pipeline.labelling.recipes import RECIPES
from pipeline.ontology.ontology import Ontology
from pipeline.table.labels import LABEL_SCHEMA, ok_row

# pycocotools under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")

CLASSES = Ontology.from_dict({"name": "three", "classes": ["sky", "grass", "cat"]})
NAMES = ("a", "b", "c", "d")
H, W = 20, 24
TRUTH = {name: np.full((H, W), number % 3, np.uint8) for number, name in enumerate(NAMES)}


def write_masks(folder: Path, masks: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    for name, mask in masks.items():
        if isinstance(mask, bytes):
            (folder / f"{name}.png").write_bytes(mask)
        else:
            Image.fromarray(mask).save(folder / f"{name}.png")


def write_table(root: Path, labels: dict[str, np.ndarray]) -> Path:
    """A table with given labels, and its images."""
    (root / "images").mkdir(parents=True)
    rows = []
    for name, mask in labels.items():
        path = root / "images" / f"{name}.png"
        Image.fromarray(np.full((H, W, 3), 90, np.uint8)).save(path)
        uri = canonical_uri(path)
        rows.append(
            ok_row(
                id=stable_id(uri), uri=uri, sha256=bytes(32), height=H, width=W, labels=mask,
                confidence=np.full((H, W), 200, np.uint8), ignore_index=255,
            )
        )  # fmt: skip
    folder = root / "table"
    (folder / "labels").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=LABEL_SCHEMA), folder / "labels" / "part-0.parquet")
    record = {
        "schema_version": 1,
        "ontology": CLASSES.to_dict() | {"hash": CLASSES.hash, "names": list(CLASSES.names)},
        "recipe": RECIPES["toy"].to_dict(),
        "weights": {"model": "toyclip", "pretrained": "toyworld", "fingerprint": "0" * 64},
        "precision": "fp32",
        "counts": {},
    }
    (folder / "dataset.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table whose labels are the truth of four images."""
    return write_table(tmp_path, TRUTH)


@pytest.fixture
def evaluate(table: Path, maskmill_here: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Evaluate the table; say what it answered."""

    def run(*options: object) -> Any:
        return maskmill_here(
            "evaluate", "--labels", table, *options, "--output", tmp_path / "out", "--no-boundary"
        )

    return run


def record(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    return found


def one_row_less(name: str) -> np.ndarray:
    return TRUTH[name][:-1]


def test_one_mask_of_another_size_is_said_with_both_sizes(evaluate, tmp_path: Path) -> None:
    write_masks(tmp_path / "masks", TRUTH | {"b": one_row_less("b")})
    done = evaluate("--images", tmp_path / "images", "--truth", tmp_path / "masks")
    assert done.returncode == 0, done.stderr
    assert "1 × image whose truth has another size (b: labels 20 x 24, truth 19 x 24 pixels)" in done.stderr
    result = record(tmp_path)
    assert result["images"]["evaluated"] == 3 and result["images"]["failed"] == 1
    assert any("b: labels 20 x 24, truth 19 x 24" in line for line in result["images"]["left_out"])
    assert "truth 19 x 24" in (tmp_path / "out" / "report.html").read_text()


def test_masks_that_all_have_another_size_are_no_result(evaluate, tmp_path: Path) -> None:
    write_masks(tmp_path / "masks", {name: one_row_less(name) for name in NAMES})
    done = evaluate("--images", tmp_path / "images", "--truth", tmp_path / "masks")
    assert done.returncode == 1 and "too_few_images" in done.stderr
    assert "4 × image whose truth has another size (a: labels 20 x 24, truth 19 x 24 pixels)" in done.stderr
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_a_truth_that_is_all_ignored_is_no_result(evaluate, tmp_path: Path) -> None:
    write_masks(tmp_path / "masks", {name: np.full((H, W), 255, np.uint8) for name in NAMES})
    done = evaluate("--images", tmp_path / "images", "--truth", tmp_path / "masks")
    assert done.returncode == 1 and "too_few_images" in done.stderr
    assert "all pixels of 4 images are ignored (ids found: 255)" in done.stderr


@pytest.mark.parametrize(("rows", "said"), [(H - 5, True), (5, False)])
def test_a_truth_that_is_mostly_ignored_is_said_with_its_ids(
    rows: int, said: bool, evaluate, tmp_path: Path
) -> None:
    masks = {name: truth.copy() for name, truth in TRUTH.items()}
    for mask in masks.values():
        mask[:rows] = 255
    write_masks(tmp_path / "masks", masks)
    done = evaluate("--images", tmp_path / "images", "--truth", tmp_path / "masks")
    assert done.returncode == 0, done.stderr
    sentence = "75.0 % of the truth's pixels, which are ignored (ids found: 0, 1, 2, 255; 255 means ignored)"
    assert (sentence in done.stderr.replace("\n", " ")) == said


def test_what_is_no_pair_is_counted(evaluate, tmp_path: Path) -> None:
    write_masks(tmp_path / "masks", TRUTH | {"other": TRUTH["a"]})
    (tmp_path / "images" / "e.heic").write_bytes(b"x")
    (tmp_path / "images" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "images" / "._a.png").write_bytes(b"x")
    done = evaluate("--images", tmp_path / "images", "--truth", tmp_path / "masks")
    assert done.returncode == 0, done.stderr
    for words in (
        "1 × mask without an image (other.png)",
        "1 × .heic, which is not read (e.heic)",
        "1 × .db, which is not read (Thumbs.db)",
    ):
        assert done.stderr.count(words) == 1
    assert "._a" not in done.stderr


def test_rows_and_images_without_each_other_are_counted(evaluate, tmp_path: Path) -> None:
    write_masks(tmp_path / "masks", {name: TRUTH[name] for name in ("a", "b")})
    (tmp_path / "images" / "d.png").rename(tmp_path / "images" / "new.png")
    (tmp_path / "images" / "c.png").unlink()
    Image.fromarray(TRUTH["a"]).save(tmp_path / "masks" / "new.png")
    done = evaluate("--images", tmp_path / "images", "--truth", tmp_path / "masks")
    assert done.returncode == 0, done.stderr
    assert "1 × image without a row in the table (new)" in done.stderr
    assert re.search(
        r"2 × row of the table whose image is not in the dataset \(.*c\.png, .*d\.png\)", done.stderr
    )


@pytest.mark.parametrize("name", ["a", "d"])
@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (b"", "the file has 0 bytes"),
        ("cut", "cannot be read"),
        ("gif", "it is no PNG, but GIF"),
        (b"no picture", r"it is no PNG, but 10 bytes that begin with b'no pictu'"),
        (np.zeros((H, W, 3), np.uint8), "is a picture of mode RGB"),
        (np.full((H, W), 77, np.uint8), "holds ids that three does not have: 77"),
    ],
)
def test_unreadable_masks_are_named(mask: Any, says: str, name: str, evaluate, tmp_path: Path) -> None:
    if isinstance(mask, str):
        made = io.BytesIO()
        Image.fromarray(TRUTH[name]).save(made, "GIF" if mask == "gif" else "PNG")
        mask = made.getvalue() if mask == "gif" else made.getvalue()[:-30]
    write_masks(tmp_path / "masks", TRUTH | {name: mask})
    # The first mask is looked at before anything is made or tracked.
    tracking = ["--tracking", f"sqlite:///{tmp_path}/runs.db"] if name == "a" else []
    done = evaluate("--images", tmp_path / "images", "--truth", tmp_path / "masks", *tracking)
    assert done.returncode == 2 and re.search(says, done.stderr), done.stderr
    assert str(tmp_path / "masks" / f"{name}.png") in done.stderr.replace("\n", "")
    assert "BytesIO" not in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "evaluation.json").exists()
    if name == "a":
        assert not (tmp_path / "out").exists() and not (tmp_path / "runs.db").exists()


def coco(tmp_path: Path, **changes: Any) -> Path:
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    (root / "images").mkdir()
    (root / "images" / "val2017").symlink_to(tmp_path / "images")
    content = {
        "images": [
            {"id": number, "file_name": f"{name}.png", "height": H, "width": W}
            for number, name in enumerate(NAMES)
        ],
        "categories": [{"id": number + 1, "name": name} for number, name in enumerate(CLASSES.names)],
        "annotations": [
            {"id": number, "image_id": number, "category_id": number % 3 + 1,
             "segmentation": [[0, 0, W, 0, W, H, 0, H]]}
            for number in range(len(NAMES))
        ],
    } | changes  # fmt: skip
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


def test_coco_json_has_the_classes_of_the_table(evaluate, tmp_path: Path) -> None:
    done = evaluate("--dataset", "coco-json", "--root", coco(tmp_path))
    assert done.returncode == 0, done.stderr
    assert record(tmp_path)["metrics"]["miou"] == 1


def test_coco_json_of_another_size(evaluate, tmp_path: Path) -> None:
    images = [
        {"id": number, "file_name": f"{name}.png", "height": 10, "width": 9}
        for number, name in enumerate(NAMES)
    ]
    done = evaluate("--dataset", "coco-json", "--root", coco(tmp_path, images=images))
    assert done.returncode == 1 and "a: labels 20 x 24, truth 10 x 9 pixels" in done.stderr.replace("\n", " ")


def test_coco_json_without_annotations(evaluate, tmp_path: Path) -> None:
    done = evaluate("--dataset", "coco-json", "--root", coco(tmp_path, annotations=[]))
    assert done.returncode == 1 and "all pixels of 4 images are ignored" in done.stderr
    assert "Traceback" not in done.stderr


ODD_NAMES = (
    " leading", "trailing ", "%41", "100% cotton", "hash#tag", "#comment", "what?", "star*", "a[1]", "a{1}",
    "semi;colon", "12:30", "--output", "~", "~tilde", "back\\slash", "quote'", 'quote"', "<b>", "a&b",
    "new\nline", "tab\t", "carriage\rreturn", "\x7f", "é", "e\u0301", "猫", "😀", "IMG", "img", "x" * 240,
    "dot.in.name", "a,b", "$HOME", "`ls`", "s3:", "file:", "nul", "a=b", "\u202eevil", "zero\u200bwidth",
    "line\u2028separator",
)  # fmt: skip


@pytest.mark.parametrize("listed", [False, True])
def test_odd_names_of_files(listed: bool, maskmill_here, tmp_path: Path) -> None:
    truth = {name: np.full((H, W), number % 3, np.uint8) for number, name in enumerate(ODD_NAMES)}
    table = write_table(tmp_path, truth)
    write_masks(tmp_path / "masks", truth)
    count, split = len(truth), []
    if listed:
        # A list has a name on each line, with or without the ending.
        names = [name for name in ODD_NAMES if "\n" not in name]
        text = "".join(f"{name}{'.png' if number % 2 else ''}\n" for number, name in enumerate(names))
        (tmp_path / "list.txt").write_text(text, encoding="utf-8-sig")
        count, split = len(names), ["--split", tmp_path / "list.txt"]
    done = maskmill_here(
        "evaluate", "--labels", table, "--dataset", "pairs", "--root", tmp_path, *split,
        "--output", tmp_path / "out", "--no-boundary",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = record(tmp_path)
    assert result["images"]["evaluated"] == count and result["metrics"]["miou"] == 1
