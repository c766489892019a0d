"""The command ``maskmill``. Exit status: 0 done, 1 failed work, 2 wrong use, 3 refused, 130 interrupted."""

from __future__ import annotations

import itertools
import os
import select
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated

import tyro
from tyro.conf import subcommand

from jobs.benchmark import Benchmark
from jobs.demo import Demo
from jobs.evaluate.command import Evaluate
from jobs.export import Export
from jobs.import_ import Import
from jobs.label import Label
from jobs.lists import Datasets, Recipes
from jobs.manifest import MakeManifest
from jobs.memory import MemoryCommand
from jobs.options import FLAT
from jobs.promote import Promote
from jobs.report import Report
from jobs.retrain.command import Retrain
from jobs.review import Review
from jobs.rollback import Rollback
from jobs.runs import Runs
from jobs.segment import Segment
from jobs.serve import Serve
from jobs.show import Show
from jobs.split import MakeSplit
from jobs.stats import ShowStatistics
from jobs.status import ShowStatus
from jobs.submit import Submit, job_apart
from jobs.track import Track
from jobs.train.clipseg import TrainClipSeg
from jobs.train.maskclip_plus import TrainMaskClipPlus
from jobs.verify import Verify
from models.errors import FailedWork, WrongUse, did_you_mean
from pipeline.cluster.signals import end_process, interrupt_on_signals
from pipeline.files.faults import explain, one_line
from pipeline.files.redaction import redact

TRACEBACK = "MASKMILL_TRACEBACK"
"""Environment variable that shows the traceback of an error."""


@dataclass(frozen=True)
class Train:
    """Train a model on labels, on this machine or on a Ray cluster."""

    model: Annotated[
        Annotated[TrainMaskClipPlus, subcommand("maskclip-plus")]
        | Annotated[TrainClipSeg, subcommand("clipseg")],
        FLAT,
    ]

    def run(self) -> int:
        """Train the chosen model."""
        return self.model.run()


Command = (
    Annotated[Label, subcommand("label")]
    | Annotated[MakeManifest, subcommand("manifest")]
    | Annotated[Show, subcommand("show")]
    | Annotated[Review, subcommand("review")]
    | Annotated[Verify, subcommand("verify")]
    | Annotated[ShowStatistics, subcommand("stats")]
    | Annotated[MakeSplit, subcommand("split")]
    | Annotated[MemoryCommand, subcommand("memory")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Import, subcommand("import")]
    | Annotated[Segment, subcommand("segment")]
    | Annotated[Serve, subcommand("serve")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Benchmark, subcommand("benchmark")]
    | Annotated[Retrain, subcommand("retrain")]
    | Annotated[Promote, subcommand("promote")]
    | Annotated[Rollback, subcommand("rollback")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Runs, subcommand("runs")]
    | Annotated[Track, subcommand("track")]
    | Annotated[Datasets, subcommand("datasets")]
    | Annotated[Recipes, subcommand("recipes")]
    | Annotated[Demo, subcommand("demo")]
    | Annotated[Submit, subcommand("submit")]
    | Annotated[ShowStatus, subcommand("status")]
)


COMMANDS = (
    "label",
    "manifest",
    "show",
    "review",
    "verify",
    "stats",
    "split",
    "memory",
    "train",
    "export",
    "import",
    "segment",
    "serve",
    "evaluate",
    "benchmark",
    "retrain",
    "promote",
    "rollback",
    "report",
    "runs",
    "track",
    "datasets",
    "recipes",
    "demo",
    "submit",
    "status",
)
TRAININGS = ("maskclip-plus", "clipseg")
MEMORY_COMMANDS = ("build", "show")


OPTION_OF_ARGUMENT = {
    "label": "--images",
    "evaluate": "--labels",
    "import": "--input",
    "serve": "--model",
    "train maskclip-plus": "--labels",
    "train clipseg": "--labels",
}
"""What an argument of a command that takes none is meant for, most likely."""


def check_command(arguments: Sequence[str]) -> None:
    """Refuse a misspelt command, or an argument without its option, in a sentence.

    The parser would list every option of every command that could be meant.

    Raises:
        WrongUse: ``wrong_use``.
    """
    words = [*itertools.takewhile(lambda word: not word.startswith("-"), arguments)]
    if not words:
        return
    command, known = words[0], [*COMMANDS]
    if command == "train":
        if len(words) == 1 and not {"-h", "--help"} & set(arguments):
            raise WrongUse(
                "wrong_use",
                "maskmill train does not know what to train.",
                "Write maskmill train maskclip-plus, for a student, or maskmill train clipseg.",
            )
        command, known = " ".join(words[:2]), ["train", *(f"train {name}" for name in TRAININGS)]
    if command == "memory":
        if len(words) == 1 and not {"-h", "--help"} & set(arguments):
            raise WrongUse(
                "wrong_use",
                "maskmill memory does not know what to do.",
                "Write maskmill memory build TABLE --output MEMORY, or maskmill memory show MEMORY.",
            )
        command, known = " ".join(words[:2]), ["memory", *(f"memory {name}" for name in MEMORY_COMMANDS)]
    if command not in known:
        raise WrongUse(
            "wrong_use",
            f"There is no command {command}.",
            f"{did_you_mean(command, known)}There are: {', '.join(known)}.",
        )
    argument = words[len(command.split()) :][:1]
    if argument and command in OPTION_OF_ARGUMENT:
        raise WrongUse(
            "wrong_use",
            f"maskmill {command} takes options only, and {argument[0]} stands alone.",
            f"Did you mean {OPTION_OF_ARGUMENT[command]} {shlex.quote(argument[0])}?",
        )


def parse(arguments: Sequence[str]) -> Command:
    """Parse the arguments into a command. Exits with 2 if they are invalid, with 0 after printing help."""
    command: Command = tyro.cli(
        Command,
        prog="maskmill",
        description="Images and class names in; a segmentation dataset and a trained model out. "
        "maskmill COMMAND --help explains a command, maskmill --version prints the version.",
        args=job_apart(arguments),
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.OmitSubcommandPrefixes),
    )
    return command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its status; Ctrl-C and SIGTERM stop it cleanly."""
    interrupt_on_signals()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = run(given)
    except KeyboardInterrupt:
        print("Stopped. Finished work is kept: run the same command again to continue.", file=sys.stderr)
        status = 130
    except BrokenPipeError as error:
        if not stdout_closed():
            end_process(tell(error))
        # Python flushes standard output once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        status = tell(error, detailed=not {"-v", "--verbose"}.isdisjoint(given))
    end_process(status)


def tell(error: Exception, *, detailed: bool = False) -> int:
    """Say on standard error what stopped a command and what to do about it, without secrets.

    The border of every command: no exception leaves it as a traceback, unless that is asked for.

    Args:
        error: what the command raised.
        detailed: show the traceback as well, as ``MASKMILL_TRACEBACK`` does.

    Returns:
        The exit status.
    """
    told = explain(error) or FailedWork(
        "internal",
        f"This is a fault of MaskMill: {type(error).__name__}: {one_line(error)}",
        f"Please report it; -v, or {TRACEBACK}=1 in the environment, shows where it happened.",
    )
    if detailed or os.environ.get(TRACEBACK):
        print(redact("".join(traceback.format_exception(error)), assignments=False), file=sys.stderr)
    print(f"maskmill: {redact(str(told), assignments=False)}", file=sys.stderr)
    return told.exit_status


def run(given: Sequence[str]) -> int:
    """Run a command, and flush its output so that a closed pipe shows here rather than at exit."""
    try:
        if list(given) == ["--version"]:
            print(f"maskmill {version('maskmill')}")
            return 0
        check_command(given)
        command = parse(given)
        if isinstance(command, Submit) and command.job:
            # The job's own parser checks it here, before anything is sent.
            check_command(command.job)
            return command.submit(parse(command.job))
        return command.run()
    finally:
        sys.stdout.flush()


def stdout_closed() -> bool:
    """Whether the reader of standard output is gone (such as ``head``), rather than that of another pipe."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


if __name__ == "__main__":
    main()
