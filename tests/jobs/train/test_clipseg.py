"""``maskmill train clipseg`` on toy scenes, from the lease to the folder, through real Ray Train."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import ray
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from jobs.train.clipseg import commands_for, prepare, train_clipseg
from jobs.train.run import INTERRUPTED, TrainOptions
from models.clipseg.decoder import ClipSeg, normalize
from models.clipseg.weights import load_clipseg
from models.errors import MaskMillError
from pipeline.datasets.toy import open_toyworld
from pipeline.files.storage import open_storage
from pipeline.report.clipseg_page import clipseg_sheet, find_answers
from pipeline.trained.clipseg import DECODER_FILE, RECORD_FILE, load_trained, read_clipseg_record
from pipeline.training.clipseg.recipes import CLIPSEG_RECIPES
from pipeline.training.clipseg.sources.base import IGNORED, Example, TripletSource
from pipeline.training.clipseg.sources.toy import open_toy_source
from pipeline.training.clipseg.task import build_model
from pipeline.training.clipseg.triplets import TripletSamples
from pipeline.training.loop.checkpoints import CheckpointStore

STEPS = 12
QUICK = (
    f"iterations={STEPS}", "batch_size=4", "warmup=1", "checkpoint_every=3", "log_every=2", "size=64",
    "support_size=64", "reduce_dim=16", "refined=false", "feedforward=32", "dropout=0.1", "grouped=false",
)  # fmt: skip


def _train(
    output: Path, *settings: str, workers: int = 0, ray_address: str = "", **options: Any
) -> tuple[int, str]:
    """Exit status and printed text."""
    if ray.is_initialized():
        ray.shutdown()
    said = Console(file=io.StringIO(), width=200)
    recipe = CLIPSEG_RECIPES.load("toy", (*QUICK, *settings))
    dataset = open_toyworld(split="seed-7", count=12, size=64)
    where = TrainOptions(output=str(output), workers=workers, **{"tracking": "off"} | options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", ray_address)
        status = train_clipseg(recipe, where, dataset=dataset, console=said)
    assert isinstance(said.file, io.StringIO)
    return status, said.file.getvalue()


def _lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clipseg") / "run"
    status, said = _train(folder)
    assert status == 0 and f"Trained {STEPS} steps" in said and "(a toy)" in said
    return folder


@pytest.mark.cluster
@pytest.mark.slow
def test_a_run_leaves_a_model_that_loads(trained: Path) -> None:
    record = json.loads((trained / RECORD_FILE).read_text())
    assert record["kind"] == record["model"] == "clipseg" and record["clip"]["model"] == "toyclip"
    assert record["config"]["reduce_dim"] == 16 and record["recipe"]["triplets"]["size"] == 64
    assert record["data"]["source"] == "toyworld seed-7" and record["data"]["images"] == 12
    assert record["training"]["iterations"] == STEPS and record["versions"]["torch"]
    lines = _lines(trained)
    assert [line["step"] for line in lines] == list(range(2, STEPS + 1, 2))
    assert 0 <= record["metrics"]["iou"] <= 1
    # Whether the loss falls within twelve steps is chance.
    assert all(math.isfinite(line["loss"]) and line["gradient_norm"] > 0 for line in lines)
    with Image.open(trained / "preview.png") as sheet:
        assert sheet.width > 900 and np.asarray(sheet).std() > 20
    pixels = normalize(torch.from_numpy(open_toyworld(size=64).scene(open_toyworld().samples[0]).image.copy())
                       .permute(2, 0, 1)[None])  # fmt: skip
    folder, file = load_clipseg(trained), load_trained(trained)
    state = load_file(trained / DECODER_FILE)
    assert file.decoder.film_mul.weight.equal(state["film_mul.weight"])
    with torch.no_grad():
        logits = [model(pixels, model.encode_text(["sand"])) for model in (folder, file)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_missing_page_is_written_without_training(trained: Path) -> None:
    page, sheet = trained / "report.html", trained / "preview.png"
    text = page.read_text()
    for part in (
        "CLIPSeg over toyclip",
        "learning rate",
        "IoU at p ≥ 0.5",
        "toyworld seed-7",
        "maskmill segment",
    ):
        assert part in text
    assert text.count("<svg") == 5 and text.count('alt="probability of ') == 12 and 'src="http' not in text
    kept = {
        name: (trained / name).stat().st_mtime_ns for name in (DECODER_FILE, RECORD_FILE, "metrics.jsonl")
    }
    page.unlink()
    sheet.unlink()
    sheet.mkdir()  # blocks the picture, so that the page fails
    status, said = _train(trained)
    assert status == 1 and "no page" in said and "Traceback" not in said and not page.exists()
    sheet.rmdir()
    status, said = _train(trained)
    assert status == 0 and "its page was missing" in said and str(page) in said
    assert page.read_text() == text and sheet.is_file()  # the same samples, the same answers
    assert {name: (trained / name).stat().st_mtime_ns for name in kept} == kept


@pytest.mark.cluster
@pytest.mark.slow
def test_a_registered_model_no_longer_needs_its_folder(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = f"sqlite:///{tmp_path}/runs.db"
    status, said = _train(trained, tracking=store, register="finder")
    assert status == 0 and "finder version 1 (challenger)" in said, said
    scene = open_toyworld(size=64).scene(open_toyworld(size=64).samples[0]).image
    Image.fromarray(scene).save("scene.png")
    model = load_trained(trained)
    pixels = normalize(torch.from_numpy(scene.copy()).permute(2, 0, 1)[None])
    with torch.no_grad():
        p = model(pixels, model.encode_text(["sand"]))[0, 0].sigmoid().numpy()
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("maskmill-train").experiment_id])
    assert run.info.run_name.startswith("train clipseg") and trained.name in run.info.run_name
    aside = trained.rename(trained.with_name("aside"))
    mlflow.set_tracking_uri(store)
    try:
        loaded = mlflow.pyfunc.load_model(
            "models:/finder@challenger", model_config={"precision": "fp32", "paths": True}
        )
    finally:
        mlflow.set_tracking_uri(None)
        aside.rename(trained)
    out = loaded.predict([{"image": "scene.png", "text": "sand"}])
    assert out["error"].isna().all() and out["max_probability"][0] == pytest.approx(p.max(), abs=1e-3)


@pytest.fixture
def late_signals_ignored() -> Iterator[None]:
    """A signal that comes when the training has ended already harms nobody."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.long  # students resume in the same loop
def test_a_stopped_run_resumes_to_the_same_model(
    trained: Path, tmp_path: Path, late_signals_ignored: None
) -> None:
    output = tmp_path / "run"
    first = output / "checkpoints" / "step-0000003" / "manifest.json"

    def stop() -> None:
        deadline = time.monotonic() + 900
        while not first.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    status, said = _train(output)
    thread.join()
    if status == 0:
        pytest.skip("training ended before it could be stopped")
    assert status == INTERRUPTED and "to resume" in said and not (output / RECORD_FILE).exists()
    status, said = _train(output)
    resumed = re.search(r"resumed from step (\d+)", said)
    assert status == 0 and resumed and 3 <= int(resumed[1]) < STEPS
    for ours, theirs in zip(_lines(output), _lines(trained), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    ours, theirs = (load_file(folder / DECODER_FILE) for folder in (output, trained))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-3)
    status, said = _train(output)
    assert status == 0 and "Nothing to do" in said


@pytest.mark.cluster
@pytest.mark.long
def test_two_workers_start_from_trained_weights(trained: Path, shared_ray: str, tmp_path: Path) -> None:
    settings = (
        f"start={trained}", "clip=none", "iterations=2", "learning_rate=1e-4", "min_learning_rate=1e-5",
        "dropout=0",
    )  # fmt: skip
    status, said = _train(tmp_path / "run", *settings, workers=2, ray_address=shared_ray)
    assert status == 0 and f"from {trained}" in said
    before, after = load_trained(trained), load_trained(tmp_path / "run")
    moved = (after.decoder.film_mul.weight - before.decoder.film_mul.weight).abs().max()
    assert 0 < moved < 1e-3
    assert read_clipseg_record(tmp_path / "run").config["dropout"] == 0
    assert after.encode_text(["sand"]).equal(before.encode_text(["sand"]))


def test_training_data_is_required() -> None:
    with pytest.raises(MaskMillError) as error:
        train_clipseg(CLIPSEG_RECIPES.load("toy"), TrainOptions(output="unused"))
    assert error.value.code == "wrong_use"


def test_the_picture_shows_what_the_model_says() -> None:
    """One model finds everything, the other nothing: only the cells with the prediction differ."""
    source = open_toy_source(open_toyworld(split="seed-7", count=2, size=64))
    recipe = CLIPSEG_RECIPES.load("toy", QUICK)
    samples = TripletSamples(source, recipe.triplets)
    model: ClipSeg = build_model(recipe.model, torch.device("cpu"))
    sheets = []
    for bias in (-100.0, 100.0):
        head = model.decoder.get_submodule("trans_conv")
        torch.nn.init.constant_(head.get_parameter("bias"), bias)
        answers = find_answers(model, samples, seed=0, count=2)
        assert {answer.found.all() for answer in answers} == {bias > 0}
        sheets.append(np.asarray(clipseg_sheet(answers)).astype(int))
    assert sheets[0].shape == sheets[1].shape
    changed = (sheets[0] != sheets[1]).any((0, 2))
    cell = len(changed) // 2  # a panel: image, what is there, what is found
    assert not changed[: cell * 2 // 3].any() and changed[cell * 2 // 3 : cell].any()


@dataclass(frozen=True, eq=False)
class _HalfKnown(TripletSource):
    """A source whose upper half of every image is ignored."""

    inner: TripletSource

    def read(self, pair: int) -> Example:
        example = self.inner.read(pair)
        mask = example.mask.copy()
        mask[: len(mask) // 2] = IGNORED
        return example._replace(mask=mask)


@pytest.mark.parametrize("grouped", [True, False])
def test_the_page_shows_different_images(grouped: bool) -> None:
    recipe = CLIPSEG_RECIPES.load("toy", QUICK)
    source = open_toy_source(open_toyworld(split="seed-7", count=5, size=64))
    half = _HalfKnown(source.name, source.fingerprint, source.pairs, source)
    samples = TripletSamples(half, recipe.triplets.replace(grouped=grouped))
    model: ClipSeg = build_model(recipe.model, torch.device("cpu"))
    answers = find_answers(model, samples, seed=3, count=7)
    shown = [answer.image.tobytes() for answer in answers]
    assert len(shown) == 7 and len(set(shown[:5])) == 5
    for answer in answers:
        assert answer.known is not None and not answer.known[:32].any() and answer.known[32:].all()


@pytest.mark.parametrize("output", ["finder", "s3://models/finder", "my models/a $1 'finder'"])
def test_the_commands_name_the_folder(output: str) -> None:
    for purpose, command in commands_for(output).items():
        words = shlex.split(command)
        assert words[words.index("--weights" if purpose == "Ask it" else "--model") + 1] == output


def test_what_must_stay_the_same_when_a_run_resumes(tmp_path: Path) -> None:
    def identity(*settings: str, **changes: Any) -> dict[str, Any]:
        recipe = CLIPSEG_RECIPES.load("toy", (*QUICK, *settings)).replace(**changes)
        data = open_toyworld(split="seed-7", count=2, size=64)
        options = TrainOptions(output=str(tmp_path))
        return dict(prepare(recipe, options, labels=None, ontology=None, dataset=data).identity)

    first = identity()
    assert first["triplets.size"] == "64" and "name" not in first and "recipe" not in first
    assert identity(name="mine") == first
    assert identity("q_neg=0.5") == first | {"triplets.q_neg": "0.5"} != first
    # An older version recorded the recipe's hash.
    made = CLIPSEG_RECIPES.load("toy", QUICK).hash
    old = {"recipe": made, "model": first["model"], "data": first["data"]}
    CheckpointStore(open_storage(tmp_path)).claim(old)
    assert identity() == old and "recipe" not in identity("q_neg=0.5")
