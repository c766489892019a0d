"""Loading CLIPs: every kind of source on real files, and an error that helps for every wrong one."""

from __future__ import annotations

import hashlib
import json
import pickle
import shlex
import subprocess
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models import hub
from models.clip import weights
from models.clip.loading import Clip, Towers, load_clip, load_source
from models.clip.weights import (
    HUB_REPOSITORIES,
    OPENAI_MEAN,
    OPENAI_STD,
    WeightSource,
    find_weights,
    openai_archives,
    own_fingerprint,
    read_state,
    sha256,
)
from models.errors import MaskMillError
from pipeline.labelling.recipes import LABEL_RECIPES

CONFIG: dict[str, Any] = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def random_source(seed: int) -> WeightSource:
    return WeightSource("ViT-B-32", f"random:{seed}", CONFIG, None, seed, OPENAI_MEAN, OPENAI_STD)


@pytest.fixture(scope="module")
def small() -> open_clip.CLIP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return open_clip.CLIP(**CONFIG).eval().requires_grad_(False)


def write_folder(folder: Path, config: dict[str, Any] = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    statistics = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": statistics})
    )
    return folder


def openai_archive(model: nn.Module, path: Path) -> Path:
    """What OpenAI published: a scripted module with fp16 weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(model.half()), str(path))
    model.float()
    return path


@pytest.mark.parametrize("kind", ["safetensors", "pt", "checkpoint", "legacy", "archive"])
def test_every_kind_of_file(
    small: open_clip.CLIP, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    folder = write_folder(tmp_path / "model")
    if kind == "safetensors":
        path = folder / "open_clip_model.safetensors"
        save_file(state, path)
    elif kind == "archive":
        path = openai_archive(small.half(), folder / "archive.pt")
        monkeypatch.setattr(weights, "openai_archives", lambda: {sha256(path)})
        state = {name: tensor.half().float() for name, tensor in state.items()}
        small.load_state_dict(state)
    else:
        path = folder / "weights.pt"
        content = (
            {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}
            if kind == "checkpoint"
            else state
        )
        # The documented way, and the only one, to write the format of PyTorch before 1.6.
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    clip = load_clip(f"local-dir:{folder}", None)
    for name, tensor in state.items():
        assert torch.equal(clip.model.state_dict()[name], tensor), name
    assert isinstance(clip.model, open_clip.CLIP)
    tokens = clip.tokenizer(["a cat", "a photo of a dog."])
    assert torch.equal(clip.model.encode_image(IMAGE), small.encode_image(IMAGE))
    assert torch.equal(clip.model.encode_text(tokens), small.encode_text(tokens))
    assert clip.mean == (0.4, 0.5, 0.6)
    assert clip.std == (0.2, 0.3, 0.4)
    assert not clip.model.training
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())
    assert len(clip.fingerprint) == 64
    assert clip.fingerprint == find_weights(f"local-dir:{folder}", None).fingerprint


def test_archives_of_others_are_refused(small: open_clip.CLIP, tmp_path: Path) -> None:
    """TorchScript is code."""
    path = openai_archive(small, tmp_path / "archive.pt")
    with pytest.raises(MaskMillError, match="none of those that OpenAI published") as caught:
        read_state(path)
    assert caught.value.code == "model_unsupported"
    assert "safetensors" in caught.value.remedy


def test_published_archives_are_known_by_their_hash() -> None:
    known = openai_archives()
    assert "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f" in known  # ViT-B-16
    assert all(len(name) == 64 for name in known)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("the pickle ran code",)


def test_pickles_do_not_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.zeros(1), "evil": Evil()}, tmp_path / "evil.pt")
    archive = tmp_path / "archive.pt"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a/data.pkl", pickle.dumps({"evil": Evil()}))
        file.writestr("a/constants.pkl", b"")
    for path, code in ((tmp_path / "evil.pt", "model_damaged"), (archive, "model_unsupported")):
        with pytest.raises(MaskMillError) as caught:
            read_state(path)
        assert caught.value.code == code
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors", "empty.pt", "text.bin"])
def test_damaged_files(small: open_clip.CLIP, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "cut.pt":
        torch.save(small.state_dict(), path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif name == "cut.safetensors":
        save_file(small.state_dict(), path)
        path.write_bytes(path.read_bytes()[:100_000])
    else:
        path.write_bytes(b"" if name == "empty.pt" else b"no weights at all")
    with pytest.raises(MaskMillError) as caught:
        read_state(path)
    assert caught.value.code == "model_damaged"


@pytest.mark.parametrize("towers", ["both", "visual", "text"])
def test_weights_of_another_model(small: open_clip.CLIP, tmp_path: Path, towers: Towers) -> None:
    folder = write_folder(tmp_path, {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "layers": 3}})
    save_file(small.state_dict(), folder / "open_clip_model.safetensors")
    with pytest.raises(MaskMillError, match=r"resblocks\.2") as caught:
        load_clip(f"local-dir:{folder}", None, towers=towers)
    assert caught.value.code == "weights_do_not_fit"


@pytest.mark.parametrize("towers", ["both", "visual", "text"])
def test_weights_with_foreign_names(small: open_clip.CLIP, tmp_path: Path, towers: Towers) -> None:
    folder = write_folder(tmp_path)
    theirs = {f"vision_model.{name}": tensor for name, tensor in small.state_dict().items()}
    torch.save(theirs, folder / "weights.pt")
    with pytest.raises(MaskMillError) as caught:
        load_clip(f"local-dir:{folder}", None, towers=towers)
    assert caught.value.code == "weights_do_not_fit"


def test_text_tower_alone(small: open_clip.CLIP, tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    save_file(small.state_dict(), folder / "open_clip_model.safetensors")
    name = f"local-dir:{folder}"
    clip = load_clip(name, None, towers="text")
    prompts = ["a cat", "a photo of a dog."]
    assert torch.equal(clip.encode_text(prompts), load_clip(name, None).encode_text(prompts))
    visual = sum(p.numel() for p in small.visual.parameters())
    whole = sum(p.numel() for p in small.parameters())
    assert sum(p.numel() for p in clip.model.parameters()) == whole - visual
    with pytest.raises(MaskMillError) as caught:
        clip.encode_image(IMAGE)
    assert caught.value.code == "model_unsupported"
    tower, both = (load_source(random_source(1), towers=towers) for towers in ("text", "both"))
    assert torch.equal(tower.encode_text(prompts), both.encode_text(prompts))


def test_visual_tower_alone(small: open_clip.CLIP, tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    save_file(small.state_dict(), folder / "open_clip_model.safetensors")
    clip = load_clip(f"local-dir:{folder}", None, towers="visual")
    assert isinstance(clip.model, open_clip.CLIP)
    assert torch.equal(clip.model.encode_image(IMAGE), small.encode_image(IMAGE))
    visual = sum(p.numel() for p in small.visual.parameters())
    assert sum(p.numel() for p in clip.model.parameters()) == visual
    with pytest.raises(MaskMillError) as caught:
        clip.encode_text(["a cat"])
    assert caught.value.code == "model_unsupported"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_precision_is_that_of_the_weights(small: open_clip.CLIP, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_folder(tmp_path)
    save_file(small.state_dict(), folder / "open_clip_model.safetensors")
    clip = load_clip(f"local-dir:{folder}", None, dtype=dtype)
    assert {p.dtype for p in clip.model.parameters()} == {dtype}
    embedding = clip.encode_text(["a cat", "a dog"])
    assert embedding.dtype == torch.float32
    assert torch.allclose(embedding.norm(dim=-1), torch.ones(2), atol=1e-6)


# --- text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"no_causal_mask": True},
        {"ls_init_value": 0.5},
        {"proj_bias": True},
        {"pool_type": "eos", "eos_id": 49407},
        {"pool_type": "last"},
        {"pool_type": "first"},
    ],
    ids=str,
)
@pytest.mark.parametrize("normalize", [True, False])
def test_text_embeddings_are_those_of_the_full_context(text: dict[str, Any], normalize: bool) -> None:
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], **text}}
    clip = load_source(replace(random_source(0), config=config))
    prompts = ["a cat", "a photo of a large dog.", "a cat", "it " * 74 + "!", "itap of my horse.", ""]
    assert isinstance(clip.model, open_clip.CLIP)
    full = clip.model.encode_text(clip.tokenizer(prompts), normalize=normalize)
    assert (clip.encode_text(prompts, normalize=normalize) - full).abs().max() < 2e-6
    assert clip.encode_text([]).shape == (0, 32)


def test_prompt_that_does_not_fit(small: open_clip.CLIP, tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    save_file(small.state_dict(), folder / "open_clip_model.safetensors")
    clip = load_clip(f"local-dir:{folder}", None)
    assert clip.encode_text(["it " * 75]).shape == (1, 32)
    with pytest.raises(MaskMillError, match="78 tokens"):
        clip.encode_text(["it " * 76])


# --- seeded random weights --------------------------------------------------------------------------


def state_of(clip: Clip) -> dict[str, Tensor]:
    return clip.visual.state_dict()


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = torch.random.get_rng_state()
    a, b = load_source(random_source(1)), load_source(random_source(1), towers="visual")
    assert torch.equal(torch.random.get_rng_state(), first), "the caller's random numbers are not touched"
    assert all(torch.equal(state_of(a)[name], tensor) for name, tensor in state_of(b).items())
    other = state_of(load_source(random_source(2), towers="visual"))
    assert not torch.equal(other["proj"], state_of(a)["proj"])
    assert a.fingerprint == b.fingerprint == "random:1:ViT-B-32"


def test_random_weights_leave_no_term_out() -> None:
    for name, tensor in state_of(load_clip("RN50", "random:0", towers="visual")).items():
        if tensor.is_floating_point():
            assert tensor.abs().max() > 0, name
            assert tensor.std() > 0, name


# --- words that do not name a CLIP ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "pretrained", "code", "says"),
    [
        ("ViT-B-16", "openai", "model_unsupported", "ViT-B-16-quickgelu"),
        ("RN50", "openai", "model_unsupported", "RN50-quickgelu"),
        ("ViT-B-16-quickgelu", "laion2b_s34b_b88k", "model_unsupported", "Use the model ViT-B-16 "),
        ("ViT-B-61", "openai", "name_unknown", "Did you mean ViT-B-16"),
        ("ViT-B-16-quickgelu", "openia", "name_unknown", "Did you mean openai"),
        ("ViT-B-16", None, "name_unknown", "laion2b_s34b_b88k"),
        ("ViT-B-16", "random:x", "name_unknown", "random:SEED"),
        ("ViT-B-16", "nowhere/weights.pt", "weights_missing", "Check the path"),
        ("ViT-B-16-SigLIP", "webli", "model_unsupported", "ViTs with a class token"),
        ("ViT-B-16-SigLIP2", "webli", "model_unsupported", "pools its patches by a learned attention"),
        ("PE-Core-B-16", "meta", "model_unsupported", "pools its patches by a learned attention"),
        ("tipsv2_b14", "random:0", "model_unsupported", "by the names TIPSv2-B-14"),
        ("RADIOv2.5-B", "random:0", "model_unsupported", "helper=vit_base_patch16_radio_v3.c_radio"),
        ("coca_ViT-B-32", "laion2b_s13b_b90k", "model_unsupported", "ModifiedResNets"),
        ("convnext_base", "laion400m_s13b_b51k", "model_unsupported", "timm"),
        ("local-dir:/nowhere/at/all", None, "name_unknown", "open_clip_config.json"),
        ("local-dir:", None, "name_unknown", "local-dir:NAME"),
        ("hf-hub:some/repo", "openai", "name_unknown", "Leave pretrained out"),
    ],
)
def test_wrong_words(model: str, pretrained: str | None, code: str, says: str) -> None:
    with pytest.raises(MaskMillError) as caught:
        load_clip(model, pretrained)
    assert caught.value.code == code
    assert says in str(caught.value)


@pytest.mark.parametrize(("model", "tag"), HUB_REPOSITORIES)
def test_own_weights_are_where_open_clip_looks(model: str, tag: str) -> None:
    assert open_clip.get_pretrained_cfg(model, tag)["hf_hub"] == f"{HUB_REPOSITORIES[model, tag]}/"
    assert own_fingerprint(model, "random:3") == find_weights(model, "random:3").fingerprint


def test_a_fingerprint_is_that_of_the_file_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    for data in (b"one", b"two", b"more"):
        path.write_bytes(data)
        source = WeightSource("x", None, {}, path, None, OPENAI_MEAN, OPENAI_STD)
        assert source.fingerprint == hashlib.sha256(data).hexdigest()


def test_archive_needs_the_quickgelu_model(small: open_clip.CLIP, tmp_path: Path) -> None:
    path = openai_archive(small, tmp_path / "mine.pt")
    with pytest.raises(MaskMillError, match=r"OpenAI archive mine\.pt were trained with QuickGELU") as caught:
        load_clip("ViT-B-16", str(path))
    assert caught.value.code == "model_unsupported"
    assert find_weights("ViT-B-16-quickgelu", str(path)).path == path


@pytest.mark.parametrize("model", ["ViT-B-16-quickgelu", "hf-hub:some/repo", "ViT-B-16-plus-240"])
def test_no_network_and_no_weights(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a network, wherever the test runs: only the answer of the probe is set."""
    monkeypatch.setattr(hub, "reachable", lambda host: False)
    tag = {"ViT-B-16-quickgelu": "openai", "ViT-B-16-plus-240": "laion400m_e32"}.get(model)
    with pytest.raises(MaskMillError) as caught:
        load_clip(model, tag, cache_dir=str(tmp_path))
    remedy = caught.value.remedy
    assert caught.value.code == "weights_missing" and "--recipe toy" in remedy
    commands = [line.strip() for line in remedy.splitlines() if line.startswith("  ")]
    got = [command.rpartition("/")[2] for command in commands if command.startswith("curl -fLO https://")]
    assert got

    # Paste them: the files that curl would get are there, then cp and --set do as they say.
    here = tmp_path / "here"
    here.mkdir()
    for file in got:
        (here / file).write_text('{"model_cfg": {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}}}')
    for command in commands:
        if command.startswith("mkdir"):
            subprocess.run(command, shell=True, cwd=here, check=True)
    monkeypatch.chdir(here)
    sets = next(shlex.split(command) for command in commands if command.startswith("--set"))
    settings = dict(item.split("=", 1) for item in sets if item != "--set")
    if tag is not None and any(command.startswith("mkdir") for command in commands):
        # The same command finds it.
        assert find_weights(model, tag, cache_dir=str(tmp_path)).path == tmp_path / got[0]
    recipe = LABEL_RECIPES.load("maskclip", [f"model={model}", *(f"{k}={v}" for k, v in settings.items())])
    assert find_weights(recipe.model, recipe.pretrained).path is not None


@pytest.mark.parametrize("name", open_clip.list_models())
def test_every_architecture_is_taken_or_refused(name: str) -> None:
    """By the configuration, without building: class-token ViTs and ModifiedResNets are taken, no others."""
    config = open_clip.get_model_config(name)
    vision = config["vision_cfg"]
    takes = "timm_model_name" not in vision and "multimodal_cfg" not in config
    if takes:
        assert find_weights(name, "random:0").config["embed_dim"] == config["embed_dim"]
    else:
        with pytest.raises(MaskMillError, match="cannot take dense features"):
            find_weights(name, "random:0")
