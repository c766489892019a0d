"""Thresholds and classes after labelling, in each command that reads a table: nothing is labelled again."""

from __future__ import annotations

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
from sklearn.metrics import confusion_matrix

from jobs.options import ViewOptions
from models.errors import MaskMillError
from pipeline.corpus.manifest import stable_id
from pipeline.datasets.pairs import open_pairs
from pipeline.evaluation.classes import match_classes, matched
from pipeline.evaluation.tables import evaluate_table
from pipeline.files.storage import canonical_uri, open_storage
from pipeline.labelling.recipes import RECIPES
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import load_ontology
from pipeline.table.labels import LABEL_SCHEMA, ok_row
from pipeline.table.record import TableRecord, write_table_record
from pipeline.table.views import View

SUBSET = Path(__file__).resolve().parents[3] / "shared" / "data" / "voc2012_subset"
CLASSES = Ontology.from_dict({"name": "three", "classes": ["sky", "grass", "cat", "dog"]})
H, W = 24, 32


class Made:
    """A table of four images whose labels are the truth; the right half of each is labelled with doubt."""

    def __init__(self, root: Path) -> None:
        self.root, self.table = root, root / "table"
        for folder in ("images", "masks", "table/labels"):
            (root / folder).mkdir(parents=True)
        rng = np.random.default_rng(0)
        rows = []
        self.labels: dict[str, np.ndarray] = {}
        self.confidence = np.where(np.arange(W) < W // 2, 230, 60).astype(np.uint8)[None].repeat(H, 0)
        for name in "abcd":
            labels = np.repeat(np.repeat(rng.integers(0, 4, (H // 4, W // 4)), 4, 0), 4, 1).astype(np.uint8)
            labels[0, 0] = (labels[0, 1] + 1) % 4  # a piece of one pixel
            path = root / "images" / f"{name}.png"
            Image.fromarray(rng.integers(0, 255, (H, W, 3)).astype(np.uint8)).save(path)
            Image.fromarray(labels).save(root / "masks" / f"{name}.png")
            uri = canonical_uri(path)
            rows.append(
                ok_row(
                    id=stable_id(uri), uri=uri, sha256=None, height=H, width=W, labels=labels,
                    confidence=self.confidence, ignore_index=255,
                )
            )  # fmt: skip
            self.labels[name] = labels
        pq.write_table(pa.Table.from_pylist(rows, schema=LABEL_SCHEMA), self.table / "labels/part-0.parquet")
        record = {
            "ontology": CLASSES.to_record(),
            "recipe": RECIPES["toy"].to_dict(),
            "weights": {"model": "toyclip", "pretrained": "bundled", "fingerprint": "0" * 64},
        }
        (self.table / "dataset.json").write_text(json.dumps(record))

    def files(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.table.rglob("*") if path.is_file()}


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def test_the_gallery_shows_a_view_and_keeps_it(made: Made, maskmill_here: Callable[..., Any]) -> None:
    before = made.files()
    page = made.root / "page.html"
    show = ("show", made.table, "--output", page)
    done = maskmill_here(*show, "--threshold", "0.5", "--merge", "cat,dog=pet", "--save-view", "sure")
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert "confidence from 0.5; cat and dog are pet" in text
    assert ">pet<" in text and ">dog<" not in text
    # Half of the table, and half of each of its four images.
    assert re.findall(r'">unsure.*?class="num">([^<]*)<', text) == ["50 %"] * 5
    kept = made.table / "views" / "sure.json"
    assert json.loads(kept.read_text()) == {
        "schema_version": 1, "threshold": 0.5, "merge": {"pet": ["cat", "dog"]},
    }  # fmt: skip
    again = maskmill_here(*show, "--view", "sure")
    assert again.returncode == 0 and page.read_text() == text
    other = maskmill_here(*show, "--view", "sure", "--drop", "sky", "--save-view", "sure")
    assert other.returncode == 2 and "is another view" in other.stderr and page.read_text() == text
    assert {name: data for name, data in made.files().items() if "/views/" not in name} == before


def test_options_say_what_a_file_says(made: Made) -> None:
    (made.root / "limits.yaml").write_text(
        "name: l\nclasses: [{name: cat, threshold: 0.7}, {name: dog, threshold: 0.2}, sky]\n"
    )
    (made.root / "view.yaml").write_text("threshold: 0.1\nmin_areas: {sky: 9}\ndrop: [grass]\n")
    options = ViewOptions(
        view=str(made.root / "view.yaml"),
        threshold=("0.3", "dog=0.4"),
        thresholds=str(made.root / "limits.yaml"),
        min_area=("5", "cat=20"),
        merge=('"salt, pepper", cat = a=b',),
        drop="sky",
        rename=("dog=hound",),
    )
    assert options.load(str(made.table)) == View(
        threshold=0.3, thresholds={"cat": 0.7, "dog": 0.4}, min_area=5, min_areas={"sky": 9, "cat": 20},
        merge={"b": ("salt, pepper", "cat = a")}, drop=("grass", "sky"), rename={"dog": "hound"},
    )  # fmt: skip
    assert ViewOptions().of_table(str(made.table)) is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threshold": ("1.5",)}, "no number from 0 to 1"),
        ({"threshold": ("cat=nan",)}, "no number from 0 to 1"),
        ({"min_area": ("-3",)}, "no number of pixels"),
        ({"merge": ("cat,dog",)}, "does not say what becomes what"),
        ({"rename": ("cat=",)}, "does not say what becomes what"),
        ({"drop": '"cat'}, "Quote names"),
        ({"drop": "cta"}, "Did you mean cat?"),
        ({"view": "strict"}, "There is no view strict"),
        ({"save_view": "strict"}, "nothing to keep"),
    ],
)
def test_options_that_say_nothing_are_refused(made: Made, options: dict[str, Any], says: str) -> None:
    with pytest.raises(MaskMillError) as error:
        ViewOptions(**options).of_table(str(made.table))
    assert says in str(error.value) and error.value.exit_status == 2


@pytest.fixture
def measure(made: Made, maskmill_here: Callable[..., Any]) -> Callable[..., Any]:
    """Evaluate the table; say what it answered, and its result if there is one."""

    def run(*options: object, expect: int = 0) -> tuple[str, dict[str, Any]]:
        out = made.root / "out"
        done = maskmill_here(
            "evaluate", "--labels", made.table, "--images", made.root / "images",
            "--truth", made.root / "masks", "--output", out, "--overwrite", *options,
        )  # fmt: skip
        assert done.returncode == expect, done.stderr
        said = " ".join(f"{done.stdout} {done.stderr}".split())
        return said, json.loads((out / "evaluation.json").read_text()) if expect == 0 else {}

    return run


@pytest.mark.slow
def test_an_evaluation_counts_what_a_view_shows(made: Made, measure: Callable[..., Any]) -> None:
    before = made.files()
    said, sure = measure("--threshold", "0.5", "--save-view", "sure")
    truth = np.concatenate([labels[:, : W // 2].ravel() for labels in made.labels.values()])
    weak = np.concatenate([labels[:, W // 2 :].ravel() for labels in made.labels.values()])
    right, missed = np.bincount(truth, minlength=4), np.bincount(weak, minlength=4)
    assert sure["confusion"] == np.hstack([np.diag(right), missed[:, None]]).tolist()
    assert sure["view"] == {
        "settings": {"schema_version": 1, "threshold": 0.5},
        "says": ["confidence from 0.5"],
    }
    assert sure["title"] == "toy, confidence from 0.5 on pairs (all)"
    assert sure["protocol"] == "custom" and "view: confidence from 0.5" in said
    assert measure("--view", "sure")[1]["confusion"] == sure["confusion"]
    assert {name: data for name, data in made.files().items() if "/views/" not in name} == before


def test_a_view_of_fewer_classes_is_measured_on_what_is_common(
    made: Made, measure: Callable[..., Any]
) -> None:
    pet = ("--merge", "cat,dog=pet", "--min-area", "pet=2")
    said, _ = measure(*pet, expect=2)
    assert "classes_differ" in said and "--common" in said and "--mapping" in said
    said, found = measure(*pet, "--common")
    assert [entry["name"] for entry in found["classes"]] == ["sky", "grass", "pet"]
    confusion = np.array(found["confusion"])
    alone = sum(
        int(labels[0, 0] > 1 and max(labels[0, 1], labels[1, 0]) < 2) for labels in made.labels.values()
    )
    everything = np.concatenate([labels.ravel() for labels in made.labels.values()])
    assert np.diag(confusion).sum() + alone == everything.size and confusion[2, 3] == alone
    assert found["compared"]["classes"][2] == {"name": "pet", "labels": ["pet"], "truth": ["cat", "dog"]}
    assert "class pet is pet of the labels, cat and dog of the truth" in said
    page = (made.root / "out/report.html").read_text()
    assert "Class pet is pet of the labels, cat and dog of the truth." in page


def test_a_mapping_says_which_class_is_which(made: Made, measure: Callable[..., Any]) -> None:
    (made.root / "truth.yaml").write_text("name: t\nclasses: [heaven, lawn, cat, dog]\n")
    (made.root / "map.yaml").write_text("sky: heaven\ngrass: lawn\n")
    own = ("--ontology", made.root / "truth.yaml")
    assert "no class 'heaven', 'lawn'" in measure(*own, expect=2)[0]
    said, found = measure(*own, "--common")
    assert [entry["name"] for entry in found["classes"]] == ["cat", "dog"]
    assert "only in the truth: heaven, lawn; they are ignored" in said
    _, found = measure(*own, "--mapping", made.root / "map.yaml")
    assert [entry["name"] for entry in found["classes"]] == ["heaven", "lawn", "cat", "dog"]
    assert found["metrics"]["miou"] == 1


@pytest.mark.skipif(not SUBSET.is_dir(), reason="the VOC subset is not on this machine (shared/data)")
def test_labels_of_four_classes_are_measured_on_the_masks_of_voc(tmp_path: Path) -> None:
    four = Ontology.from_dict(
        {
            "name": "four",
            "background": ["wall"],
            "classes": ["dog", {"name": "people", "synonyms": ["person"]}, "cat", "grass"],
        }
    )
    voc = load_ontology("voc21").names
    ours = np.zeros(256, np.uint8)
    ours[[voc.index("dog"), voc.index("person"), voc.index("cat")]] = 1, 2, 3
    rows, expected = [], np.zeros((4, 5), np.int64)
    for mask in sorted((SUBSET / "SegmentationClassAug").glob("*.png"))[::35]:
        truth = np.asarray(Image.open(mask))
        # Labels that are often wrong: the truth to the left, with lawn at the bottom, and some unsure.
        labels = ours[np.roll(truth, 9, 1)]
        labels[-20:], labels[:5] = 4, 255
        path = SUBSET / "JPEGImages" / f"{mask.stem}.jpg"
        uri = canonical_uri(path)
        rows.append(
            ok_row(
                id=stable_id(uri), uri=uri, sha256=None, height=truth.shape[0], width=truth.shape[1],
                labels=labels, confidence=np.full_like(labels, 200), ignore_index=255,
            )
        )  # fmt: skip
        # Measured in the order of the truth: background, cat, dog, person.
        true = np.select([truth == voc.index(name) for name in ("cat", "dog", "person")], [1, 2, 3], 0)
        found = np.array([0, 2, 3, 1, 0])[np.minimum(labels, 4)]
        found[labels == 255] = 4
        known = truth != 255
        expected += confusion_matrix(true[known], found[known], labels=range(5))[:4]
    (tmp_path / "labels").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=LABEL_SCHEMA), tmp_path / "labels/part-0.parquet")
    weights = {"model": "toyclip", "pretrained": "bundled", "fingerprint": "0" * 64}
    record = TableRecord(ontology=four, recipe=RECIPES["toy"].to_dict(), weights=weights)
    write_table_record(open_storage(tmp_path), record)
    dataset = open_pairs(
        images=str(SUBSET / "JPEGImages"),
        masks=str(SUBSET / "SegmentationClassAug"),
        ontology=load_ontology("voc21"),
    )
    match = match_classes(four, dataset.classes)
    assert match.ontology.names == ("background", "cat", "dog", "person")
    assert match.others == "background" and match.only_labels == ("grass",) and len(match.only_truth) == 17
    found = evaluate_table(
        str(tmp_path), matched(dataset, match), class_names=four.names, ignore_index=255, lookup=match.labels,
        boundary=False,
    )  # fmt: skip
    assert found.statistics.confusion.tolist() == expected.tolist() and (expected.sum(1) > 0).all()
    assert len(found.images) == len(rows) and len(found.missing) == len(dataset.samples) - len(rows)
