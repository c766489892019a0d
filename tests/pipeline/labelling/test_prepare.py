from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.testing import assert_equal
from PIL import Image
from safetensors.torch import save_file

from jobs.label import label_images
from jobs.labelling.options import LabelOptions
from models.clip.loading import load_clip
from models.clipseg.decoder import build_clipseg
from models.device import best_device, native_precision
from models.errors import MaskMillError
from models.helper import find_helper, load_helper
from models.settings import ClipSegConfig
from pipeline.files.images import ImageSettings
from pipeline.labelling.labeller import LabellerSettings
from pipeline.labelling.maskclip import MaskClipLabeller
from pipeline.labelling.prepare import clipseg_recipe, prepare_labeller, student_recipe
from pipeline.labelling.recipes import RECIPES, LabelRecipe, change_recipe
from pipeline.labelling.student import StudentLabeller
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import load_ontology, parse_classes
from pipeline.toyworld.scenes import generate
from pipeline.tracking.tracker import OFF
from pipeline.trained.clipseg import write_clipseg_folder
from pipeline.trained.student import read_student_record
from tests.pipeline.trained.test_student import toy_student

TOYWORLD = load_ontology("toyworld")
OTHERS = parse_classes("zebra, striped animal, sky", background=None, templates="toyworld")


@pytest.fixture(scope="module")
def folder(student_folder: Path) -> Path:
    return student_folder


def edited(folder: Path, target: Path, **changes: Any) -> str:
    """A copy of a student with other entries in sections of its record."""
    shutil.copytree(folder, target)
    data = json.loads((target / "student.json").read_text())
    for section, values in changes.items():
        data[section] |= values
    (target / "student.json").write_text(json.dumps(data))
    return str(target)


def test_the_recipe_of_a_student_names_it_and_its_sizes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    recipe, ontology = student_recipe("run", ["min_confidence=0.25", "precision=fp32"])
    assert ontology == TOYWORLD
    assert recipe == LabelRecipe(
        name="run",
        model=str(folder),
        pretrained=None,
        images=ImageSettings(scale=(512, 96), max_pixels=100_000),
        min_confidence=0.25,
        precision="fp32",
    )
    with pytest.raises(MaskMillError) as caught:
        student_recipe("run", ["scales=3"])
    assert caught.value.code == "setting_invalid"


def test_words_that_are_too_long_show_before_anything_is_built() -> None:
    long = parse_classes("zebra, " + " ".join(["word"] * 60), background=None, templates="toyworld")
    with pytest.raises(MaskMillError) as caught:
        prepare_labeller(RECIPES["toy"], long)
    assert caught.value.code == "prompt_invalid"


def test_cached_names_need_no_text_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    image = generate(3, 1, 64).images[0]
    first, again = [], []
    for found in (first, again):
        labeller = prepare_labeller(RECIPES["toy"], OTHERS, precision="fp32").build()
        found.append(labeller.label([image], [(64, 64)])[0].labels)
        monkeypatch.setattr("pipeline.labelling.prepare.load_text_tower", None)
    assert_equal(again, first)


@pytest.mark.parametrize("given", [None, "auto", "fp32", "bf16"])
def test_the_precision_of_a_run_is_settled(given: str | None) -> None:
    native = native_precision(best_device())
    for recipe, usual in ((RECIPES["toy"], native), (RECIPES["toy"].replace(precision="fp16"), "fp16")):
        prepared = prepare_labeller(recipe, OTHERS, precision=given)
        assert prepared.precision == {None: usual, "auto": native}.get(given, given)


def test_a_student_with_its_own_words_needs_no_clip(folder: Path, tmp_path: Path) -> None:
    # The CLIP that it was trained with cannot be had here.
    away = edited(folder, tmp_path / "run", text={"pretrained": "/nowhere/clip.safetensors"})
    recipe, own = student_recipe(away, ["min_confidence=0.1"])
    # Another name, another colour and a threshold make another ontology of the same words.
    fields = own.to_dict() | {"name": "mine"}
    fields["classes"][0] |= {"color": "#123456", "threshold": 0.9}
    seen: list[str] = []
    prepared = prepare_labeller(recipe, Ontology.from_dict(fields), check_weights=seen.append)
    assert seen == [read_student_record(folder).fingerprint]
    assert prepared.weights == {
        "model": f"student:{away}",
        "pretrained": None,
        "fingerprint": seen[0],
        "text": {
            "model": "toyclip",
            "pretrained": "/nowhere/clip.safetensors",
            "fingerprint": read_student_record(folder).text["fingerprint"],
        },
    }
    labeller = prepared.build(precision="fp32")
    assert isinstance(labeller, StudentLabeller)
    image = generate(3, 1, 64).images[0]
    settings = LabellerSettings(num_classes=14, thresholds=(0.9, *[0.1] * 13))
    direct = StudentLabeller(settings, uri=str(folder))
    ((got,), (wanted,)) = (each.label([image], [(64, 64)]) for each in (labeller, direct))
    assert (got.labels == wanted.labels).all() and 0 < (got.labels == 255).sum() < got.labels.size


def test_other_words_go_through_the_clip_of_the_record(folder: Path, own_cache: Path) -> None:
    recipe, _ = student_recipe(str(folder))
    made = [prepare_labeller(recipe, OTHERS).build(precision="fp32") for _ in range(2)]
    assert len(list(own_cache.glob("text-*"))) == 1
    image = generate(3, 1, 64).images[0]
    first, second = (labeller.label([image], [(64, 64)])[0] for labeller in made)
    assert (first.labels == second.labels).all()
    assert set(np.unique(first.labels)) <= {0, 1, 2} and len(np.unique(first.labels)) > 1


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"text": {"fingerprint": "0" * 64}}, "weights_do_not_fit", "000000000000"),
        ({"text": {"pretrained": "/nowhere/x.safetensors"}}, "weights_missing", "Other classes than"),
        ({"config": {"learned_background": True}}, "classes_differ", "has learned what background is"),
    ],
)
def test_words_that_a_student_cannot_take(
    folder: Path, tmp_path: Path, changes: dict[str, Any], code: str, said: str
) -> None:
    recipe, own = student_recipe(edited(folder, tmp_path / "run", **changes))
    with pytest.raises(MaskMillError) as caught:
        prepare_labeller(recipe, OTHERS)
    assert caught.value.code == code and said in caught.value.message
    assert "its own classes: grass, water" in caught.value.remedy
    prepare_labeller(recipe, own)  # with its own there is no trouble


def test_a_learned_background_labels_with_its_own_classes(tmp_path: Path) -> None:
    own = parse_classes("grass, zebra, sky", background=["thing", "texture"], templates="toyworld")
    toy_student(tmp_path / "run", ontology=own, learned_background=True)
    recipe, ontology = student_recipe(str(tmp_path / "run"))
    labeller = prepare_labeller(recipe, ontology).build(precision="fp32")
    (prediction,) = labeller.label([generate(3, 1, 64).images[0]], [(64, 64)])
    assert set(np.unique(prediction.labels)) <= set(range(4))


@pytest.mark.parametrize(
    "change",
    [{"head": "value"}, {"pd_threshold": 0.5, "temperature": 40.0}, {"pretrained": "bundled"}],
)
def test_settings_of_maskclip_mean_nothing_to_a_student(folder: Path, change: dict[str, Any]) -> None:
    recipe, own = student_recipe(str(folder))
    with pytest.raises(MaskMillError) as caught:
        prepare_labeller(change_recipe(recipe, change), own)
    assert caught.value.code == "setting_invalid"
    named = caught.value.message.partition(" of recipe")[0]
    assert {name.rpartition(".")[2] for name in named.split(", ")} == set(change)


def test_a_damaged_student_shows_before_work_starts(folder: Path, tmp_path: Path) -> None:
    broken = edited(folder, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"0" * 100)
    recipe, own = student_recipe(broken)
    with pytest.raises(MaskMillError) as caught:
        prepare_labeller(recipe, own)
    assert caught.value.code == "model_damaged"


def test_a_folder_without_a_student_is_not_taken_for_the_name_of_a_clip(tmp_path: Path) -> None:
    for model in (str(tmp_path), "memory://nothing/here"):
        with pytest.raises(MaskMillError) as caught:
            prepare_labeller(LabelRecipe(name="x", model=model, pretrained=None), TOYWORLD)
        assert caught.value.code == "name_unknown"


def test_names_of_clips_still_make_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toyclip").mkdir()  # an --output of this name must not get in the way
    prepared = prepare_labeller(RECIPES["toy"], OTHERS, precision="fp32")
    assert isinstance(prepared.build(precision="fp32"), MaskClipLabeller)
    assert prepared.weights["model"] == "toyclip" and "text" not in prepared.weights


@pytest.mark.cluster
@pytest.mark.slow
def test_the_label_job_runs_a_student(folder: Path, shared_ray: str, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    scenes = generate(7, 4, 96).images
    for index, scene in enumerate(scenes):
        Image.fromarray(scene).save(images / f"{index}.png")
    (images / "bad.png").write_bytes(b"no image")
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in sorted(images.iterdir())))
    recipe, _ = student_recipe(str(folder), ["precision=fp32"])
    output = tmp_path / "table"
    options = LabelOptions(output=str(output), max_failure_rate=0.5, address=shared_ray, tracking=OFF)
    # With other words, the longer way: they travel to the workers.
    status = label_images(str(tmp_path / "list.txt"), recipe, OTHERS, options)
    assert status == 0
    record = json.loads((output / "dataset.json").read_text())
    assert record["weights"]["model"] == f"student:{folder}"
    assert record["recipe"]["model"] == str(folder)
    labeller = prepare_labeller(recipe, OTHERS).build(precision="fp32", threads=1)
    table = pa.concat_tables(pq.read_table(path) for path in (output / "labels").glob("*.parquet"))
    rows = {Path(row["uri"]).name: row for row in table.to_pylist()}
    assert len(rows) == 5 and rows["bad.png"]["status"] == "not_an_image"
    for index, scene in enumerate(scenes):
        mask = np.asarray(Image.open(io.BytesIO(rows[f"{index}.png"]["mask"]["bytes"])))
        (wanted,) = labeller.label([scene], [(96, 96)])
        assert (mask == wanted.labels).all() and len(np.unique(mask)) > 1


@pytest.mark.parametrize(
    ("trained", "scale", "example"),
    [
        ({"triplets": {"size": 128, "support_size": 64}}, (128, 128), 64),
        ({"triplets": {"size": 64}}, (64, 64), 64),
        ({}, RECIPES["clipseg"].images.scale, RECIPES["clipseg"].clipseg.example_size),
    ],
)
def test_a_trained_clipseg_labels_at_the_sizes_of_its_training(
    tmp_path: Path, trained: dict[str, Any], scale: tuple[int, int], example: int
) -> None:
    config = ClipSegConfig(reduce_dim=16, extract_layers=(1,), feedforward=8)
    model = build_clipseg(load_clip("toyclip", "bundled"), config)
    facts: dict[str, Any] = {"data": {}, "metrics": {}, "training": {}, "versions": {}}
    write_clipseg_folder(tmp_path, model, kind="clipseg", recipe=trained, **facts)
    recipe = clipseg_recipe(str(tmp_path), ["batch_size=3"])
    assert (recipe.model, recipe.pretrained, recipe.batch_size) == ("clipseg", str(tmp_path), 3)
    assert recipe.images.scale == scale and recipe.clipseg.example_size == example
    assert clipseg_recipe(f"{tmp_path.parent}/./{tmp_path.name}/", ["batch_size=3"]) == recipe
    labeller = prepare_labeller(recipe, TOYWORLD, precision="fp32").build(precision="fp32")
    labelled = labeller.label([np.zeros((*scale, 3), np.uint8)], [(40, 50)])
    assert labelled[0].labels.shape == (40, 50)


def test_heads_are_checked_against_the_tower(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MASKMILL_CACHE", str(tmp_path))
    with pytest.raises(MaskMillError, match="a ResNet has none"):
        prepare_labeller(LabelRecipe(model="RN50", pretrained="random:0", maskclip={"head": "sc"}), TOYWORLD)
    folder = tmp_path / "deep"
    folder.mkdir()
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 24, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    deep = open_clip.CLIP(**config)
    save_file(deep.state_dict(), folder / "open_clip_model.safetensors")
    for head, warned in (("maskclip", True), ("value", True), ("nn", False), ("sc", False)):
        caplog.clear()
        recipe = LabelRecipe(model=f"local-dir:{folder}", pretrained=None, maskclip={"head": head})
        prepare_labeller(recipe, TOYWORLD)
        assert ("a tower of 24 blocks" in caplog.text) == warned, head


@pytest.mark.parametrize("head", ["proxy", "lposs"])
def test_a_helper_is_found_first_and_recorded(
    head: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MASKMILL_CACHE", str(tmp_path))
    monkeypatch.setattr("models.hub.reachable", lambda _host: False)
    toy = RECIPES["toy"]
    reading = toy.maskclip.replace(head=head, helper="vit_base_patch16_224.dino")
    with pytest.raises(MaskMillError, match="weights of the helper vit_base_patch16_224"):
        prepare_labeller(toy.replace(maskclip=reading), TOYWORLD)
    file = tmp_path / "helper.safetensors"
    save_file(load_helper(find_helper("test_vit", "random:0")).tower.state_dict(), file)
    confidences = []
    for weights in ("random:0", str(file)):
        reading = reading.replace(helper="test_vit", helper_weights=weights)
        prepared = prepare_labeller(toy.replace(maskclip=reading), TOYWORLD)
        assert prepared.weights["helper"]["model"] == "test_vit"
        assert (str(file) in prepared.files) == (weights == str(file))
        labeller = pickle.loads(pickle.dumps(prepared)).build(threads=1)
        (found,) = labeller.label([generate(3, 1, 64).images[0]], [(61, 83)])
        assert found.labels.shape == (61, 83)
        confidences.append(found.confidence)
    assert len(np.unique(confidences[0])) > 1
    np.testing.assert_array_equal(*confidences)
