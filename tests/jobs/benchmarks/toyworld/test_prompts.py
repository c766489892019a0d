from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from jobs.benchmarks.toyworld import prompts as toy_prompts
from jobs.benchmarks.toyworld import tower as toy_tower
from jobs.benchmarks.toyworld.prompts import ask, prompts
from models.clip.loading import load_clip
from models.clipseg.baselines import ViTSegConfig, build_vitseg
from models.clipseg.decoder import normalize
from pipeline.datasets.toy import open_toyworld
from pipeline.metrics.foreground import STANDARD, THRESHOLDS, average_precision, foreground_iou
from pipeline.toyworld.scenes import CLASSES
from pipeline.trained.clipseg import read_clipseg_record
from pipeline.training.clipseg.sources.base import OBJECT
from pipeline.training.clipseg.sources.toy import KINDS, ToySource, kind_of, open_toy_source


class Knowing:
    """Answers from the truth: a text finds what it means but for the given phrases, a picture everything."""

    def __init__(self, source: ToySource, silent: Sequence[str] = (), loud: bool = False) -> None:
        self.silent, self.loud = silent, loud
        self.truth: dict[bytes, dict[str, torch.Tensor]] = {}
        for pair, phrase in enumerate(source.pairs.phrase.tolist()):
            example = source.read(pair)
            pixels = normalize(torch.from_numpy(example.image).permute(2, 0, 1)[None])
            known = self.truth.setdefault(pixels.numpy().tobytes(), {})
            known[source.pairs.phrases[phrase][0]] = torch.from_numpy(example.mask == OBJECT)

    def encode_image(self, pixels: torch.Tensor) -> Any:
        return SimpleNamespace(key=pixels.numpy().tobytes(), size=pixels.shape[-2:])

    def encode_text(self, texts: Sequence[str]) -> Sequence[str]:
        return texts

    def encode_prompt_images(self, pixels: torch.Tensor) -> Sequence[str]:
        return ["(picture)"] * len(pixels)

    def decode(self, activations: Any, conditionals: Sequence[str]) -> torch.Tensor:
        known, size = self.truth[activations.key], activations.size
        nothing, everything = torch.zeros(size, dtype=torch.bool), torch.ones(size, dtype=torch.bool)
        found = []
        for text in conditionals:
            if text == "(picture)":
                found.append(everything)
            elif text in self.silent:
                found.append(nothing)
            else:
                found.append(known.get(text, everything if self.loud else nothing))
        return torch.where(torch.stack(found), 10.0, -10.0)[None]


@pytest.fixture(scope="module")
def source() -> ToySource:
    return open_toy_source(open_toyworld(split="seed-91", count=12))


@pytest.mark.slow
def test_answers_that_are_right(source: ToySource) -> None:
    answers = ask(Knowing(source), source, seed=0)  # type: ignore[arg-type]
    assert foreground_iou(answers.present["text"], STANDARD) == pytest.approx(np.ones(len(THRESHOLDS)))
    assert average_precision(answers.present["text"], STANDARD) == pytest.approx(1)
    assert (answers.empty("text") == 1).all() and (answers.empty("picture") == 0).all()
    asked = [kind_of(source.pairs.phrases[phrase][0]) for phrase in source.pairs.phrase]
    assert {KINDS[number] for number in answers.present["text"].class_ids} == set(asked) == set(KINDS)
    pixels = answers.present["text"].counts[:, 0].sum(1)
    assert pixels.tolist() == [128 * 128 * asked.count(kind) for kind in KINDS]
    # A picture that finds everything is as precise as the world is full of what is asked for.
    scenes_of = {phrase: len(np.unique(source.pairs.image[source.pairs.phrase == phrase]))
                 for phrase in range(len(source.pairs.phrases))}  # fmt: skip
    shown = [pair for pair, phrase in enumerate(source.pairs.phrase) if scenes_of[phrase] > 1]
    assert 0 < len(shown) < len(source.pairs)  # no phrase is shown by the scene that is asked about
    share = np.mean([(source.read(pair).mask == OBJECT).mean() for pair in shown])
    assert foreground_iou(answers.present["picture"], STANDARD)[24] == pytest.approx(share)


@pytest.mark.slow
def test_a_phrase_that_finds_nothing_and_one_that_always_finds(source: ToySource) -> None:
    answers = ask(Knowing(source, silent=["grass"]), source, seed=0)  # type: ignore[arg-type]
    names = answers.present["text"].of_class(KINDS.index("names"))
    grass = [pair for pair, phrase in enumerate(source.pairs.phrase)
             if source.pairs.phrases[phrase] == ("grass",)]  # fmt: skip
    lost = sum(int((source.read(pair).mask == OBJECT).sum()) for pair in grass)
    assert names.counts[0, 24, 2] == lost > 0  # false negatives, and those alone
    assert names.counts[0, 24, 1] == 0
    loud = ask(Knowing(source, loud=True), source, seed=0)  # type: ignore[arg-type]
    assert (loud.empty("text") == 0).all()


def test_thresholds(source: ToySource) -> None:
    right = ask(Knowing(source), source, seed=0)  # type: ignore[arg-type]
    shares = np.zeros((10, len(THRESHOLDS)))
    shares[:, :30] = 0.5  # below the 31st threshold something is found
    picky = toy_prompts.Answers(right.present, {"text": shares})
    assert picky.strict_threshold("text") == 30
    assert picky.best_threshold("text") == 0  # all are as good
    never = toy_prompts.Answers(right.present, {"text": np.ones((10, len(THRESHOLDS)))})
    assert never.strict_threshold("text") == len(THRESHOLDS) - 1


@pytest.mark.long
def test_a_tower_learns_which_classes_are_there(tmp_path: Path) -> None:
    console = Console(record=True, width=160)
    path = tmp_path / "new" / "tower.safetensors"
    toy_tower.train_tower(path, console, CLASSES, scenes=192, steps=30, held_out=60)
    # Chance is 0.5. Six seeds, 1 and 2 threads: 0.65 to 0.70.
    assert float(console.export_text().split("AUC on new scenes:")[1].split()[0]) > 0.55
    written = path.read_bytes()
    toy_tower.train_tower(path, console, CLASSES, scenes=192, steps=30, held_out=60)
    assert path.read_bytes() == written and not console.export_text()
    toy_tower.train_tower(path, console, ["grass", "sky"], scenes=64, steps=1, held_out=60)
    assert path.read_bytes() != written and "2 labels" in console.export_text()
    config = ViTSegConfig(extract_layers=(2,), tower="toyvit", feedforward=32)
    model = build_vitseg(load_clip("toyclip", "bundled"), config, weights=str(path))
    logits = model(torch.zeros(1, 3, 128, 128), model.encode_text(["grass", "sky"]))
    assert logits.shape == (1, 2, 128, 128)


@pytest.mark.cluster
@pytest.mark.long
def test_rows_and_claims(tmp_path: Path) -> None:
    console = Console(record=True, width=160)
    quick = [
        "iterations=2", "batch_size=4", "checkpoint_every=100", "warmup=1", "reduce_dim=8", "feedforward=8",
        "triplets.size=64",
    ]  # fmt: skip

    def tower(path: Path, console: Console, classes: Sequence[str]) -> None:
        toy_tower.train_tower(path, console, classes, scenes=8, steps=1, held_out=8)

    small: dict[str, Any] = {"training_scenes": 8, "settings": quick, "make_tower": tower}
    # Each takes a while to start.
    variants = (toy_prompts.CLIPSEG, toy_prompts.VITSEG, toy_prompts.GUESSED)
    sections, claims = prompts((11,), 3, tmp_path, console, variants=variants, **small)
    assert [section.name for section in sections] == ["clipseg", "clipseg-phrases", "clipseg-labels"]
    for section in sections:
        for line in section.rows:
            for metric in section.metrics:
                runs = line.values[metric].runs
                assert len(runs) <= 1 and all(0 <= value <= 1 for value in runs)
                assert runs or section.name == "clipseg-phrases"  # three scenes have not all kinds
    rows = {line.name: line.values for line in sections[0].rows}
    for values in rows.values():
        assert all(len(values[metric].runs) == 1 for metric in sections[0].metrics)
    assert len(rows) == 2 and rows["CLIPSeg"] != rows["ViTSeg"]
    teacher = {line.name: line.values for line in sections[2].rows}["MaskCLIP (the teacher)"]
    assert teacher["miou_seen"].mean > 0.3  # the bundled CLIP, which is not trained here
    sources = [
        read_clipseg_record(tmp_path / "seed-11" / variant.name).data["source"] for variant in variants
    ]
    truth = "toyworld seed-2011"
    assert sources == [truth, truth, f"{truth} and label table"]
    assert len(claims) == 7 and all(entry.shows is None for entry in claims)  # one seed tells nothing
