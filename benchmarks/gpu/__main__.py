"""The command line of ``python -m benchmarks.gpu``."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchmarks.gpu

ROOT = Path(__file__).resolve().parents[2]
SECONDS = {
    "waits": 40, "correctness": 60, "labels": 60, "forward": 130, "job": 150, "training": 110, "clipseg": 40,
}  # fmt: skip
"""Time limits in seconds, in the order in which the items run: 590 in all, if none ends early."""
RETRAIN_SECONDS = 900
GRACE = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run the items; 1 if one failed, 2 for wrong use."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=benchmarks.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("gpu-results.md"), help="Markdown file to write")
    parser.add_argument("--only", nargs="+", choices=list(SECONDS), default=list(SECONDS), help="these items")
    parser.add_argument("--retrain", action="store_true", help="also train the bundled CLIP, for 15 minutes")
    parser.add_argument("--toy", action="store_true", help="tiny models, on any machine")
    parser.add_argument("--item", choices=[*SECONDS, "retrain"], help=argparse.SUPPRESS)  # in a subprocess
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.item:
        run_item(arguments.item, arguments.rows, arguments.seconds, toy=arguments.toy)
        return 0
    import torch

    if not torch.cuda.is_available() and not arguments.toy:
        print("There is no CUDA device here. Add --toy to try this script on a CPU.", file=sys.stderr)
        return 2
    # A machine for a toy run may be slow and busy.
    patience = 4 if arguments.toy else 1
    limits = {name: patience * SECONDS[name] for name in SECONDS if name in arguments.only}
    if arguments.retrain:
        limits["retrain"] = RETRAIN_SECONDS
    report = Report(arguments.output, argv)
    failed = False
    for item, limit in limits.items():
        rows, fault = in_subprocess(item, limit, toy=arguments.toy)
        failed |= bool(fault)
        report.add(item, rows, fault)
    print(report.text)
    return int(failed)


def run_item(item: str, rows: Path, seconds: float, *, toy: bool) -> None:
    """Measure one item in this process."""
    from benchmarks.gpu.bench import Bench

    importlib.import_module(f"benchmarks.gpu.{item}").run(Bench(item, rows, seconds, toy=toy))


def in_subprocess(item: str, limit: float, *, toy: bool) -> tuple[list[dict[str, Any]], str]:
    """The rows of an item, and what went wrong (empty: nothing). It is killed if it overruns."""
    began = time.monotonic()
    print(f"{item}, at most {limit} s", flush=True)
    with tempfile.TemporaryDirectory(prefix="maskmill-gpu-") as scratch:
        rows = Path(scratch) / "rows.jsonl"
        rows.touch()
        command = [
            sys.executable, "-m", "benchmarks.gpu", "--item", item, "--rows", str(rows), "--seconds",
            str(limit - GRACE), *(["--toy"] if toy else []),
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "off"}
        fault = ""
        # A session of its own, so that what the item started ends with it.
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                _, told = process.communicate(timeout=limit)
                if process.returncode:
                    last = next((line for line in reversed(told.splitlines()) if line.strip()), "no message")
                    fault = f"ended with status {process.returncode}: {last.strip()[:200]}"
                    print(told, file=sys.stderr, flush=True)
            except subprocess.TimeoutExpired:
                fault = f"took longer than {limit} s and was ended"
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            if fault.startswith("took"):
                os.killpg(process.pid, signal.SIGKILL)
        found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    print(
        f"{item}: {len(found)} rows in {time.monotonic() - began:.0f} s{fault and ', ' + fault}", flush=True
    )
    return found, fault


class Report:
    """The output file, written again after each item.

    Args:
        path: the Markdown file; the JSON lies beside it.
        argv: the command's arguments, None for those of this process.
    """

    def __init__(self, path: Path, argv: Sequence[str] | None) -> None:
        from benchmarks.label_job import processor, versions

        self._path = path
        given = sys.argv[1:] if argv is None else argv
        self._about = {
            "hardware": f"{processor()}, {len(os.sched_getaffinity(0))} CPU cores",
            "versions": f"Python {sys.version.split()[0]}, {versions()}",
            "command": " ".join(["python -m benchmarks.gpu", *given]),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        }
        self._rows: list[dict[str, Any]] = []
        self._faults: dict[str, str] = {}

    def add(self, item: str, rows: list[dict[str, Any]], fault: str) -> None:
        """Add what an item found, and write the files."""
        self._rows += rows
        if fault:
            self._faults[item] = fault
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(self.text, encoding="utf-8")
        record = {**self._about, "faults": self._faults, "rows": self._rows}
        self._path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @property
    def text(self) -> str:
        """The Markdown: what was run on what, and the table."""
        lines = [f"- {name}: {value}" for name, value in self._about.items()]
        lines += [f"- **{item} {fault}**" for item, fault in self._faults.items()]
        lines += ["", "| item | what | value | ratio | to | target |", "|---|---|---|---|---|---|"]
        for row in self._rows:
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.3g}"
            target = ""
            if row["target"] is not None:
                met = "met" if row["ratio"] is not None and row["ratio"] >= row["target"] else "**missed**"
                target = f"≥ {row['target']:g}: {met}"
            lines.append(
                f"| {row['item']} | {row['what']} | {row['value']} | {ratio} | {row['to']} | {target} |"
            )
        return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
