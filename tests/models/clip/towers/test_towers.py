"""C-RADIO with RADSeg's reading, and TIPSv2, against plain derivations on tensors of their state dicts."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from models import hub
from models.catalogue import HEADS
from models.clip import published
from models.clip.dense import dense_encoder
from models.clip.loading import Clip, load_clip, load_source
from models.clip.towers.modules import TimmTower
from models.clip.weights import OPENAI_MEAN, OPENAI_STD, WeightSource, find_weights, siglip2_weights
from models.errors import MaskMillError
from models.maskclip import MaskClip
from models.settings import MaskClipSettings
from tests.models.clip.inputs import classifier, photographs

WIDTH, HEADS_OF_ATTENTION, LAYERS, D = 48, 3, 3, 32
TRUNK = {"embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS_OF_ATTENTION}
RADIO: dict[str, Any] = {
    "embed_dim": D,
    "tower": "radio",
    "vision_cfg": {
        "trunk": "naflexvit_base_patch16_radio_v3",
        "patch_size": 16,
        "options": {**TRUNK, "reg_tokens": 2, "pos_embed_grid_size": (8, 8)},
        "head": (40, 2),
    },
    "text_cfg": {
        "context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2, "mlp_ratio": 2.0,
        "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "hf_tokenizer_name": "",
        "tokenizer_kwargs": {"clean": "canonicalize"}, "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    },
    "text_model": published.SIGLIP2,
}  # fmt: skip
TIPS: dict[str, Any] = {
    "embed_dim": WIDTH,
    "tower": "tips",
    "vision_cfg": {
        "trunk": "vit_base_patch14_reg1_tipsv2",
        "patch_size": 14,
        "options": {**TRUNK, "img_size": 56},
    },
    "text_cfg": {
        "width": WIDTH, "heads": 3, "layers": 2, "mlp": 64, "vocab_size": 60, "context_length": 16
    },
    "repository": "google/tipsv2-b14",
}  # fmt: skip
TIPS_NAMES = {"self_attn.": "attn.", "linear1.": "mlp.c_fc.", "linear2.": "mlp.c_proj.", "norm": "ln_"}
GRIDS = [(4, 4), (5, 7), (6, 3)]
SEEDED = {"radio": (RADIO, OPENAI_MEAN, OPENAI_STD), "tips": (TIPS, (0.0,) * 3, (1.0,) * 3)}
READINGS = {"radio": "radseg", "tips": "maskclip"}


def source(kind: str, path: Path | None = None) -> WeightSource:
    config, mean, std = SEEDED[kind]
    return WeightSource(f"small-{kind}", "random:5", config, path, None if path else 5, mean, std)  # type: ignore[arg-type]


@functools.cache
def small(kind: str, dtype: torch.dtype = torch.float64) -> Clip:
    clip = load_source(source(kind), dtype=dtype)
    if kind == "radio":  # random weights alone find all patches alike
        trunk = clip.visual.trunk  # type: ignore[union-attr]
        trunk.embeds.proj.weight *= 8
        trunk.blocks[-1].attn.qkv.weight *= 4
    return clip


def visual_state(kind: str) -> dict[str, Tensor]:
    return {name: t.double() for name, t in small(kind).visual.state_dict().items()}


def labeller(kind: str, dtype: torch.dtype = torch.float64, **how: Any) -> MaskClip:
    clip = small(kind, dtype)
    reading = MaskClipSettings(head=READINGS[kind], image_stats="clip", profile="weights", **how)
    return MaskClip(clip, classifier(clip.embed_dim), reading)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


# --- plain towers, for one image ----------------------------------------------------------------------------


def norm(x: Tensor, state: dict[str, Tensor], name: str, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    scaled = (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def rows_of_softmax(logits: Tensor) -> Tensor:
    weights = (logits - logits.amax(1, keepdim=True)).exp()
    return weights / weights.sum(1, keepdim=True)


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(1, keepdim=True).sqrt()


def by_head(x: Tensor) -> list[Tensor]:
    return list(x.split(x.shape[1] // HEADS_OF_ATTENTION, 1))


def block(x: Tensor, state: dict[str, Tensor], name: str, attention: Any) -> Tensor:
    """A pre-norm block with layer scale; its attention is a function of q, k, v and the output projection."""
    y = linear(norm(x, state, f"{name}.norm1", 1e-6), state, f"{name}.attn.qkv")
    q, k, v = (by_head(part) for part in y.chunk(3, 1))
    x = x + state[f"{name}.ls1.gamma"] * attention(q, k, v, lambda o: linear(o, state, f"{name}.attn.proj"))
    y = gelu(linear(norm(x, state, f"{name}.norm2", 1e-6), state, f"{name}.mlp.fc1"))
    return x + state[f"{name}.ls2.gamma"] * linear(y, state, f"{name}.mlp.fc2")


def usual(q: list[Tensor], k: list[Tensor], v: list[Tensor], project: Any) -> Tensor:
    mixed = [rows_of_softmax(a @ b.T / math.sqrt(a.shape[1])) @ c for a, b, c in zip(q, k, v, strict=True)]
    return project(torch.cat(mixed, 1))


def recursive(q: list[Tensor], k: list[Tensor], v: list[Tensor], project: Any) -> Tensor:
    """RADSeg's, head by head and row by row."""
    found = []
    for first, values in zip(by_head(usual(q, k, v, project)), v, strict=True):
        alike = unit(first) @ unit(first).T
        assert (alike < 0).any(), "the threshold should bite"
        weights = torch.where(alike < 0, 0.0, (10 * alike).exp())
        found.append(weights / weights.sum(1, keepdim=True) @ values)
    return project(torch.cat(found, 1))


def values_alone(q: list[Tensor], k: list[Tensor], v: list[Tensor], project: Any) -> Tensor:
    return project(torch.cat(v, 1))


def patches(image: Tensor, weight: Tensor, side: int) -> Tensor:
    """Rows of a linear map of every patch, whose columns are ordered as ``weight``'s (W_, 3, side, side)."""
    cells = [
        (weight * image[:, y : y + side, x : x + side]).sum((1, 2, 3))
        for y in range(0, image.shape[1], side)
        for x in range(0, image.shape[2], side)
    ]
    return torch.stack(cells)


def normalised(image: Tensor, kind: str) -> Tensor:
    mean, std = (torch.tensor(each, dtype=torch.float64)[:, None, None] for each in SEEDED[kind][1:])
    return (image.double() / 255 - mean) / std


def plain_radio(image: Tensor) -> Tensor:
    """Patches (L, W_) that a C-RADIO's last block puts out, read by RADSeg."""
    state, image = visual_state("radio"), normalised(image, "radio")
    grid = (image.shape[1] // 16, image.shape[2] // 16)
    weight = state["trunk.embeds.proj.weight"].unflatten(1, (16, 16, 3)).permute(0, 3, 1, 2)
    x = patches(image, weight, 16) + state["trunk.embeds.proj.bias"]
    # The table is stretched to a square over the longer side, and cut.
    table = state["trunk.embeds.pos_embed"].permute(0, 3, 1, 2).float()
    square = F.interpolate(table, (max(grid), max(grid)), mode="bilinear", align_corners=True)[0]
    x = x + square[:, : grid[0], : grid[1]].flatten(1).T.double()
    x = torch.cat([state["trunk.embeds.cls_token"][0], state["trunk.embeds.reg_token"][0], x])
    for layer in range(LAYERS - 1):
        x = block(x, state, f"trunk.blocks.{layer}", usual)
    return block(x, state, f"trunk.blocks.{LAYERS - 1}", recursive)[3:]


def plain_head(x: Tensor) -> Tensor:
    """Embeddings (L, D), after the global aggregation of patches (L, W_)."""
    state = visual_state("radio")
    alike = unit(x) @ unit(x).T
    logits = 10 * (alike - alike.sum() / alike.numel())
    assert (logits < 0).any(), "the threshold should bite"
    weights = torch.where(logits < 0, 0.0, logits.exp())
    x = linear(weights / weights.sum(1, keepdim=True) @ x, state, "head.fc1")
    for layer in range(2):
        y = gelu(norm(x, state, f"head.blocks.{layer}.0", 1e-5))
        x = x + linear(y, state, f"head.blocks.{layer}.2")
    return linear(gelu(norm(x, state, "head.final.0", 1e-5)), state, "head.final.2")


def plain_tips(image: Tensor) -> Tensor:
    """Features (L, W_) of TIPSv2's values."""
    state, image = visual_state("tips"), normalised(image, "tips")
    grid = (image.shape[1] // 14, image.shape[2] // 14)
    x = patches(image, state["trunk.patch_embed.proj.weight"], 14) + state["trunk.patch_embed.proj.bias"]
    table = state["trunk.pos_embed"][0]
    if grid != (4, 4):
        square = table.T.unflatten(1, (4, 4))[None].float()
        around = F.interpolate(square, grid, mode="bicubic", antialias=True)[0]
        table = around.flatten(1).T.double()
    x = torch.cat([state["trunk.cls_token"][0], state["trunk.reg_token"][0], x + table])
    for layer in range(LAYERS):
        x = block(x, state, f"trunk.blocks.{layer}", values_alone if layer == LAYERS - 1 else usual)
    return norm(x, state, "trunk.norm", 1e-6)[2:]


def cosines(features: Tensor, grid: tuple[int, int]) -> Tensor:
    rows = classifier(features.shape[1]).embeddings.double()
    return (unit(features) @ rows.T).T.unflatten(1, grid)


def plain_cosines(kind: str, image: Tensor) -> Tensor:
    side = {"radio": 16, "tips": 14}[kind]
    grid = (image.shape[1] // side, image.shape[2] // side)
    return cosines(plain_head(plain_radio(image)) if kind == "radio" else plain_tips(image), grid)


# --- parity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("kind", "side"), [("radio", 16), ("tips", 14)])
def test_parity(kind: str, side: int, grid: tuple[int, int]) -> None:
    images = photographs(grid[0] * side, grid[1] * side)
    expected = torch.stack([plain_cosines(kind, image) for image in images])
    assert relative(labeller(kind).grid_scores(images), expected) < 1e-10
    mean, std = (torch.tensor(each, dtype=torch.float64)[:, None, None] for each in SEEDED[kind][1:])
    encoder = labeller(kind).encoder
    with torch.inference_mode():
        together = encoder.embedded(encoder((images.double() / 255 - mean) / std).features)  # type: ignore[misc]
    single = torch.stack([cosines(each.flatten(1).T, grid) for each in together])
    assert relative(single, expected) < 1e-10, "of a batch at once"
    rough = labeller(kind, torch.float32).grid_scores(images)
    assert rough.dtype == torch.float32 and relative(rough, expected) < 1e-5


def test_features_of_windows_are_averaged_before_they_are_gathered() -> None:
    image = photographs(80, 112, batch=1)[0]
    total, count = torch.zeros(5, 7, WIDTH, dtype=torch.float64), torch.zeros(5, 7, 1)
    for y in (0, 1):
        for x in (0, 2, 3):
            part = plain_radio(image[:, 16 * y : 16 * y + 64, 16 * x : 16 * x + 64])
            total[y : y + 4, x : x + 4] += part.unflatten(0, (4, 4))
            count[y : y + 4, x : x + 4] += 1
    expected = cosines(plain_head((total / count).flatten(0, 1)), (5, 7))
    model = labeller("radio", window=64, window_stride=32, windows="splice")
    assert relative(model.grid_scores(image[None])[0], expected) < 1e-10
    whole = labeller("radio", window=128, window_stride=64, windows="splice").grid_scores(image[None])
    assert relative(whole, labeller("radio").grid_scores(image[None])) < 1e-12, "one window is the image"


def test_windows_of_tips() -> None:
    image = photographs(70, 98, batch=1)[0]
    expected, count = torch.zeros(6, 70, 98, dtype=torch.float64), torch.zeros(70, 98)
    for y in (0, 14):
        for x in (0, 28, 42):
            part = plain_cosines("tips", image[:, y : y + 56, x : x + 56])
            expected[:, y : y + 56, x : x + 56] += F.interpolate(part[None], (56, 56), mode="bilinear")[0]
            count[y : y + 56, x : x + 56] += 1
    model = labeller("tips", window=56, window_stride=28, windows="pixels")
    assert relative(model.grid_scores(image[None])[0], expected / count) < 1e-10


@pytest.mark.parametrize("kind", ["radio", "tips"])
@pytest.mark.parametrize("size", [(50, 70), (7, 3), (61, 130)])
def test_any_size(kind: str, size: tuple[int, int]) -> None:
    model = labeller(kind)
    scores = model.grid_scores(photographs(*size, batch=1))
    side = model.encoder.stride
    assert scores.shape[2:] == (-(-size[0] // side), -(-size[1] // side))
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("kind", ["radio", "tips"])
def test_bf16_labels(kind: str) -> None:
    clip = small(kind, torch.bfloat16)
    reading = MaskClipSettings(head=READINGS[kind], image_stats="clip", profile="weights")
    image = photographs(112, 112, batch=1)[0]
    found, _ = MaskClip(clip, classifier(clip.embed_dim), reading).label(image)
    assert found.shape == (112, 112)


# --- words --------------------------------------------------------------------------------------------------


def plain_tips_text(tokens: list[int]) -> Tensor:
    """Embedding (W_,) of one prompt, without any padding."""
    state = {name: t.double() for name, t in small("tips").model.text.state_dict().items()}
    x = state["token_embedding.weight"][tokens] * math.sqrt(WIDTH)
    for place in range(len(tokens)):
        for i in range(WIDTH // 2):
            angle = place * 10_000 ** (-i / (WIDTH // 2 - 1))
            x[place, i] += math.sin(angle)
            x[place, i + WIDTH // 2] += math.cos(angle)
    for layer in range(2):
        name = f"blocks.{layer}"
        y = norm(x, state, f"{name}.norm1", 1e-5)
        packed = y @ state[f"{name}.self_attn.in_proj_weight"].T + state[f"{name}.self_attn.in_proj_bias"]
        q, k, v = (by_head(part) for part in packed.chunk(3, 1))
        x = x + usual(q, k, v, lambda o, name=name: linear(o, state, f"{name}.self_attn.out_proj"))
        y = linear(norm(x, state, f"{name}.norm2", 1e-5), state, f"{name}.linear1").clamp(min=0)
        x = x + linear(y, state, f"{name}.linear2")
    return norm(x, state, "ln_final", 1e-5).mean(0)


def test_parity_of_words_of_tips() -> None:
    prompts = [[3, 5, 7], [9], [4, 4, 8, 21, 50, 2, 1]]
    tokens = torch.zeros(3, 16, dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    expected = torch.stack([plain_tips_text(prompt) for prompt in prompts])
    with torch.inference_mode():
        assert relative(small("tips").model.encode_text(tokens), expected) < 1e-10  # type: ignore[operator]
        assert relative(small("tips", torch.float32).model.encode_text(tokens), expected) < 1e-5  # type: ignore[operator]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece vocabulary, as TIPSv2's tokenizer.model is one."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "words.txt").write_text("a photo of a cat.\nitap of a dog.\nart of the large cow.\n" * 5)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "words.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=21,
        pad_id=0, unk_id=1, bos_id=-1, eos_id=-1, minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


def published_names(kind: str) -> dict[str, Tensor]:
    """The seeded tensors under the names of the published files."""
    state = {name: t.float() for name, t in small(kind).model.state_dict().items()}
    if kind == "radio":
        theirs = {"_heads.siglip2-g." + name.removeprefix("visual.head."): t for name, t in state.items()
                  if name.startswith("visual.head.")}  # fmt: skip
        for name, tensor in state.items():
            if name.startswith("visual.trunk.blocks."):
                theirs[name.replace("visual.trunk.", "base_model.")] = tensor
        generator = "base_model.patch_generator."
        weight = state["visual.trunk.embeds.proj.weight"].unflatten(1, (16, 16, 3)).permute(0, 3, 1, 2)
        theirs[f"{generator}embedder.weight"] = weight.flatten(1).contiguous()
        theirs[f"{generator}pos_embed"] = state["visual.trunk.embeds.pos_embed"].flatten(1, 2)
        theirs[f"{generator}cls_token.token"] = torch.cat(
            [state["visual.trunk.embeds.cls_token"][0], state["visual.trunk.embeds.reg_token"][0]]
        )
        return theirs
    theirs = {}
    for name, tensor in state.items():
        if name.startswith("text."):
            name = name.replace("text.blocks.", "text.transformer.resblocks.")
            for ours, other in TIPS_NAMES.items():
                name = name.replace(f".{ours}", f".{other}")
            theirs[name.replace("text.", "text_encoder.", 1)] = tensor
        elif name.startswith("visual.trunk."):
            theirs[name.replace("visual.trunk.", "vision_encoder.")] = tensor
    theirs["vision_encoder.register_tokens"] = theirs.pop("vision_encoder.reg_token")
    table = theirs["vision_encoder.pos_embed"]
    first = 0.1 * torch.ones_like(table[:, :1])
    theirs["vision_encoder.pos_embed"] = torch.cat([first, table], 1)
    theirs["vision_encoder.cls_token"] = theirs["vision_encoder.cls_token"] - first
    theirs["vision_encoder.mask_token"] = torch.zeros(1, WIDTH)
    theirs["text_encoder.temperature"] = torch.tensor(0.01)
    return theirs


def test_files_of_tips(tmp_path: Path, pieces: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(published_names("tips"), file)
    (tmp_path / "tokenizer.model").write_bytes(pieces.read_bytes())
    stored = load_source(source("tips", file))
    image = photographs(70, 98)
    reading = MaskClipSettings(image_stats="clip", profile="weights")
    found = MaskClip(stored, classifier(WIDTH), reading).grid_scores(image)
    expected = labeller("tips", torch.float32).grid_scores(image)
    assert relative(found, expected.double()) < 1e-5
    embedded = stored.encode_text(["A photo of a cat.", "art of the cow"])
    tokens = stored.tokenize(["a photo of a cat.", "art of the cow"])
    with torch.inference_mode():
        own = F.normalize(small("tips", torch.float32).model.encode_text(tokens), dim=-1)  # type: ignore[operator]
    assert relative(embedded, own.double()) < 1e-5
    alone = load_source(source("tips", file), towers="text")
    assert relative(alone.encode_text(["art of the cow"]), embedded[1:].double()) < 1e-5
    with pytest.raises(MaskMillError, match="reads 16"):
        stored.tokenize(["a photo of a cat. " * 9])


def test_files_of_radio(tmp_path: Path) -> None:
    file = tmp_path / "c-radio.safetensors"
    theirs = published_names("radio")
    save_file(theirs, file)
    image = photographs(80, 112)
    reading = MaskClipSettings(head="radseg", image_stats="clip", profile="weights")
    stored = load_source(source("radio", file), towers="visual")
    # A C-RADIO's patches have no bias, which timm's module has.
    assert isinstance(stored.visual, TimmTower) and not stored.visual.trunk.embeds.proj.bias.any()
    stored.visual.trunk.embeds.proj.bias += small("radio").visual.trunk.embeds.proj.bias.float()
    found = MaskClip(stored, classifier(D), reading).grid_scores(image)
    assert relative(found, labeller("radio", torch.float32).grid_scores(image).double()) < 1e-5

    for name, says in (
        ("_heads.dino_v3.", "its heads: dino_v3"),
        ("heads.", "nor any other"),
    ):
        other = {key.replace("_heads.siglip2-g.", name): t for key, t in theirs.items()}
        save_file(other, file)
        with pytest.raises(MaskMillError, match=says) as caught:
            load_source(source("radio", file), towers="visual")
        assert caught.value.code == "weights_do_not_fit"
    save_file(theirs, file)
    with pytest.raises(MaskMillError, match="leads to 32 channels"):
        load_clip("C-RADIOv3-B", str(file), towers="visual")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(MaskMillError) as caught:
        load_source(source("radio", file), towers="visual")
    assert caught.value.code == "model_damaged"


def test_text_tower_of_radio_is_in_open_clips_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, published_file = tmp_path / "c-radio.safetensors", tmp_path / "open_clip_model.safetensors"
    save_file(published_names("radio"), own)
    state = {name: t.float() for name, t in small("radio").model.state_dict().items() if "text." in name}
    save_file(
        {**state, "visual.trunk.pos_embed": torch.zeros(1), "logit_scale": torch.zeros(())}, published_file
    )
    monkeypatch.setattr(hub, "reachable", lambda host: False)
    with pytest.raises(MaskMillError, match=published.SIGLIP2) as caught:
        siglip2_weights(str(tmp_path))
    assert caught.value.code == "weights_missing"
    # The file is not here: it has gigabytes.
    monkeypatch.setattr("models.clip.towers.modules.siglip2_weights", lambda: published_file)
    tokens = torch.tensor([[3, 4, 1, 0, 0, 0, 0, 0]])
    for towers in ("text", "both"):
        stored = load_source(source("radio", own), towers=towers)  # type: ignore[arg-type]
        with torch.inference_mode():
            found, expected = (each.model.encode_text(tokens) for each in (stored, small("radio")))  # type: ignore[operator]
        assert relative(found, expected) < 1e-5


def test_words_of_radio(tmp_path: Path) -> None:
    """SigLIP2's text tower is open_clip's, its vocabulary Hugging Face's: here a small one on disk."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "photo": 4, "of": 5, "cat": 6}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    config = {**RADIO, "text_cfg": {**RADIO["text_cfg"], "hf_tokenizer_name": str(tmp_path)}}
    named = WeightSource("small-radio", "random:5", config, None, 5, OPENAI_MEAN, OPENAI_STD)
    clip = load_source(named, towers="text")
    assert clip.tokenize(["A photo, of a CAT."])[0].tolist() == [3, 4, 5, 3, 6, 1, 0, 0]
    assert clip.encode_text(["a cat", "a photo"]).shape == (2, D)
    assert torch.equal(clip.encode_text(["A cat!"]), clip.encode_text(["a cat"]))
    with pytest.raises(MaskMillError, match="has 10 tokens"):
        clip.tokenize(["a photo of a photo of a a cat"])


# --- by name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", published.NAMES)
def test_every_name_is_built(name: str) -> None:
    """On the meta device, which takes no memory: trunk and head, and how many blocks they have."""
    from models.clip.towers.modules import build

    found = find_weights(name, "random:0")
    assert json.dumps(found.config)
    model = build(found)
    text, head = found.config["embed_dim"], model.visual.head
    assert list(head.parameters())[-1].shape == (text,) if name in published.RADIO else True
    assert model.visual.patch_size[0] == (16 if name in published.RADIO else 14)


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        ("radio", {"head": "maskclip"}, "head=radseg; there is nothing for head=maskclip"),
        ("tips", {"head": "nn"}, "head=maskclip; there is nothing for head=nn"),
        ("tips", {"profile": "reference"}, "profile=reference"),
        ("tips", {"positions": "offset"}, "positions=offset"),
        ("tips", {"ks_threshold": 1.0}, "ks_threshold"),
        ("tips", {"classes": {"candidates": 3}}, "candidates"),
        ("tips", {"classes": {"ambiguous_above": 0.7}}, "ambiguous_above"),
    ],
    ids=str,
)
def test_what_a_tower_is_not_read_with(kind: str, settings: dict[str, Any], says: str) -> None:
    clip = small(kind)
    reading = MaskClipSettings(**{"profile": "weights", **settings})
    with pytest.raises(MaskMillError, match=says) as caught:
        MaskClip(clip, classifier(clip.embed_dim), reading)
    assert caught.value.code == "setting_invalid"
    with pytest.raises(MaskMillError, match="with the head"):
        dense_encoder(clip.visual, head="plain")


def test_radseg_is_of_c_radio_and_sees_whole_images() -> None:
    assert HEADS["radseg"].tower == "radio" and not HEADS["radseg"].alone
    with pytest.raises(MaskMillError, match="never sees it"):
        MaskClipSettings(head="radseg", window=336, window_stride=224)
    with pytest.raises(MaskMillError, match="--recipe radseg"):
        published.check_reading("ViT-B-16", {}, MaskClipSettings(head="radseg"))


@pytest.mark.parametrize(
    ("name", "pretrained", "says"),
    [
        ("C-RADIOv4-SO400M", None, "docs/heads.md"),
        ("C-RADIOv4-H", "nowhere.safetensors", "no .safetensors file nowhere"),
        ("TIPSv2-L-14", "model.npz", "no .safetensors file model.npz"),
    ],
)
def test_weights_that_are_not_here(name: str, pretrained: str | None, says: str) -> None:
    with pytest.raises(MaskMillError, match=says) as caught:
        load_clip(name, pretrained)
    assert caught.value.code == "weights_missing"
