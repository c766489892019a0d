"""Every published layout in miniature: what is read, and what is said when something is wrong."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from models.errors import MaskMillError
from pipeline.datasets.base import Sample
from pipeline.datasets.cityscapes import LABEL_IDS
from pipeline.datasets.cocostuff import RAW_IDS
from pipeline.datasets.registry import DATASETS, open_dataset
from pipeline.files.storage import Storage
from pipeline.ontology.reading import load_ontology
from tests.pipeline.datasets.conftest import Write, photo, png

JPG = photo(2, 3)


def grid(*ids: int) -> np.ndarray:
    return np.array(ids, np.uint8).reshape(2, 3)


def test_only_formats_of_ones_own_need_an_ontology() -> None:
    own = {name for name, info in DATASETS.items() if info.needs_ontology}
    assert own == {"pairs", "coco-json"}
    assert own == {name for name, info in DATASETS.items() if info.description.startswith("Your own")}


class Layout(NamedTuple):
    dataset: str
    files: dict[str, Any]
    sample: str
    truth: np.ndarray
    identity: str
    options: Mapping[str, Any] = MappingProxyType({})


VOC = {
    "JPEGImages/2007_a.jpg": JPG,
    "JPEGImages/2007_b.jpg": JPG,  # an image without mask is in no list
    "SegmentationClass/2007_a.png": png(grid(0, 1, 20, 255, 5, 0), palette=True),
    "ImageSets/Segmentation/val.txt": "2007_a\n",
}
VOC_AUG = {
    "VOCdevkit/VOC2012/JPEGImages/a.jpg": JPG,
    "VOCdevkit/VOC2012/JPEGImages/b.jpg": JPG,
    "VOCdevkit/VOC2012/SegmentationClass/a.png": grid(1, 1, 1, 1, 1, 1),
    "VOCdevkit/VOC2012/SegmentationClassAug/a.png": grid(2, 2, 2, 2, 2, 2),
    "VOCdevkit/VOC2012/SegmentationClassAug/b.png": grid(3, 3, 3, 3, 3, 3),
    "VOCdevkit/VOC2012/ImageSets/train_aug.txt": "b\na\n",
}
CONTEXT = {
    "VOC2010/JPEGImages/2008_a.jpg": JPG,
    "VOC2010/SegmentationClassContext/2008_a.png": grid(0, 1, 59, 20, 7, 7),
    "VOC2010/ImageSets/SegmentationContext/val.txt": "2008_a",
}
STUFF_RAW = {
    "images/val2017/1.jpg": JPG,
    # person, the last thing, the first and the last stuff class, something after a gap, unlabelled
    "annotations/val2017/1.png": grid(0, 89, 91, 181, 12, 255),
}
STUFF = STUFF_RAW | {"annotations/val2017/1_labelTrainIds.png": grid(0, 79, 80, 170, 11, 255)}
MAPS = {"val2017/1.jpg": JPG, "stuffthingmaps/val2017/1.png": STUFF_RAW["annotations/val2017/1.png"]}
CITY = {
    "leftImg8bit/val/ulm/ulm_000_leftImg8bit.png": photo(2, 3, "PNG"),
    "gtFine/val/ulm/ulm_000_gtFine_labelIds.png": grid(7, 33, 0, 255, 4, 19),
    "gtFine/val/ulm/ulm_000_gtFine_instanceIds.png": grid(1, 1, 1, 1, 1, 1),
}
CITY_TRAIN = CITY | {"gtFine/val/ulm/ulm_000_gtFine_labelTrainIds.png": grid(0, 18, 255, 255, 1, 2)}
ADE = {
    "ADEChallengeData2016/images/validation/ADE_val_1.jpg": JPG,
    "ADEChallengeData2016/annotations/validation/ADE_val_1.png": grid(0, 1, 150, 2, 0, 4),
}
PAIRS = {
    "images/zoo/zebra.jpg": JPG,
    "images/cat.v2.png": photo(2, 3, "PNG"),
    "images/.thumbs/cat.png": b"no image",
    "masks/zoo/zebra.png": grid(0, 1, 2, 255, 0, 0),
    "masks/cat.v2.png": grid(2, 2, 2, 2, 2, 2),
    "masks/no-image.png": grid(0, 0, 0, 0, 0, 0),
}
FLAT = {name.replace("masks/zoo/", "masks/"): content for name, content in PAIRS.items()}

LAYOUTS = [
    Layout("voc21", VOC, "2007_a", grid(0, 1, 20, 255, 5, 0), "SegmentationClass"),
    Layout("voc20", VOC, "2007_a", grid(255, 0, 19, 255, 4, 255), "SegmentationClass"),
    Layout("voc21", VOC_AUG, "b", grid(*[3] * 6), "SegmentationClassAug", {"split": "train_aug"}),
    Layout("context60", CONTEXT, "2008_a", grid(0, 1, 59, 20, 7, 7), "SegmentationClassContext"),
    Layout("context59", CONTEXT, "2008_a", grid(255, 0, 58, 19, 6, 6), "SegmentationClassContext"),
    Layout("cocostuff171", STUFF, "1", grid(0, 79, 80, 170, 11, 255), "labelTrainIds"),
    Layout("cocostuff171", STUFF_RAW, "1", grid(0, 79, 80, 170, 11, 255), "stuffthingmaps"),
    Layout("cocostuff171", MAPS, "1", grid(0, 79, 80, 170, 11, 255), "stuffthingmaps"),
    Layout("cocoobject81", STUFF, "1", grid(1, 80, 0, 0, 12, 0), "stuffthingmaps"),
    Layout(
        "cocoobject81",
        STUFF | {"annotations/val2017/1_instanceTrainIds.png": grid(1, 80, 0, 0, 12, 0)},
        "1",
        grid(1, 80, 0, 0, 12, 0),
        "instanceTrainIds",
    ),
    Layout("cityscapes19", CITY, "ulm/ulm_000_leftImg8bit", grid(0, 18, 255, 255, 255, 6), "labelIds"),
    Layout(
        "cityscapes19", CITY_TRAIN, "ulm/ulm_000_leftImg8bit", grid(0, 18, 255, 255, 1, 2), "labelTrainIds"
    ),
    Layout("ade150", ADE, "ADE_val_1", grid(255, 0, 149, 1, 255, 3), "annotations"),
    Layout("pairs", PAIRS, "zoo/zebra", grid(0, 1, 2, 255, 0, 0), "", {"ontology": "abc.yaml"}),
    Layout("pairs", FLAT, "zoo/zebra", grid(0, 1, 2, 255, 0, 0), "", {"ontology": "abc.yaml"}),
]
IDS = [f"{number}-{layout.dataset}-{layout.identity}" for number, layout in enumerate(LAYOUTS)]


@pytest.fixture
def abc(tmp_path: Path) -> str:
    path = tmp_path / "abc.yaml"
    path.write_text("classes: [ant, bee, cat]\n")
    return str(path)


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_layout(layout: Layout, tmp_path: Path, write: Write, abc: str) -> None:
    root = str(tmp_path / "root")
    write(root, layout.files)
    options = {**layout.options, **({"ontology": abc} if "ontology" in layout.options else {})}
    dataset = open_dataset(layout.dataset, root=root, **options)
    names = [sample.name for sample in dataset.samples]
    assert names == sorted(names)
    sample = dataset.samples[names.index(layout.sample)]
    # Workers get the dataset by pickle, and without samples if they like.
    for reader in (dataset, pickle.loads(pickle.dumps(dataset)), dataset.reader()):
        truth = reader.truth(sample)
        assert truth.dtype == np.uint8
        np.testing.assert_array_equal(truth, layout.truth)
    image, truth = dataset.image_and_truth(sample)
    assert image.shape == (2, 3, 3) and np.abs(image.astype(int) - (200, 30, 60)).max() < 8
    assert truth[truth != dataset.ignore_index].max() < len(dataset.class_names)
    assert layout.identity in dataset.identity
    if dataset.ontology is not None:
        assert dataset.class_names == load_ontology(dataset.ontology).names


def test_the_built_in_ontology_is_named_only_if_it_is_meant(tmp_path: Path, write: Write) -> None:
    write(str(tmp_path), PAIRS)
    mine = tmp_path / "voc20.yaml"
    mine.write_text("classes: [ant, bee, cat]\n")
    assert open_dataset("pairs", root=str(tmp_path), ontology=str(mine)).ontology is None
    assert open_dataset("pairs", root=str(tmp_path), ontology="voc20").ontology == "voc20"


def test_raw_coco_ids_agree_with_the_category_list() -> None:
    # 171 classes in 182 numbers, in order; the numbers that COCO never used are not there.
    assert list(RAW_IDS.values()) == list(range(171))
    assert sorted(RAW_IDS) == list(RAW_IDS)
    assert set(range(182)) - set(RAW_IDS) == {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
    assert len(LABEL_IDS) == len(load_ontology("cityscapes19").names)


def test_s3_lists_folders_instead_of_asking_for_files(
    bucket: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"img_{number:03d}" for number in range(12)]
    files: dict[str, Any] = {f"voc/JPEGImages/{name}.jpg": JPG for name in names}
    files |= {f"voc/SegmentationClass/{name}.png": VOC["SegmentationClass/2007_a.png"] for name in names}
    write(bucket, files | {"voc/ImageSets/Segmentation/val.txt": "\n".join(names)})

    asked: list[str] = []
    exists = Storage.exists
    monkeypatch.setattr(Storage, "exists", lambda self, name="": asked.append(name) or exists(self, name))
    dataset = open_dataset("voc20", root=f"{bucket}/voc")
    assert asked == ["JPEGImages"]
    assert [sample.name for sample in dataset.samples] == names
    assert dataset.samples[0].image == f"{bucket}/voc/JPEGImages/img_000.jpg"
    image, truth = dataset.image_and_truth(dataset.samples[3])
    assert image.shape == (2, 3, 3)
    np.testing.assert_array_equal(truth, grid(255, 0, 19, 255, 4, 255))


def without(files: dict[str, Any], *patterns: str) -> dict[str, Any]:
    return {name: data for name, data in files.items() if not any(re.search(p, name) for p in patterns)}


@pytest.mark.parametrize(
    ("dataset", "files", "code", "says"),
    [
        (
            "voc21",
            {},
            "dataset_missing",
            r"no JPEGImages(.|\n)*host\.robots\.ox\.ac\.uk(.|\n)*VOCdevkit/VOC2012/",
        ),
        ("voc21", without(VOC, "ImageSets"), "dataset_missing", "no list ImageSets/Segmentation/val.txt"),
        (
            "voc21",
            without(VOC, "ImageSets") | {"ImageSets/train.txt": "x", "ImageSets/aug.txt": "x"},
            "dataset_missing",
            r"no list ImageSets/val\.txt \(there are: aug, train\)",
        ),
        ("voc21", VOC | {"ImageSets/Segmentation/val.txt": "\n"}, "dataset_missing", "no images"),
        ("voc21", without(VOC, "SegmentationClass"), "dataset_missing", "no masks"),
        (
            "voc21",
            VOC | {"ImageSets/Segmentation/val.txt": "2007_a\n2007_b\n2007_c"},
            "dataset_missing",
            r"1 of 3 images are missing \(2007_c\); 2 of 3 masks are missing \(2007_b, 2007_c\)",
        ),
        ("context59", VOC, "dataset_missing", "ImageSets/SegmentationContext/val.txt"),
        ("cocostuff171", without(STUFF, "annotations"), "dataset_missing", "no label maps of val2017"),
        ("cocostuff171", without(STUFF, "images"), "dataset_missing", "no images in images/val2017"),
        (
            "cocostuff171",
            STUFF_RAW | {"images/val2017/2.jpg": JPG, "annotations/val2017/3.png": JPG},
            "dataset_missing",
            r"1 of 3 images are missing \(3\); 1 of 3 masks are missing \(2\)",
        ),
        ("cocoobject81", without(STUFF, "annotations"), "dataset_missing", "instances_val2017.json"),
        ("cityscapes19", without(CITY, "labelIds"), "dataset_missing", "no label maps in gtFine/val"),
        ("cityscapes19", without(CITY, "leftImg"), "dataset_missing", "no images in leftImg8bit/val"),
        ("ade150", without(ADE, "images"), "dataset_missing", "no images in images/validation"),
        ("phrasecut", {}, "dataset_missing", "no images(.|\n)*ChenyunWu/PhraseCutDataset"),
        ("pairs", {}, "dataset_missing", "there are no images"),
        ("pairs", without(PAIRS, "masks/cat"), "dataset_missing", r"cat\.v2 \(mask\)"),
        (
            "pairs",
            FLAT | {"images/meadow/zebra.jpg": JPG},
            "dataset_invalid",
            "Image meadow/zebra could belong to several",
        ),
        ("pairs", PAIRS | {"images/cat.v2.jpg": JPG}, "dataset_invalid", "have the same name"),
    ],
)
def test_wrong_layouts_say_what_to_do(
    dataset: str, files: dict[str, Any], code: str, says: str, tmp_path: Path, write: Write, abc: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    write(str(root), files)
    options = {"ontology": abc} if dataset == "pairs" else {}
    with pytest.raises(MaskMillError) as caught:
        open_dataset(dataset, root=str(root), **options)
    assert caught.value.code == code
    assert re.search(says, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("mask", "code", "says"),
    [
        (png(grid(0, 21, 99, 21, 0, 0)), "mask_invalid", r"2007_a\.png holds .* 21, 99\.\n.*0-20, 255"),
        (photo(2, 3, "PNG"), "mask_invalid", r"2007_a\.png is a picture of mode RGB"),
        (b"\x89PNG, but not really", "dataset_invalid", r"2007_a\.png cannot be read"),
        (png(np.zeros((3, 2), np.uint8)), "mask_invalid", r"_a\.png: the mask has 3 x 2 .*_a\.jpg 2 x 3"),
    ],
)  # fmt: skip
def test_bad_masks_are_named(mask: bytes, code: str, says: str, tmp_path: Path, write: Write) -> None:
    write(str(tmp_path), VOC | {"SegmentationClass/2007_a.png": mask})
    dataset = open_dataset("voc21", root=str(tmp_path))
    with pytest.raises(MaskMillError) as caught:
        dataset.image_and_truth(dataset.samples[0])
    assert caught.value.code == code
    assert re.search(says, str(caught.value)), str(caught.value)


def test_a_damaged_image_is_named(tmp_path: Path, write: Write) -> None:
    write(str(tmp_path), VOC | {"JPEGImages/2007_a.jpg": b"no image"})
    dataset = open_dataset("voc21", root=str(tmp_path))
    with pytest.raises(MaskMillError, match=r"2007_a\.jpg cannot be read") as caught:
        dataset.image(dataset.samples[0])
    assert caught.value.code == "dataset_invalid"


def _grey(depth: int) -> Callable[[Path], np.ndarray]:
    """A grey PNG of few bits, which Pillow reads stretched, made by hand."""
    import struct
    import zlib

    ids = np.array([[0, 1, 1], [1, 0, (1 << depth) - 1]], np.uint8)

    def write(path: Path) -> np.ndarray:
        rows = b""
        for row in ids:
            bits = "".join(f"{value:0{depth}b}" for value in row).ljust(16, "0")
            rows += b"\0" + int(bits, 2).to_bytes(2, "big")[: -(-3 * depth // 8)]
        chunks = [
            (b"IHDR", struct.pack(">IIBBBBB", 3, 2, depth, 0, 0, 0, 0)),
            (b"IDAT", zlib.compress(rows)),
            (b"IEND", b""),
        ]
        data = b"\x89PNG\r\n\x1a\n"
        for kind, body in chunks:
            data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        path.write_bytes(data)
        return ids

    return write


def _palette(bits: int) -> Callable[[Path], np.ndarray]:
    ids = np.array([[0, 1], [1, 0]], np.uint8)

    def write(path: Path) -> np.ndarray:
        picture = Image.fromarray(ids)
        picture.putpalette([255, 0, 0, 0, 255, 0])
        picture.save(path, bits=bits)
        return ids

    return write


def _deep(path: Path) -> np.ndarray:
    ids = np.array([[0, 300], [65_534, 65_535]], np.uint16)
    Image.fromarray(ids).save(path)
    return ids


@pytest.mark.parametrize("make", [_grey(1), _grey(2), _grey(4), _palette(1), _palette(8), _deep])
def test_masks_of_every_depth_are_read_exactly(make: Callable[[Path], np.ndarray], tmp_path: Path) -> None:
    from pipeline.formats.masks import read_mask

    ids = make(tmp_path / "mask.png")
    read = read_mask(str(tmp_path / "mask.png"))
    assert read.dtype == ids.dtype
    np.testing.assert_array_equal(read, ids)


def test_many_classes_need_sixteen_bits(tmp_path: Path, write: Write) -> None:
    ontology = tmp_path / "many.yaml"
    ontology.write_text("classes: [" + ", ".join(f"c{number}" for number in range(300)) + "]\n")
    mask = np.array([[0, 299, 65_535], [255, 256, 1]], np.uint16)
    write(str(tmp_path), {"images/a.jpg": JPG, "masks/a.png": mask})
    dataset = open_dataset("pairs", root=str(tmp_path), ontology=str(ontology))
    truth = dataset.truth(dataset.samples[0])
    assert truth.dtype == np.uint16 and dataset.ignore_index == 65_535
    np.testing.assert_array_equal(truth, mask)


def test_pairs_from_two_folders_and_a_list(tmp_path: Path, write: Write, abc: str) -> None:
    write(str(tmp_path), PAIRS | {"lists/few.txt": "zoo/zebra\n"})
    dataset = open_dataset(
        "pairs", ontology=abc, split=str(tmp_path / "lists" / "few.txt"),
        images=str(tmp_path / "images"), masks=str(tmp_path / "masks"),
    )  # fmt: skip
    assert [sample.name for sample in dataset.samples] == ["zoo/zebra"]
    assert dataset.split == "few"


def test_a_list_that_is_not_there(tmp_path: Path, write: Write, abc: str) -> None:
    write(str(tmp_path), PAIRS)
    with pytest.raises(MaskMillError, match=r"there is no list few\.txt in /") as caught:
        open_dataset("pairs", root=str(tmp_path), ontology=abc, split=str(tmp_path / "few.txt"))
    assert caught.value.code == "dataset_missing"


def test_fingerprint_is_of_the_content_not_of_the_place(tmp_path: Path, write: Write) -> None:
    seen = {}
    for place in ("here", "there"):
        write(str(tmp_path / place), VOC)
        seen[place] = open_dataset("voc21", root=str(tmp_path / place)).fingerprint()
    assert seen["here"] == seen["there"]
    write(str(tmp_path / "more"), VOC | {
        "SegmentationClass/2007_b.png": grid(*[0] * 6),
        "ImageSets/Segmentation/val.txt": "2007_a\n2007_b",
    })  # fmt: skip
    others = [
        open_dataset("voc20", root=str(tmp_path / "here")).fingerprint(),
        open_dataset("voc21", root=str(tmp_path / "more")).fingerprint(),
    ]
    assert len({seen["here"], *others}) == 3
    reader = open_dataset("voc21", root=str(tmp_path / "here")).reader()
    assert reader.samples == () and isinstance(reader.truth(Sample(
        "x", "", str(tmp_path / "here" / "SegmentationClass" / "2007_a.png")
    )), np.ndarray)  # fmt: skip


def test_registry() -> None:
    for name, info in DATASETS.items():
        assert info.description and "\n" not in info.description
        assert info.default_split in info.official or not info.official
        if name in ("toyworld",):
            continue
        with pytest.raises(MaskMillError) as caught:
            open_dataset(name, **({"ontology": "voc20"} if name in ("pairs", "coco-json") else {}))
        assert caught.value.code == "dataset_missing"
        assert info.source.home in caught.value.remedy and info.source.layout in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "options", "code", "says"),
    [
        ("voc12", {}, "name_unknown", "Did you mean voc"),
        ("voc21", {"size": 3}, "wrong_use", "no option 'size'"),
        ("voc21", {"classes": "voc20"}, "wrong_use", "no option 'classes'"),
        ("pairs", {"root": "."}, "wrong_use", "needs an ontology"),
        ("coco-json", {"root": "."}, "wrong_use", "needs an ontology"),
        ("toyworld", {"split": "val"}, "wrong_use", "seed-2"),
        ("toyworld", {"count": 0}, "wrong_use", "count=0"),
        ("toyworld", {"root": "."}, "wrong_use", "no root"),
    ],
)
def test_wrong_calls(name: str, options: dict[str, Any], code: str, says: str) -> None:
    with pytest.raises(MaskMillError, match=says) as caught:
        open_dataset(name, **options)
    assert caught.value.code == code


def test_real_voc_subset(voc_subset: Path) -> None:
    with_background = open_dataset("voc21", root=str(voc_subset))
    without_background = open_dataset("voc20", root=str(voc_subset))
    assert len(with_background.samples) == len(without_background.samples) == 321
    assert len(open_dataset("voc21", root=str(voc_subset), split="train").samples) == 311
    assert DATASETS["voc21"].official["val"] != 321  # so a report can say that it is a part
    seen: set[int] = set()
    for first, second in list(zip(with_background.samples, without_background.samples, strict=True))[::20]:
        image, truth = with_background.image_and_truth(first)
        raw = np.array(Image.open(first.truth))
        np.testing.assert_array_equal(truth, raw)
        shifted = np.where(raw == 0, 255, raw - 1)
        np.testing.assert_array_equal(without_background.truth(second), np.where(raw == 255, 255, shifted))
        assert image.shape[:2] == raw.shape
        seen |= set(np.unique(raw).tolist())
    assert len(seen) > 8
