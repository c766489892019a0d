"""The command ``maskmill``. Exit status: 0 done, 1 failed work, 2 wrong use, 130 interrupted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated

import tyro
from tyro.conf import subcommand

from jobs.benchmark import Benchmark
from jobs.demo import Demo
from jobs.evaluate import Evaluate
from jobs.export import Export
from jobs.label import Label
from jobs.lists import Datasets, Recipes
from jobs.options import FLAT
from jobs.report import Report
from jobs.runs import Runs
from jobs.segment import Segment
from jobs.serve import Serve
from jobs.show import Show
from jobs.track import Track
from jobs.train.clipseg import TrainClipSeg
from jobs.train.maskclip_plus import TrainMaskClipPlus
from models.errors import MaskMillError
from pipeline.cluster.signals import end_process, interrupt_on_signals


@dataclass(frozen=True)
class Train:
    """Train a model on labels, on this machine or a Ray cluster."""

    model: Annotated[
        Annotated[TrainMaskClipPlus, subcommand("maskclip-plus")]
        | Annotated[TrainClipSeg, subcommand("clipseg")],
        FLAT,
    ]

    def run(self) -> int:
        """Train it."""
        return self.model.run()


Command = (
    Annotated[Label, subcommand("label")]
    | Annotated[Show, subcommand("show")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Segment, subcommand("segment")]
    | Annotated[Serve, subcommand("serve")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Benchmark, subcommand("benchmark")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Runs, subcommand("runs")]
    | Annotated[Track, subcommand("track")]
    | Annotated[Datasets, subcommand("datasets")]
    | Annotated[Recipes, subcommand("recipes")]
    | Annotated[Demo, subcommand("demo")]
)


def parse(arguments: Sequence[str]) -> Command:
    """The command that the arguments name; ends the process with 2 if they name none, with 0 after a help."""
    command: Command = tyro.cli(
        Command,
        prog="maskmill",
        description="Images and class names in; a segmentation dataset and a trained model out.",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.OmitSubcommandPrefixes),
    )
    return command


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; ends the process with the exit status, and takes Ctrl-C and SIGTERM for it."""
    interrupt_on_signals()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:
        print(f"maskmill {version('maskmill')}")
        end_process(0)
    try:
        status = parse(given).run()
    except MaskMillError as error:
        print(f"maskmill: {error}", file=sys.stderr)
        status = error.exit_status
    except KeyboardInterrupt:
        print("Stopped. What is finished is kept: the same command goes on from there.", file=sys.stderr)
        status = 130
    end_process(status)


if __name__ == "__main__":
    main()
