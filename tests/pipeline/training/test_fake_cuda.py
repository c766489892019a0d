"""The training loop and both tasks on a fake GPU: loss, optimiser, schedule, figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip.loading import load_clip
from models.clip.text import TextClassifier
from models.clipseg.baselines import ViTSegConfig, build_vitseg
from models.clipseg.decoder import build_clipseg
from models.maskclip import MaskClip
from models.settings import ClipSegConfig, MaskClipSettings, StudentConfig
from models.student.deeplab import DeepLab
from pipeline.training.clipseg.task import ClipSegTask
from pipeline.training.clipseg.triplets import encode_phrase
from pipeline.training.loop.board import BoardLink
from pipeline.training.loop.checkpoints import CheckpointStore
from pipeline.training.loop.protocols import GUESS, IGNORED, Sample, Task
from pipeline.training.loop.resources import TrainingCompute
from pipeline.training.loop.settings import LoopSettings
from pipeline.training.loop.worker import Job, work
from pipeline.training.maskclip_plus.recipes import SelfTrainSettings
from pipeline.training.maskclip_plus.task import MaskClipPlus, guessable_classifier
from tests.fake_cuda import CUDA, FakeGpu, fake_cuda, on_gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")

NAMES = ("grass", "water", "sky", "fish")
SIDE = 32
STEPS = 6


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """A fake GPU for the loop; its states are not written, as they have no values."""
    monkeypatch.setattr(CheckpointStore, "write", lambda *_, **__: None)
    monkeypatch.setattr(CheckpointStore, "prune", lambda *_: None)
    with fake_cuda() as gpu:
        yield gpu


def train(
    make_task: Callable[[], Task],
    sample: Callable[[int], Sample],
    tmp_path: Path,
    monkeypatch: Any,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Run the real loop over samples of this process; returns the lines of figures."""

    def batches(
        _: object, *, start_step: int, stop_step: int, batch_size: int, **__: object
    ) -> Iterator[Any]:
        for step in range(start_step, stop_step):
            rows = [sample(step * batch_size + row) for row in range(batch_size)]
            batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
            yield batch | {"failed": torch.zeros(batch_size, dtype=torch.bool)}

    monkeypatch.setattr("pipeline.training.loop.worker.batches", batches)
    board = BoardLink.start(in_process=True)
    loop = LoopSettings(**{"iterations": STEPS, "batch_size": 4, "log_every": 1, "warmup": 2} | settings)
    compute = TrainingCompute(workers=0, gpu=True, worker_cpus=1.0, threads=0, loaders=1)
    job = Job(make_task, None, loop, str(tmp_path), "fingerprint", compute, board)  # type: ignore[arg-type]
    monkeypatch.setattr(CheckpointStore, "sees", lambda *_: True)
    monkeypatch.setattr(CheckpointStore, "newest", lambda *_: None)
    outcome = work(job)
    assert outcome["step"] == STEPS and not outcome["stopped"]
    lines: list[dict[str, Any]] = board.ask("news", 1, 0, 0).lines
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {"loss", "gradient_norm", "learning_rate"} <= set(lines[-1])
    return lines


# --- MaskCLIP+ ----------------------------------------------------------------------------------------------


def text(classes: int, width: int = 12) -> TextClassifier:
    rows = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    return TextClassifier(F.normalize(rows, dim=1), torch.arange(classes), classes)


def student(classes: int = len(NAMES)) -> DeepLab:
    config = StudentConfig(decoder="light", backbone="light", embed_dim=12, width=8, depth=1)
    return DeepLab(config, text(classes))


def teacher(device: torch.device, **settings: Any) -> MaskClip:
    clip = load_clip("toyclip", "bundled", device=device, towers="visual")
    return MaskClip(clip, guessable_classifier(text(4, clip.embed_dim), (1, 3)), MaskClipSettings(**settings))


def labelled(position: int) -> Sample:
    rng = np.random.default_rng(position)
    return {
        "image": rng.integers(0, 256, (3, SIDE, SIDE), np.uint8),
        "labels": rng.choice([0, 2, GUESS, IGNORED], (SIDE, SIDE)).astype(np.int32),
        "teacher": rng.choice([1, 3, IGNORED], (SIDE, SIDE)).astype(np.int32),
        "confidence": rng.integers(0, 256, (SIDE, SIDE), np.uint8),
    }


TWO_PHASES = {"guided": (1, 3), "self_train": (4, -1), "guessable": (1, 3)}
CHECK = "pipeline/training/maskclip_plus/task.py:_check_truth __bool__"
ALARM = "pipeline/training/maskclip_plus/drift.py"


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "sgd"), ("bf16", "adamw"), ("fp16", "sgd")])
def test_maskclip_plus(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, optimizer: str
) -> None:
    def make() -> MaskClipPlus:
        return MaskClipPlus(NAMES, SelfTrainSettings(**TWO_PHASES), student)

    lines = train(make, labelled, tmp_path, monkeypatch, precision=precision, optimizer=optimizer)
    assert {"guessed", "agreement", "drift"} <= set(lines[-1])
    waits = Counter(gpu.waits)
    assert waits[CHECK] == STEPS
    assert waits[f"{ALARM}:set_reference copy"] == 1 and waits[f"{ALARM}:check copy"] == 3
    assert {place for place in waits if place.endswith((":loss", ":_update"))} == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"self_threshold": 0.5, "threshold_rule": "relative", "threshold_overwrites_seen": True},
        {
            "self_threshold": 0.5,
            "threshold_rule": "quantile",
            "confidence_weight": True,
            "loss_over": "valid",
        },
        {"ema_decay": 0.9, "anchor": 0.5, "guided_class_power": 0.5, "freeze_batchnorm": True},
        {"teacher": "online"},
    ],
    ids=str,
)
def test_settings_of_maskclip_plus(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    def make() -> MaskClipPlus:
        return MaskClipPlus(
            NAMES,
            SelfTrainSettings(**TWO_PHASES | settings),
            student,
            make_teacher=lambda device: teacher(device, ks_threshold=1.0, pd_threshold=0.5),
            class_frequencies=(0.4, 0.3, 0.2, 0.1),
        )

    train(make, labelled, tmp_path, monkeypatch, precision="bf16", accumulation=2, clip_norm=1.0)


def test_a_state_of_maskclip_plus_is_restored(gpu: FakeGpu) -> None:
    task = MaskClipPlus(NAMES, SelfTrainSettings(**TWO_PHASES, ema_decay=0.9), student)
    task.build(CUDA)
    state = task.state_dict()
    task.load_state_dict({
        name: {key: tensor.cpu() for key, tensor in value.items()} if name == "averaged" else
        value.cpu() if isinstance(value, Tensor) else value
        for name, value in state.items()
    })  # fmt: skip
    assert on_gpu(task.state_dict()["guessed"])


# --- CLIPSeg ------------------------------------------------------------------------------------------------


def triplet(position: int) -> Sample:
    rng = np.random.default_rng(position)
    return {
        "image": rng.integers(0, 256, (3, SIDE, SIDE), np.uint8),
        "mask": rng.choice(np.array([0, 1, 255], np.uint8), (SIDE, SIDE)),
        "weight": rng.random((SIDE, SIDE), np.float32),
        "phrase": encode_phrase(("grass", "a red ladybug", "x " * 120)[position % 3]),
        "support": rng.integers(0, 256, (3, 24, 24), np.uint8),
        "text_weight": np.array((1.0, 0.0, 0.3)[position % 3], np.float32),
        "negative": np.array(0.0, np.float32),
    }


class Triplets:
    def order(self, epoch: int, seed: int) -> np.ndarray:
        return np.arange(8)

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        return triplet(index)

    def blank(self) -> Sample:
        return triplet(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "precision"),
    [("clipseg", "fp32"), ("clipseg", "fp16"), ("whitened", "bf16"), ("vitseg", "fp16")],
)
def test_clipseg(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, precision: str
) -> None:
    def model(device: torch.device) -> Any:
        clip = load_clip("toyclip", "bundled", device=device)
        if kind == "vitseg":
            config = ViTSegConfig(reduce_dim=8, feedforward=16, extract_layers=(1, 3), tower="test_vit")
            return build_vitseg(clip, config, weights="random:0")
        return build_clipseg(clip, ClipSegConfig(reduce_dim=8, feedforward=16, extract_layers=(0, 2)))

    def make() -> ClipSegTask:
        return ClipSegTask(model, ahead=Triplets(), whiten=8 if kind == "whitened" else 0)

    lines = train(make, triplet, tmp_path, monkeypatch, precision=precision, optimizer="adamw")
    assert {"iou", "found", "there", "unread"} <= set(lines[-1])
    hot = Counter(place for place in gpu.waits if "clipseg/task.py" in place)
    # Which neighbours are equal images; what else is noted happens once, for new phrases and at the start.
    assert hot["pipeline/training/clipseg/task.py:_decode selection by mask"] >= STEPS
