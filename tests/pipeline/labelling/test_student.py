from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.errors import MaskMillError
from pipeline.labelling.student import StudentLabeller
from pipeline.ontology.ontology import load_ontology, parse_classes
from pipeline.toyworld.scenes import generate
from pipeline.trained.student import load_student, read_student_record
from tests.pipeline.trained.test_student import toy_student, toy_text

COUNT = load_ontology("toyworld").num_classes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student") / "run"
    toy_student(path)
    return path


def labeller(folder: Path, **changes: Any) -> StudentLabeller:
    settings = {
        "thresholds": [0.0] * COUNT,
        "precision": "fp32",
        "batch_size": 0,
        "ignore_index": 255,
    }
    return StudentLabeller(uri=str(folder), **(settings | changes))


def expected(folder: Path, image: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """(C, H, W) probabilities: the student's own forward pass, resized to the image."""
    model = load_student(read_student_record(folder), device=torch.device("cpu"), dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.from_numpy(image).permute(2, 0, 1)[None])
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)[0].softmax(0)


@pytest.mark.parametrize("size", [(64, 80), (96, 120), (61, 83)])
def test_labels_are_those_of_the_model_resized(folder: Path, size: tuple[int, int]) -> None:
    image = generate(3, 1, 80).images[0][:64]
    p, best = expected(folder, image, size).max(0)
    (prediction,) = labeller(folder).label([image], [size])
    assert prediction.labels.shape == size and prediction.labels.dtype == np.uint8
    assert len(np.unique(prediction.labels)) > 3  # a random student that sees one class proves little
    assert (prediction.labels == best.numpy()).mean() > 0.999
    assert np.abs(prediction.confidence - 255 * p.numpy()).max() < 1


def test_thresholds_are_per_class_and_may_be_changed_without_loading(folder: Path) -> None:
    image = generate(3, 1, 64).images[0]
    plain = labeller(folder)
    (free,) = plain.label([image], [(64, 64)])
    common = int(np.bincount(free.labels.ravel()).argmax())
    limits = [0.0] * COUNT
    limits[common] = float(np.median(free.confidence[free.labels == common])) / 255
    for strict in (plain.with_thresholds(limits), labeller(folder, thresholds=limits, ignore_index=200)):
        (limited,) = strict.label([image], [(64, 64)])
        ignored = limited.labels != free.labels
        assert 0 < ignored.sum() < (free.labels == common).sum()
        assert set(free.labels[ignored]) == {common}
        assert set(limited.labels[ignored]) <= {200, 255}
        assert (free.confidence[ignored] <= 255 * limits[common] + 0.5).all()
        assert (limited.confidence == free.confidence).all()  # confidence is before any threshold
    (again,) = plain.label([image], [(64, 64)])
    assert (again.labels == free.labels).all()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_an_image_does_not_feel_its_batch(folder: Path, batch_size: int) -> None:
    images = list(generate(9, 5, 48).images)
    sizes = [(48 + index, 64) for index in range(5)]
    single = labeller(folder)
    alone = [single.label([image], [size])[0] for image, size in zip(images, sizes, strict=True)]
    own = labeller(folder, batch_size=batch_size)
    assert own.batch_size == batch_size
    for start in range(0, 5, batch_size):
        together = own.label(images[start : start + batch_size], sizes[start : start + batch_size])
        for one, other in zip(together, alone[start : start + batch_size], strict=True):
            assert (one.labels == other.labels).all() and (one.confidence == other.confidence).all()


def test_bf16_agrees_with_fp32(folder: Path) -> None:
    image = generate(4, 1, 64).images[0]
    exact, coarse = (
        labeller(folder, precision=precision).label([image], [(64, 64)])[0] for precision in ("fp32", "bf16")
    )
    assert (exact.labels == coarse.labels).mean() > 0.95
    assert not (exact.confidence == coarse.confidence).all()  # it was computed otherwise


def test_other_class_names_need_no_training(folder: Path) -> None:
    other = parse_classes("zebra, sky, grass", background=None, templates="toyworld")
    text, _ = toy_text(other)
    image = generate(3, 1, 64).images[0]
    (prediction,) = labeller(
        folder,
        embeddings=text.embeddings.numpy(),
        class_ids=text.class_ids.numpy(),
        thresholds=[0.0] * 3,
    ).label([image], [(64, 64)])
    # The same features: the best of three of the student's own classes.
    own = load_ontology("toyworld").names
    among = expected(folder, image, (64, 64))[[own.index(name) for name in other.names]].argmax(0).numpy()
    assert (prediction.labels == among).mean() > 0.999 and len(np.unique(among)) > 1


def test_several_threads_may_label_at_a_time(folder: Path) -> None:
    one = labeller(folder, threads=1)
    images = [generate(3, 1, 16 * side).images[0] for side in range(2, 12)]

    def label(image: np.ndarray) -> tuple[np.ndarray, int]:
        return one.label([image], [image.shape[:2]])[0].labels, torch.get_num_threads()

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(label, images))
        assert {threads for _, threads in together} == {1}
        for image, (labels, _) in zip(images, together, strict=True):
            assert (pool.submit(label, image).result()[0] == labels).all()


def test_a_student_replaced_since_is_refused(folder: Path) -> None:
    labeller(folder, fingerprint=read_student_record(folder).fingerprint)
    with pytest.raises(MaskMillError) as caught:
        labeller(folder, fingerprint="0" * 64)
    assert caught.value.code == "weights_differ"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_on_a_gpu_batches_are_padded(folder: Path, precision: str) -> None:
    images, sizes = list(generate(9, 4, 64).images), [(64, 64)] * 4
    student = labeller(folder, precision=precision, batch_size=4)
    for one, other in zip(
        student.label(images, sizes),
        [student.label([image], [size])[0] for image, size in zip(images, sizes, strict=True)],
        strict=True,
    ):
        assert (one.labels == other.labels).all() and (one.confidence == other.confidence).all()
