"""Backbones against torchvision's ResNet, and their weights in every layout that is around."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from models.errors import MaskMillError
from models.student import backbones
from models.student.backbones import BACKBONES, PRETRAINED, build_backbone, load_weights

State = dict[str, Tensor]


def build(name: str, seed: int = 0) -> nn.Module:
    """With batch norms that differ from the identity, so that no branch can be forgotten."""
    torch.manual_seed(seed)
    return perturb(build_backbone(name, width=8, depth=2)[0]).eval()


def perturb(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.3, 0.7)
            nn.init.normal_(part.bias, 0.0, 0.1)
            nn.init.normal_(part.running_mean, 0.0, 0.1)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
    return module


@pytest.fixture(scope="module")
def resnet50c() -> nn.Module:
    return build("resnet50c")


# --- what they compute --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "blocks"), [("resnet50c", (3, 4, 6, 3)), ("resnet101c", (3, 4, 23, 3))])
def test_strides_and_dilations_are_the_reference_s(name: str, blocks: tuple[int, ...]) -> None:
    net = build(name)
    stages = [getattr(net, f"layer{i}") for i in range(1, 5)]
    assert tuple(len(stage) for stage in stages) == blocks
    for stage, stride, first, dilation in zip(stages, (1, 2, 1, 1), (1, 1, 1, 2), (1, 1, 2, 4), strict=True):
        convs = [block.conv2 for block in stage]
        assert [conv.stride for conv in convs] == [(stride,) * 2] + [(1, 1)] * (len(convs) - 1)
        assert [conv.dilation for conv in convs] == [(first,) * 2] + [(dilation,) * 2] * (len(convs) - 1)
        assert all(conv.padding == conv.dilation for conv in convs)
        assert all(block.conv1.stride == (1, 1) for block in stage)
    stem = [part for part in net.conv1.modules() if isinstance(part, nn.Conv2d)]
    assert [(conv.out_channels, conv.stride[0]) for conv in stem] == [(32, 2), (32, 1), (64, 1)]


@pytest.mark.parametrize("name", ["resnet50c", "light"])
@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 7), (1, 1)])
def test_grids_are_quarters_and_eighths_rounded_up(
    name: str, size: tuple[int, int], resnet50c: nn.Module
) -> None:
    net = resnet50c if name == "resnet50c" else build(name)
    _, channels = build_backbone(name, width=8, depth=2)
    with torch.inference_mode():
        maps = net(torch.randn(1, 3, *size))
    for found, stride, width in zip(maps, (4, 8), channels, strict=True):
        assert found.shape == (1, width, -(-size[0] // stride), -(-size[1] // stride))


@pytest.mark.slow
def test_resnet50_is_torchvision_s_with_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(3)
    other = perturb(torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])).eval()
    torch.save(other.state_dict(), tmp_path / "resnet50.pth")
    net = build("resnet50")
    load_weights(net, "resnet50", tmp_path / "resnet50.pth")
    x = torch.randn(1, 3, 50, 71, dtype=torch.float64)
    net, other = net.double(), other.double()
    with torch.inference_mode():
        low, high = net(x)
        expected = other.layer1(other.maxpool(other.relu(other.bn1(other.conv1(x)))))
        torch.testing.assert_close(low, expected, rtol=0, atol=1e-10)
        expected = other.layer4(other.layer3(other.layer2(expected)))
        torch.testing.assert_close(high, expected, rtol=0, atol=1e-10)
    assert high.std() > 0.01


def test_width_and_depth_of_the_light_one_do_what_they_say() -> None:
    def count(width: int, depth: int) -> int:
        return sum(p.numel() for p in build_backbone("light", width=width, depth=depth)[0].parameters())

    per_block = 9 * 64**2 + 2 * 64
    assert count(16, 4) - count(16, 3) == per_block
    assert 3.5 < count(32, 3) / count(16, 3) < 4


# --- their weights ------------------------------------------------------------------------------------------


def with_head(state: State) -> State:
    return {**state, "fc.weight": torch.zeros(10, 2048), "fc.bias": torch.zeros(10)}


def old(state: State) -> State:
    return {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}


def mmcv(state: State) -> State:
    """The names of OpenMMLab: a sequential stem of conv, norm, ReLU, three times."""
    names = {"conv1.0": "stem.0", "conv1.1": "stem.1", "conv1.3": "stem.3", "conv1.4": "stem.4",
             "conv1.6": "stem.6", "bn1": "stem.7"}  # fmt: skip
    pattern = re.compile(r"^(conv1\.\d|bn1)(?=\.)")
    return {pattern.sub(lambda match: names[match[1]], key): tensor for key, tensor in state.items()}


def segmentor(state: State) -> State:
    head = {"decode_head.conv_seg.weight": torch.zeros(3), "auxiliary_head.convs.0.bn.bias": torch.zeros(3)}
    return {**{f"backbone.{key}": tensor for key, tensor in mmcv(state).items()}, **head}


LAYOUTS: dict[str, tuple[str, Callable[[State], object]]] = {
    "timm": (".safetensors", lambda state: state),
    "with a head": (".pth", with_head),
    "no counters": (".safetensors", old),
    "OpenMMLab": (".pth", lambda state: {"meta": {"epoch": 3}, "state_dict": with_head(mmcv(old(state)))}),
    "segmentor": (".pth", lambda state: {"state_dict": segmentor(state)}),
    "data parallel": (".pth", lambda state: {f"module.{key}": tensor for key, tensor in state.items()}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_network(layout: str, tmp_path: Path, resnet50c: nn.Module) -> None:
    suffix, change = LAYOUTS[layout]
    path = tmp_path / f"weights{suffix}"
    state = resnet50c.state_dict()
    content = change(state)
    if suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    net = build("resnet50c", seed=1)
    load_weights(net, "resnet50c", path)
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: {k: t for k, t in s.items() if k != "layer3.2.conv1.weight"},
            "1 missing (layer3.2.conv1.",
        ),
        (lambda s: {k: t for k, t in s.items() if k != "bn1.running_var"}, "1 missing (bn1.running_var)"),
        (lambda s: {**s, "layer4.3.conv1.weight": torch.zeros(1)}, "1 unexpected (layer4.3.conv1.weight)"),
        (lambda s: {**s, "conv1.0.weight": torch.zeros(32, 3, 7, 7)}, "1 misshapen (conv1.0.weight)"),
    ],
    ids=["missing", "missing statistics", "unexpected", "misshapen"],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(
    change: Callable[[State], State], words: str, tmp_path: Path, resnet50c: nn.Module
) -> None:
    save_file(change(resnet50c.state_dict()), tmp_path / "w.safetensors")
    net = build("resnet50c", seed=1)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(MaskMillError, match=re.escape(words)) as caught:
        load_weights(net, "resnet50c", tmp_path / "w.safetensors")
    assert caught.value.code == "weights_do_not_fit"
    assert "resnet50_v1c" in caught.value.remedy
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


def test_weights_of_another_depth_are_refused(tmp_path: Path, resnet50c: nn.Module) -> None:
    save_file(resnet50c.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(MaskMillError, match=r"layer3\.6"):
        load_weights(build("resnet101c"), "resnet101c", tmp_path / "w.safetensors")


class Evil:
    """Pickled, it would create a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    torch.save({"state_dict": Evil(tmp_path / "pwned")}, tmp_path / "w.pth")
    with pytest.raises(MaskMillError) as caught:
        load_weights(build("light"), "light", tmp_path / "w.pth")
    assert caught.value.code == "model_damaged"
    assert not (tmp_path / "pwned").exists()


def test_none_leaves_the_random_weights() -> None:
    net = build("light")
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    load_weights(net, "light", "none")
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


@pytest.mark.parametrize("source", ["imagenet", "gone.pth"])
def test_there_are_no_weights(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backbones, "reachable", lambda host: False)
    monkeypatch.setattr(backbones, "in_hub_cache", lambda *_: None)
    for name in BACKBONES:
        with pytest.raises(MaskMillError) as caught:
            load_weights(nn.Identity(), name, source if source == "imagenet" else tmp_path / source)
        error = caught.value
        assert error.code == "weights_missing" and "none" in error.remedy
        if source == "imagenet" and name in PRETRAINED:
            assert PRETRAINED[name].repository in error.remedy
            assert all(url in error.remedy for url in PRETRAINED[name].files)
            file = PRETRAINED[name].files[0].rpartition("/")[2]
            assert f"  --set backbone_weights={file}" in error.remedy.splitlines()
        assert "--set backbone_weights=none" in error.remedy


def test_a_cached_file_is_used_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resnet50c: nn.Module
) -> None:
    """The layout of the hub's cache as its client documents it."""
    import huggingface_hub.constants

    folder = tmp_path / "models--timm--resnet50c.gluon_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    save_file(with_head(resnet50c.state_dict()), folder / "snapshots" / "abc" / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr(backbones, "reachable", lambda host: pytest.fail("asked for the network"))
    net = build("resnet50c", seed=1)
    load_weights(net, "resnet50c", "imagenet")
    assert torch.equal(net.layer4[2].conv3.weight, resnet50c.layer4[2].conv3.weight)
