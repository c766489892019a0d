"""The command ``maskmill``. Exit status: 0 done, 1 failed work, 2 wrong use, 3 refused, 130 interrupted."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Annotated, Any, Protocol, Union

import tyro
from tyro.conf import subcommand

from jobs.benchmark import Benchmark
from jobs.border import stdout_closed, tell
from jobs.demo import Demo
from jobs.evaluate.command import Evaluate
from jobs.export import Export
from jobs.import_ import Import
from jobs.label import Label
from jobs.lists import Datasets, Recipes
from jobs.manifest import MakeManifest
from jobs.memory import MemoryCommand
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
from jobs.train.command import Train
from jobs.verify import Verify
from models.errors import WrongUse, did_you_mean
from pipeline.cluster.signals import end_process, interrupt_on_signals


class Command(Protocol):
    """What every command can do."""

    def run(self) -> int:
        """Do the work; the exit status."""


COMMANDS: Mapping[str, type[Command]] = {
    "label": Label,
    "manifest": MakeManifest,
    "show": Show,
    "review": Review,
    "verify": Verify,
    "stats": ShowStatistics,
    "split": MakeSplit,
    "memory": MemoryCommand,
    "train": Train,
    "export": Export,
    "import": Import,
    "segment": Segment,
    "serve": Serve,
    "evaluate": Evaluate,
    "benchmark": Benchmark,
    "retrain": Retrain,
    "promote": Promote,
    "rollback": Rollback,
    "report": Report,
    "runs": Runs,
    "track": Track,
    "datasets": Datasets,
    "recipes": Recipes,
    "demo": Demo,
    "submit": Submit,
    "status": ShowStatus,
}
TRAININGS = ("maskclip-plus", "clipseg")
GROUPS = {
    "train": (
        TRAININGS,
        "maskmill train does not know what to train.",
        "Write maskmill train maskclip-plus, for a student, or maskmill train clipseg.",
    ),
    "memory": (
        ("build", "show"),
        "maskmill memory does not know what to do.",
        "Write maskmill memory build TABLE --output MEMORY, or maskmill memory show MEMORY.",
    ),
}
"""Commands that consist of others; what is said if none of these is given."""
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
    if command in GROUPS:
        members, problem, remedy = GROUPS[command]
        if len(words) == 1 and not {"-h", "--help"} & set(arguments):
            raise WrongUse("wrong_use", problem, remedy)
        command, known = " ".join(words[:2]), [command, *(f"{command} {name}" for name in members)]
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
    kinds: Any = Union[tuple(Annotated[kind, subcommand(name)] for name, kind in COMMANDS.items())]  # noqa: UP007
    command: Command = tyro.cli(
        kinds,
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


if __name__ == "__main__":
    main()
