from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from jobs.benchmark import Benchmark
from models.errors import MaskMillError
from pipeline.evaluation.results import read_results
from pipeline.ontology.concepts import CONCEPTS
from pipeline.toyworld.scenes import CLASSES, generate


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index, image in enumerate(generate(5, 2, 96).images):
        Image.fromarray(image).save(folder / f"scene{index}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n")
    return folder


def test_every_image_gets_a_picture_and_what_cannot_be_read_is_said(images: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    job = Benchmark(
        name="concepts",
        images=str(images),
        concepts=", ".join(CLASSES),
        recipe="toy",
        output=str(tmp_path / "out"),
        tracking="off",
    )
    assert job.run(console) == 0
    ((_, result),) = read_results(str(tmp_path / "out"))
    assert [picture.caption for picture in result.pictures] == ["scene0.png", "scene1.png"]
    shares = [line.values["share_of_pixels"].mean for line in result.sections[0].rows]
    assert sum(shares) == pytest.approx(1)
    best = CLASSES[int(np.argmax(shares))]
    truth = np.bincount(generate(5, 2, 96).labels.ravel(), minlength=14)
    assert truth[CLASSES.index(best)] == truth.max()  # the largest texture of two scenes is found
    assert "left out" in console.export_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"concepts": "batman"}, "needs images"),
        ({"images": "x", "concepts": "one"}, "nor two or more prompts"),
    ],
)
def test_wrong_use_says_what_to_do(options: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(MaskMillError, match=words):
        Benchmark(name="concepts", output=str(tmp_path / "o"), **options).run(Console(quiet=True))


def test_the_paper_s_lists_have_no_name_twice() -> None:
    for name, entry in CONCEPTS.items():
        words = [*entry.concepts, *entry.context]
        assert len(set(words)) == len(words), name
    # The paper's counts: 7, 7, 7, 7, 26, 20, 17, 23 and 24 names.
    counts = [len(entry.concepts) + len(entry.context) for entry in CONCEPTS.values()]
    assert counts == [7, 7, 7, 7, 26, 20, 17, 23, 24]
