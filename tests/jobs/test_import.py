"""``maskmill import``: datasets with masks become label tables of true labels."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from benchmarks.faults.runs import Command
from pipeline.files.storage import open_storage
from pipeline.formats.importing import import_samples
from pipeline.formats.png import read_png
from pipeline.table.labels import OK, decode_confidence, decode_mask, iter_rows
from pipeline.table.record import read_table_record
from tests.pipeline.formats.tables import TOYWORLD, toy_table

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
VOC = DATA / "voc2012_subset"


def masks_of(table: Path | str) -> dict[str, np.ndarray]:
    """Label maps by the stem of the address."""
    rows = iter_rows(str(table), ["uri", "status", "mask"])
    return {Path(row["uri"]).stem: decode_mask(row["mask"]["bytes"]) for row in rows if row["status"] == OK}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, labels in expected.items():
        assert np.array_equal(found[name], labels), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["png", "coco", "hf"])
def test_an_export_comes_back_as_truth_and_is_used_like_any_table(
    tmp_path: Path, maskmill_here, name
) -> None:
    toy_table(tmp_path / "table", 6, images=tmp_path / "images")
    out, truth = tmp_path / "out", tmp_path / "truth"
    done = maskmill_here("export", tmp_path / "table", "--format", name, "--output", out, "--with-images")
    assert done.returncode == 0, done.stderr
    command = ("import", "--format", name, "--input", out, "--output", truth)
    done = maskmill_here(*command)
    assert done.returncode == 0 and "Imported 5 images with true labels" in done.stderr, done.stderr
    record = read_table_record(str(truth))
    assert record.source == "truth" and record.ontology.names == TOYWORLD.names
    assert record.counts["status"] == {"ok": 5} and record.counts["mean_quality"] > 0.9
    stems = {
        stem.split("_", 1)[-1] if name == "hf" else stem: labels for stem, labels in masks_of(truth).items()
    }
    assert_same(stems, masks_of(tmp_path / "table"))
    for row in iter_rows(str(truth)):
        labels, sure = decode_mask(row["mask"]["bytes"]), decode_confidence(row["confidence"]["bytes"])
        assert ((sure == 255) == (labels != 255)).all() and set(np.unique(sure)) <= {0, 255}

    before = (truth / "dataset.json").read_bytes()
    again = maskmill_here(*command)
    assert again.returncode == 0 and "Nothing new" in again.stderr
    assert (truth / "dataset.json").read_bytes() == before
    assert maskmill_here("verify", truth).returncode == 0
    done = maskmill_here("export", truth, "--format", "png", "--output", tmp_path / "png", "--with-images")
    assert (
        done.returncode == 0 and json.loads((tmp_path / "png/export.json").read_text())["source"] == "truth"
    )
    measured = maskmill_here(
        "evaluate", "--labels", truth, "--images", tmp_path / "png/images", "--truth", tmp_path / "png/masks",
        "--output", tmp_path / "result",
    )  # fmt: skip
    assert measured.returncode == 0 and "mIoU 100.0 %" in measured.stdout + measured.stderr


def test_bad_images_are_rows_and_a_second_listing_is_passed_over(tmp_path: Path, maskmill_here) -> None:
    toy_table(tmp_path / "table", 7, images=tmp_path / "images")
    assert maskmill_here(
        "export", tmp_path / "table", "--format", "coco", "--output", tmp_path / "coco"
    ).returncode == 0  # fmt: skip
    annotations = tmp_path / "coco" / "annotations"
    (first,) = annotations.iterdir()
    content = json.loads(first.read_text())
    # The same image in both splits.
    same = {"id": 999, "file_name": "x.png", "height": 48, "width": 48}
    same["coco_url"] = str(tmp_path / "images/same.png")
    first.write_text(json.dumps(content | {"images": [*content["images"], same]}))
    (annotations / "instances_more.json").write_text(
        json.dumps(content | {"images": [same], "annotations": []})
    )
    images = tmp_path / "images"
    (images / "scene_000.png").unlink()
    (images / "scene_001.png").write_bytes(b"no image")
    Image.new("RGB", (47, 48)).save(images / "scene_002.png")
    Image.new("RGB", (48, 48)).save(images / "same.png")
    command = ["import", "--format", "coco", "--input", tmp_path / "coco", "--output", tmp_path / "truth"]
    done = maskmill_here(*command)
    assert done.returncode == 1 and "42.9% of the images failed" in done.stderr, done.stderr
    assert "1 images were listed again" in done.stderr
    status = {Path(row["uri"]).stem: row["status"] for row in iter_rows(str(tmp_path / "truth"))}
    assert status == {
        "scene_000": "not_found", "scene_001": "not_an_image", "scene_002": "mask_invalid",
        "scene_003": OK, "scene_004": OK, "scene_005": OK, "same": OK,
    }  # fmt: skip
    # Another dataset does not go into this table, nor into one of a model's labels.
    other = maskmill_here("import", "--dataset", "toyworld", "--output", tmp_path / "truth")
    assert other.returncode == 2 and "[output_differs]" in other.stderr
    other = maskmill_here(*command[:-1], tmp_path / "table")
    assert other.returncode == 2 and "[output_differs]" in other.stderr
    anew = maskmill_here(*command, "--overwrite", "--max-failure-rate", 0.5)
    assert anew.returncode == 0 and "Imported 4 images" in anew.stderr


@pytest.mark.parametrize("name", ["png", "voc", "webdataset"])
def test_damaged_masks_are_rows(tmp_path: Path, maskmill_here, name: str) -> None:
    """One that is no PNG, one that is gone, one of another size, and one with ids that are no class."""
    toy_table(tmp_path / "table", 7, images=tmp_path / "images")
    out = tmp_path / "out"
    done = maskmill_here("export", tmp_path / "table", "--format", name, "--output", out, "--with-images")
    assert done.returncode == 0, done.stderr
    small, strange = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.zeros((20, 48), np.uint8)).save(small, "PNG")
    Image.fromarray(np.full((48, 48), 200, np.uint8)).save(strange, "PNG")
    damage = {"scene_000": b"no mask", "scene_001": None, "scene_002": small.getvalue()}
    damage["scene_003"] = strange.getvalue()
    if name == "webdataset":
        for shard in out.glob("*.tar"):
            with tarfile.open(shard) as old:
                members = [(one, old.extractfile(one).read()) for one in old]
            with tarfile.open(shard, "w") as new:
                for member, content in members:
                    key, _, field = member.name.partition(".")
                    made = damage.get(key, content) if field == "mask.png" else content
                    if made is not None:
                        member.size = len(made)
                        new.addfile(member, io.BytesIO(made))
    else:
        masks = {path.stem: path for path in out.rglob("*.png") if path.parent.name != "images"}
        for stem, data in damage.items():
            masks[stem].write_bytes(data) if data is not None else masks[stem].unlink()
    command = ("import", "--format", name, "--input", out, "--output", tmp_path / "truth")
    done = maskmill_here(*command)
    assert done.returncode == 1 and "66.7% of the images failed" in done.stderr, done.stderr
    rows = {Path(row["uri"]).stem[-9:]: row for row in iter_rows(str(tmp_path / "truth"))}
    assert {stem: row["status"] for stem, row in rows.items()} == {
        "scene_000": "dataset_invalid", "scene_001": "dataset_invalid", "scene_002": "mask_invalid",
        "scene_003": "mask_invalid", "scene_004": OK, "scene_005": OK,
    }  # fmt: skip
    assert all(row["error"] and row["height"] == 48 for row in rows.values() if row["status"] != OK)
    assert maskmill_here("verify", tmp_path / "truth").returncode == 0
    again = maskmill_here(*command)
    assert again.returncode == 0 and "Nothing new" in again.stderr


@pytest.fixture
def damaged(tmp_path: Path, maskmill_here) -> Path:
    """A PNG dataset of five images, without one image and with two damaged masks, and its import."""
    toy_table(tmp_path / "table", 6, images=tmp_path / "images")
    done = maskmill_here("export", tmp_path / "table", "--format", "png", "--output", tmp_path / "png")
    assert done.returncode == 0, done.stderr
    for place in ("images/scene_000.png", "png/masks/scene_001.png", "png/masks/scene_002.png"):
        (tmp_path / place).rename(tmp_path / place.replace("/", "-"))
    (tmp_path / "png/masks/scene_001.png").write_bytes(b"no mask")
    listing = tmp_path / "png/images.csv"
    listing.with_suffix(".all").write_text(listing.read_text())
    listing.write_text("".join(line for line in listing.open() if "scene_004" not in line))
    done = maskmill_here(*again(tmp_path, "--max-failure-rate", 1))
    assert done.returncode == 0, done.stderr
    assert statuses(tmp_path) == {0: "not_found", 1: "dataset_invalid", 2: "dataset_invalid", 3: OK}
    return tmp_path


def again(folder: Path, *more: object) -> tuple[object, ...]:
    return ("import", "--format", "png", "--input", folder / "png", "--output", folder / "truth", *more)


def statuses(folder: Path) -> dict[int, str]:
    """By number of the scene; each has one row."""
    rows = list(iter_rows(str(folder / "truth")))
    found = {int(Path(row["uri"]).stem[-3:]): row["status"] for row in rows}
    assert len(found) == len(rows)
    return found


def repair(folder: Path, *places: str) -> None:
    for place in places:
        (folder / place.replace("/", "-")).replace(folder / place)


def test_what_failed_is_read_again_and_takes_the_place_of_its_row(damaged: Path, maskmill_here) -> None:
    listing = damaged / "png/images.csv"
    listing.write_text(listing.with_suffix(".all").read_text())  # a new image is not one that failed
    repair(damaged, "images/scene_000.png", "png/masks/scene_001.png")
    before = {row["uri"]: row for row in iter_rows(str(damaged / "truth"))}
    done = maskmill_here(*again(damaged, "--retry-failed", "dataset_invalid", "--max-failure-rate", 0.5))
    assert done.returncode == 0, done.stderr
    assert "Imported 1 images" in done.stderr and "1 failed: 1 dataset_invalid" in done.stderr
    assert statuses(damaged) == {0: "not_found", 1: OK, 2: "dataset_invalid", 3: OK}
    after = {row["uri"]: row for row in iter_rows(str(damaged / "truth"))}
    assert [Path(uri).stem for uri in before if before[uri] != after[uri]] == ["scene_001"]
    done = maskmill_here(*again(damaged, "--retry-failed"))
    assert done.returncode == 1 and "50.0% of the images failed" in done.stderr, done.stderr
    repair(damaged, "png/masks/scene_002.png")
    assert maskmill_here(*again(damaged, "--retry-failed")).returncode == 0
    for said in ("Imported 1 images", "Nothing new: all 5 images"):
        done = maskmill_here(*again(damaged))
        assert done.returncode == 0 and said in done.stderr, done.stderr
    assert statuses(damaged) == dict.fromkeys(range(5), OK)
    assert_same(masks_of(damaged / "truth"), masks_of(damaged / "table"))
    counts = read_table_record(str(damaged / "truth")).counts
    assert counts["images"] == 5 and counts["status"] == {OK: 5}
    assert maskmill_here("verify", damaged / "truth").returncode == 0
    done = maskmill_here(*again(damaged, "--retry-failed"))
    assert done.returncode == 0 and "Nothing to retry: no image failed in" in done.stderr, done.stderr


def test_retried_rows_of_a_killed_import_are_put_in_place_by_the_next(damaged: Path, maskmill_here) -> None:
    repair(damaged, "images/scene_000.png", "png/masks/scene_001.png")
    table = open_storage(damaged / "truth")
    ids = np.array([row["id"] for row in iter_rows(table, ["id"])], np.int64)
    imported = read_png(str(damaged / "png"))
    import_samples(imported.samples, table, ignore_index=255, done=ids, again=ids)
    # Killed here: the new rows wait, and nobody sees a row twice, or none.
    assert statuses(damaged) == {0: "not_found", 1: "dataset_invalid", 2: "dataset_invalid", 3: OK}
    assert maskmill_here(*again(damaged)).returncode == 0
    assert statuses(damaged) == {0: OK, 1: OK, 2: "dataset_invalid", 3: OK}
    assert read_table_record(str(damaged / "truth")).counts["status"] == {OK: 3, "dataset_invalid": 1}


def test_a_failed_image_that_the_dataset_no_longer_has_keeps_its_row(damaged: Path, maskmill_here) -> None:
    listing = damaged / "png/images.csv"
    listing.write_text("".join(line for line in listing.open() if "scene_000" not in line))
    repair(damaged, "png/masks/scene_001.png", "png/masks/scene_002.png")
    done = maskmill_here(*again(damaged, "--retry-failed"))
    assert done.returncode == 0 and "Imported 2 images" in done.stderr, done.stderr
    assert "1 images that failed are no longer in the dataset" in done.stderr
    assert statuses(damaged) == {0: "not_found", 1: OK, 2: OK, 3: OK}
    wrong = maskmill_here(*again(damaged, "--retry-failed", "mask_unvalid"))
    assert wrong.returncode == 2 and "Codes in the table: not_found (1)" in wrong.stderr, wrong.stderr


@pytest.mark.slow
def test_everything_may_be_in_an_object_store(maskmill_here, s3: dict[str, str]) -> None:
    fsspec.filesystem("s3").mkdir("mill")
    toy_table("s3://mill/table", 3, images="s3://mill/images")
    for command in (
        ("export", "s3://mill/table", "--format", "coco", "--output", "s3://mill/coco", "--with-images"),
        ("import", "--format", "coco", "--input", "s3://mill/coco", "--output", "s3://mill/truth"),
    ):
        for said in ("2 images", "Nothing new"):
            done = maskmill_here(*command, **s3)
            assert done.returncode == 0 and said in done.stderr, done.stderr
    assert_same(masks_of("s3://mill/truth"), masks_of("s3://mill/table"))


@pytest.mark.slow
def test_a_killed_import_goes_on(tmp_path: Path, maskmill_here, maskmill_environment) -> None:
    """A real SIGKILL between two parts."""
    count, folders = 1600, (tmp_path / "images", tmp_path / "masks")  # several parts
    for folder in folders:
        folder.mkdir()
        for number in range(count):
            Image.fromarray(np.full((2, 2), number % 14, np.uint8)).save(folder / f"{number:04}.png")
    command = ["import", "--images", str(folders[0]), "--truth", str(folders[1]), "--ontology", "toyworld",
               "--output", str(tmp_path / "truth")]  # fmt: skip
    run = Command(command, maskmill_environment, tmp_path / "log.txt")
    labels = tmp_path / "truth" / "labels"
    assert run.wait_until(
        lambda: labels.is_dir() and any(path.suffix == ".parquet" for path in labels.iterdir())
    )
    run.driver.kill()
    assert run.wait() == -9
    assert 0 < len(masks_of(tmp_path / "truth")) < count
    done = maskmill_here(*command)
    assert done.returncode == 0, done.stderr
    rows = list(iter_rows(str(tmp_path / "truth")))
    assert len(rows) == len({row["uri"] for row in rows}) == count
    assert read_table_record(str(tmp_path / "truth")).counts["images"] == count
    for row in rows:
        assert (decode_mask(row["mask"]["bytes"]) == int(Path(row["uri"]).stem) % 14).all()


@pytest.mark.skipif(not VOC.is_dir(), reason="the VOC subset is not on this machine (shared/data)")
def test_real_masks_become_coco_and_come_back(tmp_path: Path, maskmill_here) -> None:
    root = tmp_path / "some"
    lists = "ImageSets/val.txt"
    (root / lists).parent.mkdir(parents=True)
    (root / lists).write_text("\n".join((VOC / lists).read_text().split()[:12]))
    for name in ("JPEGImages", "SegmentationClassAug"):
        (root / name).symlink_to(VOC / name)
    done = maskmill_here(
        "import", "--dataset", "voc21", "--root", root, "--split", "val", "--output", tmp_path / "voc"
    )
    assert done.returncode == 0, done.stderr
    for command in (
        ("export", tmp_path / "voc", "--format", "coco", "--output", tmp_path / "coco"),
        ("import", "--format", "coco", "--input", tmp_path / "coco", "--output", tmp_path / "back"),
    ):
        done = maskmill_here(*command)
        assert done.returncode == 0, done.stderr
    assert_same(masks_of(tmp_path / "back"), masks_of(tmp_path / "voc"))
    assert read_table_record(str(tmp_path / "back")).ontology.names[0] == "background"


def test_an_image_that_is_turned_by_exif_fits_labels_of_what_is_shown(tmp_path: Path, maskmill_here) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(np.zeros((30, 50, 3), np.uint8)).save(file, "JPEG", exif=exif)
    for place in ("images", "masks"):
        (tmp_path / place).mkdir()
    (tmp_path / "images/a.jpg").write_bytes(file.getvalue())
    Image.fromarray(np.ones((50, 30), np.uint8)).save(tmp_path / "masks/a.png")
    done = maskmill_here(
        "import", "--images", tmp_path / "images", "--truth", tmp_path / "masks", "--ontology", "toyworld",
        "--output", tmp_path / "truth",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = iter_rows(str(tmp_path / "truth"))
    assert (row["height"], row["width"]) == (50, 30)


def test_a_file_that_is_no_dataset_is_told(tmp_path: Path, maskmill_here) -> None:
    (tmp_path / "data.yaml").write_text("names: [cat]")
    done = maskmill_here(
        "import", "--format", "yolo", "--input", tmp_path / "data.yaml", "--output", tmp_path / "o"
    )
    assert done.returncode == 2 and "data.yaml is a file" in done.stderr, done.stderr
    assert not (tmp_path / "o").exists()
