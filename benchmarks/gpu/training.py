"""Item 5: training with the data path that users run, against the bare step on a fixed batch."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, random_text
from benchmarks.training_ingest import make_table
from models.device import DTYPES
from models.settings import ClipSegConfig, StudentConfig
from models.student.deeplab import DeepLab
from pipeline.ontology.reading import load_ontology
from pipeline.training.clipseg.recipes import CLIPSEG_RECIPES, PromptModel
from pipeline.training.clipseg.sources.table import open_table_source
from pipeline.training.clipseg.task import ClipSegTask, build_model
from pipeline.training.clipseg.triplets import TripletSamples, TripletSettings
from pipeline.training.loop.driver import train
from pipeline.training.loop.optimisation import make_optimizer
from pipeline.training.loop.protocols import Samples, Task
from pipeline.training.loop.resources import plan_in_process
from pipeline.training.loop.settings import LoopSettings
from pipeline.training.maskclip_plus.recipes import SelfTrainSettings
from pipeline.training.maskclip_plus.task import MaskClipPlus
from pipeline.training.samples.augment import AugmentSettings
from pipeline.training.samples.table import open_table_samples

TARGET = 0.9
ONTOLOGY = load_ontology("toyworld")


def run(bench: Bench) -> None:
    """Samples a second of both tasks."""
    with tempfile.TemporaryDirectory(prefix="maskmill-gpu-") as scratch:
        table = Path(scratch) / "table"
        table.mkdir()
        make_table(table, 8 if bench.toy else 256, 64 if bench.toy else 512)
        for name, make_task, samples, settings in tasks(bench, str(table)):
            if bench.left() < 30 and not bench.toy:
                bench.add(name, "left out: no time left")
                continue
            bare, memory = bare_rate(bench, make_task, samples, settings)
            bench.add(f"{name}: bare step", f"{bare:.1f} samples/s{memory}")
            # As many updates as fit into a third of what is left.
            updates = 4 if bench.toy else int(max(10, bench.left() / 3 * bare / settings.batch_size))
            settings = settings.replace(
                iterations=updates, log_every=max(1, updates // 4), checkpoint_every=updates
            )
            rate, wait = loop_rate(make_task, samples, settings, Path(scratch) / name.split()[0])
            value = f"{rate:.1f} samples/s, waiting for samples {wait:.0%} of the time"
            bench.add(f"{name}: training", value, rate / bare, "bare step", TARGET)


def tasks(bench: Bench, table: str) -> list[tuple[str, Callable[[], Task], Samples, LoopSettings]]:
    """Name, task, samples and settings of MaskCLIP+ and CLIPSeg."""
    toy = bench.toy
    side = 64 if toy else 512
    student = StudentConfig(decoder="light", backbone="light") if toy else StudentConfig()
    augment = AugmentSettings(scale=(2048, side), crop=(side, side))
    text = random_text(student.embed_dim, ONTOLOGY.num_classes)
    precision: Literal["fp32", "bf16"] = "fp32" if toy else "bf16"
    selftrain = SelfTrainSettings(guided=(1, -1), self_train=(-1, -1))
    prompt = PromptModel(clip="ViT-B-16-quickgelu:random:0")
    if toy:
        prompt = PromptModel(clip="toyclip:bundled", decoder=ClipSegConfig(extract_layers=(0, 1, 2)))
    triplets = TripletSettings(size=64, support_size=64) if toy else TripletSettings()
    return [
        (
            f"MaskCLIP+ {student.decoder} {student.backbone} at {side}",
            lambda: MaskClipPlus(ONTOLOGY.names, selftrain, lambda: DeepLab(student, text)),
            open_table_samples(table, ontology=ONTOLOGY, augment=augment),
            LoopSettings(iterations=1, batch_size=2 if toy else 16, precision=precision),
        ),
        (
            f"CLIPSeg at {triplets.size}",
            lambda: ClipSegTask(functools.partial(build_model, prompt)),
            TripletSamples(open_table_source(table, ontology=ONTOLOGY), triplets),
            CLIPSEG_RECIPES.recipes["clipseg-phrasecut-plus"].loop.replace(
                batch_size=2 if toy else 64, precision=precision
            ),
        ),
    ]


def bare_rate(
    bench: Bench, make_task: Callable[[], Task], samples: Samples, settings: LoopSettings
) -> tuple[float, str]:
    """Samples/s of forward, backward and update on one batch that is on the device, and peak memory."""
    step = bare_step(bench.device, make_task, samples, settings)
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = bench.device.type == "cuda"
    try:
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rate = settings.batch_size / bench.seconds(step)
    finally:
        torch.backends.cudnn.benchmark = before
    if bench.device.type != "cuda":
        return rate, ""
    return rate, f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"


def bare_step(
    device: torch.device, make_task: Callable[[], Task], samples: Samples, settings: LoopSettings
) -> Callable[[], object]:
    """One update on a fixed batch."""
    torch.manual_seed(0)
    task = make_task()
    module = task.build(device)
    if device.type == "cuda":
        module = module.to(memory_format=torch.channels_last)
    optimizer = make_optimizer([p for p in module.parameters() if p.requires_grad], settings)
    chosen = np.resize(samples.order(0, 0), settings.batch_size).tolist()
    loaded = [samples.load(index, np.random.default_rng(index)) for index in chosen]
    batch: dict[str, Tensor] = {}
    for name in loaded[0]:
        column = torch.from_numpy(np.stack([sample[name] for sample in loaded]))
        batch[name] = column if name in task.host_columns else column.to(device)

    def step() -> None:
        enabled = settings.precision != "fp32"
        with torch.autocast(device.type, DTYPES[settings.precision], enabled=enabled):
            loss, _ = task.loss(module, batch, 1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        task.after_step(1)

    return step


def loop_rate(
    make_task: Callable[[], Task], samples: Samples, settings: LoopSettings, output: Path
) -> tuple[float, float]:
    """Samples/s of the training loop, and the share of the time that it waits for samples."""
    compute = plan_in_process(0)
    assert compute is not None
    outcome = train(
        make_task, samples, settings, output=output, compute=compute, report=lambda line: None,
        notice=lambda text: print(text, flush=True),
    )  # fmt: skip
    return outcome.samples_per_second or float("nan"), outcome.data_wait or 0.0
