"""Splits of tables whose images have near-duplicates, folders and columns; what reads the splits."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance

from models.errors import MaskMillError
from pipeline.corpus.manifest import stable_id
from pipeline.evaluation.results import IMAGES_FILE
from pipeline.files.storage import open_storage
from pipeline.labelling.recipes import RECIPES
from pipeline.ontology.reading import load_ontology
from pipeline.table.labels import OK, iter_rows
from pipeline.table.record import read_table_record, write_table_record
from pipeline.table.splits import SPLIT_FILE, choose, find_split
from pipeline.training.samples.augment import AugmentSettings
from pipeline.training.samples.table import open_table_samples
from tests.pipeline.formats.tables import add_rows, toy_table

Run = Callable[..., subprocess.CompletedProcess[str]]
COPIES = ("resized", "compressed", "brighter", "cropped")


HARDER = ("brighter", "cropped by 6 %", "shifted", "mirrored")
"""The last three change a hash by more bits than are looked for."""


def _copy(image: Image.Image, how: str) -> tuple[bytes, str]:
    """A near-duplicate, encoded, and the ending of its name."""
    if how == "cropped by 6 %":
        image = image.crop((6, 6, image.width - 6, image.height - 6))
    if how == "shifted":
        image = image.crop((8, 8, image.width, image.height))
    if how == "mirrored":
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if how == "resized":
        image = image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.LANCZOS)
    if how == "brighter":
        image = ImageEnhance.Brightness(image).enhance(1.15)
    if how == "cropped":
        image = image.crop((1, 1, image.width - 1, image.height - 1))
    file, jpeg = io.BytesIO(), how in ("compressed", "cropped")
    image.save(file, "JPEG" if jpeg else "PNG", **({"quality": 60} if jpeg else {}))
    return file.getvalue(), ".jpg" if jpeg else ".png"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 96 scenes, and of near-duplicates of 24 of them in a folder of their own."""
    folder = tmp_path_factory.mktemp("planted")
    _plant(folder, 96, COPIES)
    return folder


def _plant(folder: Path, scenes: int, copies: tuple[str, ...]) -> None:
    toy_table(folder / "table", scenes + 1, size=96, rows_a_part=16, images=folder / "images")
    (folder / "copies").mkdir()
    uris = []
    for number in range(0, scenes, 4):
        image = Image.open(folder / "images" / f"scene_{number:03d}.png").convert("RGB")
        data, suffix = _copy(image, copies[number // 4 % len(copies)])
        place = folder / "copies" / f"copy_{number:03d}{suffix}"
        place.write_bytes(data)
        uris.append(str(place))
    # The labels do not matter here; the last of these rows fails.
    uris.append(str(folder / "copies" / "gone.png"))
    files = [Path(uri).read_bytes() for uri in uris[:-1]]
    add_rows(open_storage(folder / "table"), uris, seed=1, files=[*files, b""])


@pytest.fixture
def folder(planted: Path, tmp_path: Path) -> Path:
    """The same, without a split."""
    (planted / "table" / SPLIT_FILE).unlink(missing_ok=True)
    return planted


def _parts(folder: Path) -> dict[str, str | None]:
    split = find_split(str(folder / "table"))
    assert split is not None
    return {
        row["uri"]: split.part_of(row["id"]) for row in iter_rows(folder / "table") if row["status"] == OK
    }


def _crossing(folder: Path) -> list[str]:
    parts = _parts(folder)
    return [
        uri
        for uri, part in parts.items()
        if "/copies/" in uri and parts[f"{folder}/images/scene_{Path(uri).stem[-3:]}.png"] != part
    ]


def test_no_planted_near_duplicate_crosses(maskmill_here: Run, folder: Path) -> None:
    shares = ("--train", 0.6, "--val", 0.2, "--test", 0.2)
    done = maskmill_here("split", folder / "table", "--json", *shares)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["images"]["train"] + said["images"]["val"] + said["images"]["test"] == 120
    assert said["groups"] <= 97 and said["largest"] >= 2 and said["unread"] == 0
    assert _crossing(folder) == []
    # Without looking at the images they do cross: the test can fail.
    again = maskmill_here("split", folder / "table", *shares, "--near", "none", "--overwrite")
    assert again.returncode == 0, again.stderr
    assert len(_crossing(folder)) >= 4  # 13 of 24 are to be expected, whatever the ids


@pytest.mark.slow
def test_clip_finds_what_a_hash_does_not(maskmill_here: Run, tmp_path: Path) -> None:
    _plant(tmp_path, 48, HARDER)
    command = ("split", tmp_path / "table", "--json", "--train", 0.6, "--val", 0.2, "--test", 0.2)
    done = maskmill_here(*command)
    assert done.returncode == 0, done.stderr
    by_hash = json.loads(done.stdout)
    by_clip = (*command, "--near", "clip", "--similarity", 0.92)
    other = maskmill_here(*by_clip)
    assert other.returncode == 2 and "near hash, not clip" in other.stderr
    done = maskmill_here(*by_clip, "--overwrite")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["near"] == "clip" and said["clip"].startswith("toyclip ") and said["similarity"] == 0.92
    assert "toyclip" in done.stderr and said["unread"] == 0 and sum(said["images"].values()) == 60
    assert _crossing(tmp_path) == []
    # Copies are found, and scenes are still told apart; the hash alone lets copies go.
    assert 40 <= said["groups"] <= 48 and by_hash["groups"] >= said["groups"] + 5
    first = _parts(tmp_path)
    (tmp_path / "copies" / "copy_000.png").unlink()
    done = maskmill_here(*by_clip)
    assert done.returncode == 0 and json.loads(done.stdout)["unread"] == 1, done.stderr
    assert _parts(tmp_path) == first
    other = maskmill_here(*by_clip[:-1], 0.9)
    assert other.returncode == 2 and "similarity 0.92, not 0.9" in other.stderr


def test_the_split_is_the_same_for_a_seed_and_never_replaced_unasked(
    maskmill_here: Run, folder: Path
) -> None:
    assert maskmill_here("split", folder / "table").returncode == 0
    first = _parts(folder)
    assert maskmill_here("split", folder / "table").returncode == 0
    assert _parts(folder) == first
    other = maskmill_here("split", folder / "table", "--seed", 5)
    assert other.returncode == 2 and "output_differs" in other.stderr and "seed 0, not 5" in other.stderr
    assert _parts(folder) == first
    assert maskmill_here("split", folder / "table", "--seed", 5, "--overwrite").returncode == 0
    assert _parts(folder) != first


def test_a_grown_table_keeps_the_parts_of_old_images(maskmill_here: Run, tmp_path: Path) -> None:
    toy_table(tmp_path / "table", 41, size=64, images=tmp_path / "images")
    assert (
        maskmill_here("split", tmp_path / "table", "--train", 0.5, "--val", 0.25, "--test", 0.25).returncode
        == 0
    )
    before = _parts(tmp_path)
    more = [f"{tmp_path}/more/scene_{number:03d}.png" for number in range(20)]
    (tmp_path / "more").mkdir()
    add_rows(open_storage(tmp_path / "table"), more, size=64, write_images=True, seed=9)
    # A near-duplicate of an old image: it must follow it.
    old = f"{tmp_path}/images/scene_007.png"
    Image.open(old).resize((48, 48)).save(more[0])
    done = maskmill_here("split", tmp_path / "table", "--train", 0.5, "--val", 0.25, "--test", 0.25)
    assert done.returncode == 0 and "19 images are new" in done.stdout, done.stdout
    after = _parts(tmp_path)
    assert {uri: after[uri] for uri in before} == before
    assert after[more[0]] == before[old]
    assert len(after) == len(before) + 19


def test_an_image_that_links_two_parts_is_in_none(maskmill_here: Run, tmp_path: Path) -> None:
    toy_table(tmp_path / "table", 31, size=48, images=tmp_path / "images")
    column = tmp_path / "groups.csv"
    lines = [f"scene_{number:03d}.png,{number}" for number in range(30)]
    column.write_text("\n".join(["name,video", *lines]) + "\n")
    options = ("--near", "none", "--by", "video", "--groups", column)
    assert maskmill_here("split", tmp_path / "table", *options).returncode == 0
    before = _parts(tmp_path)
    one = next(uri for uri, part in before.items() if part == "train")
    other = next(uri for uri, part in before.items() if part == "test")
    new = f"{tmp_path}/images/new_000.png"
    add_rows(open_storage(tmp_path / "table"), [new, f"{tmp_path}/images/new_001.png"], size=48)
    # The file now says that the two old images and the new one are of one video.
    linked = {Path(uri).name for uri in (one, other, new)}
    entries = [line.split(",") for line in (*lines, "new_000.png,31")]
    said = [f"{name},{'same' if name in linked else value}" for name, value in entries]
    column.write_text("\n".join(["name,video", *said]))
    done = maskmill_here("split", tmp_path / "table", *options)
    assert done.returncode == 0 and "1 images are in no part" in done.stdout, done.stdout + done.stderr
    after = _parts(tmp_path)
    assert after.pop(new) is None and after == before


def test_images_of_a_folder_stay_together(maskmill_here: Run, folder: Path) -> None:
    done = maskmill_here("split", folder / "table", "--by", "folder", "--near", "none")
    assert done.returncode == 2 and "setting_invalid" in done.stderr  # two folders cannot fill three parts
    done = maskmill_here(
        "split",
        folder / "table",
        "--by",
        "folder",
        "--near",
        "none",
        "--train",
        0.8,
        "--val",
        0.2,
        "--test",
        0,
    )
    assert done.returncode == 0, done.stderr
    by_folder = {(Path(uri).parent.name, part) for uri, part in _parts(folder).items()}
    assert by_folder == {("images", "train"), ("copies", "val")}


def test_images_that_cannot_be_read_are_counted(maskmill_here: Run, tmp_path: Path) -> None:
    toy_table(tmp_path / "table", 25, size=48, images=tmp_path / "images")
    (tmp_path / "images" / "scene_003.png").unlink()
    (tmp_path / "images" / "scene_004.png").write_bytes(b"no image")
    done = maskmill_here("split", tmp_path / "table")
    assert done.returncode == 0 and "2 images could not be read" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--train", "0.8", "--val", "0.1", "--test", "0.2"), "do not sum to 1"),
        (("--train", "1.2", "--val", "-0.2", "--test", "0"), "do not sum to 1"),
        (("--distance", "40"), "--distance 40"),
        (("--near", "clip", "--similarity", "0.2"), "--similarity 0.2"),
        (("--by", "patient"), "--by patient needs the file"),
        (("--by", "folder", "--groups", "x.csv"), "do not fit"),
        (("--by", "patient", "--groups", "nowhere.csv"), "nowhere.csv"),
        (("--seed", "-1"), "--seed -1"),
        (("--workers", "-1"), "--workers -1"),
    ],
)
def test_wrong_use(maskmill_here: Run, folder: Path, arguments: tuple[str, ...], said: str) -> None:
    done = maskmill_here("split", folder / "table", *arguments)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not (folder / "table" / SPLIT_FILE).exists()


def test_a_damaged_split_is_told(maskmill_here: Run, folder: Path) -> None:
    assert maskmill_here("split", folder / "table").returncode == 0
    place = folder / "table" / SPLIT_FILE
    whole = place.read_bytes()
    for data in (b"", b"PAR1", whole[:-100], (folder / "table" / "labels").glob("*").__next__().read_bytes()):
        place.write_bytes(data)
        done = maskmill_here("split", folder / "table")
        assert done.returncode == 1 and "file_damaged" in done.stderr, done.stderr
        assert place.read_bytes() == data


def test_a_split_of_a_newer_version_is_refused_in_words(maskmill_here: Run, folder: Path) -> None:
    assert maskmill_here("split", folder / "table").returncode == 0
    place = folder / "table" / SPLIT_FILE
    rows = pq.read_table(place)
    ((key, said),) = rows.schema.metadata.items()
    newer = json.loads(said) | {"schema_version": 3, "near": "smell"}
    pq.write_table(rows.replace_schema_metadata({key: json.dumps(newer)}), place)
    done = maskmill_here("split", folder / "table")
    assert done.returncode == 2 and "newer_version" in done.stderr, done.stderr


def test_training_takes_the_training_images(maskmill_here: Run, folder: Path) -> None:
    table = str(folder / "table")
    ontology = load_ontology("toyworld")

    def ids(part: str | None) -> set[int]:
        chosen = choose(table, part, default="train")
        samples = open_table_samples(table, ontology=ontology, augment=AugmentSettings(), chosen=chosen)
        return set(samples.ids.tolist())

    everything = ids(None)
    assert len(everything) == 120  # not split yet
    assert maskmill_here("split", table).returncode == 0
    split = find_split(table)
    assert split is not None
    for part in ("train", "val", "test"):
        assert ids(part) == {number for number in split.ids.tolist() if split.part_of(number) == part}
    assert ids(None) == ids("train") and ids("all") == everything
    with pytest.raises(MaskMillError, match="--part trian"):
        choose(table, "trian")


@pytest.mark.slow
def test_an_export_has_the_splits_of_the_table(maskmill_here: Run, tmp_path: Path) -> None:
    table = tmp_path / "table"
    toy_table(table, 41, size=48, images=tmp_path / "images")
    done = maskmill_here("export", table, "--format", "voc", "--output", tmp_path / "before")
    assert done.returncode == 0, done.stderr
    assert maskmill_here("split", table).returncode == 0
    again = maskmill_here("export", table, "--format", "voc", "--output", tmp_path / "before")
    assert again.returncode == 2 and "its split is none" in again.stderr
    done = maskmill_here("export", table, "--format", "voc", "--output", tmp_path / "voc")
    assert done.returncode == 0, done.stderr
    lists = tmp_path / "voc" / "ImageSets" / "Segmentation"
    split = find_split(str(table))
    assert split is not None
    for part in ("train", "val", "test"):
        assert len((lists / f"{part}.txt").read_text().split()) == split.record.images[part]
    own = maskmill_here(
        "export", table, "--format", "voc", "--output", tmp_path / "own", "--val-share", "0.5"
    )
    assert own.returncode == 0 and not (tmp_path / "own/ImageSets/Segmentation/test.txt").exists()


def test_an_evaluation_of_a_part_measures_its_images(maskmill_here: Run, tmp_path: Path) -> None:
    toy_table(tmp_path / "table", 31, size=48, images=tmp_path / "images")
    (tmp_path / "truth").mkdir()
    for number in range(30):
        truth = np.full((48, 48), number % 3, np.uint8)
        Image.fromarray(truth).save(tmp_path / "truth" / f"scene_{number:03d}.png")
    (tmp_path / "images" / "scene_030.png").unlink()
    record = read_table_record(str(tmp_path / "table"))
    named = record.model_copy(update={"recipe": RECIPES["toy"].to_dict()})
    write_table_record(open_storage(tmp_path / "table"), named)
    folders = {"--labels": "table", "--images": "images", "--truth": "truth"}
    command = ("evaluate", *(word for name, place in folders.items() for word in (name, tmp_path / place)))
    unsplit = maskmill_here(*command, "--part", "test", "--output", tmp_path / "none")
    assert unsplit.returncode == 2 and "input_missing" in unsplit.stderr
    assert maskmill_here("split", tmp_path / "table").returncode == 0
    done = maskmill_here(*command, "--part", "test", "--output", tmp_path / "result")
    assert done.returncode == 0, done.stderr
    split = find_split(str(tmp_path / "table"))
    assert split is not None
    ids = {f"scene_{n:03d}": stable_id(f"{tmp_path}/images/scene_{n:03d}.png") for n in range(30)}
    expected = {name for name, number in ids.items() if split.part_of(number) == "test"}
    measured = pq.read_table(tmp_path / "result" / IMAGES_FILE)["name"].to_pylist()
    assert set(measured) == expected and len(measured) == len(expected)
