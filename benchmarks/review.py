"""What a review is worth: a student before it and after it, in the toy world.

A table is labelled by the toy CLIP; a student is trained on it. Then the queue of ``maskmill review`` is gone
through, every image painted from its truth, over HTTP as the page does it; and the same student is trained
again, with these corrections. A third one is trained on as many images that were drawn by chance.

    python -m benchmarks.review --output out/
"""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from rich.console import Console

from benchmarks.toytables import draw_scenes, label_folder
from jobs.evaluate.command import Evaluate
from jobs.options import LabellingModel, Truth
from jobs.review import Review
from jobs.train.maskclip_plus import TrainMaskClipPlus
from jobs.train.run import TrainOptions
from pipeline.evaluation.results import EvaluationResult, read_results
from pipeline.review.desk import encode_page_mask, open_desk
from pipeline.review.queue import read_queue
from pipeline.serving.limits import Limits
from pipeline.serving.review.app import create_review_app
from pipeline.serving.server import make_server
from pipeline.table.corrections import OFF, open_corrections


@dataclass(frozen=True)
class Benchmark:
    """Train before and after a review.

    Attributes:
        output: folder for all that is made.
        images: scenes to label.
        test: other scenes, to measure students on.
        size: of a scene in pixels.
        steps: of a training.
        reviewed: images that are painted.
    """

    output: Path
    images: int = 300
    test: int = 100
    size: int = 128
    steps: int = 400
    reviewed: int = 60
    quiet: Console = field(default_factory=lambda: Console(quiet=True))

    def run(self) -> None:
        """Print a table in Markdown."""
        draw_scenes(self.output, self.images, self.size, seed=11)
        draw_scenes(self.output, self.test, self.size, seed=12, prefix="test-")
        table = label_folder(self.output / "images", self.output / "table")
        rows = [("before", 0, self._student("before", OFF))]
        for name, worst in (("after a review", self.reviewed), ("as many by chance", 0)):
            place = str(self.output / f"{name.replace(' ', '-')}.json")
            corrections = str(self.output / name.replace(" ", "-"))
            Review(
                table=table, worst=worst, random=self.reviewed - worst, output=place, corrections=corrections
            ).run(self.quiet)
            self._paint(place)
            found = open_corrections(table, corrections)
            assert found is not None
            rows.append((name, len(found.files), self._student(name.replace(" ", "-"), corrections)))
        print("| | images painted | mIoU of the student on other scenes |\n|---|---|---|")
        for name, count, miou in rows:
            print(f"| {name} | {count} | {100 * miou:.1f} |")

    def _paint(self, place: str) -> None:
        """Every image of a queue, from its truth."""
        queue = read_queue(place)
        with _served(place) as url:
            for entry in queue.entries:
                truth = np.asarray(Image.open(self.output / "truth" / Path(entry.uri).name))
                mask = base64.b64encode(encode_page_mask(truth)).decode()
                body = {"decision": "painted", "reviewer": "truth", "mask": mask}
                headers = {"Content-Type": "application/json", "If-None-Match": "*"}
                request = urllib.request.Request(
                    f"{url}/api/review/{entry.id}", json.dumps(body).encode(), headers, method="PUT"
                )
                with urllib.request.urlopen(request) as reply:
                    assert reply.status == 200

    def _student(self, name: str, corrections: str) -> float:
        """Train a student, and its mIoU on the other scenes."""
        student = self.output / f"student-{name}"
        TrainMaskClipPlus(
            labels=str(self.output / "table"),
            recipe="toy",
            settings=(f"iterations={self.steps}",),
            corrections=corrections,
            options=TrainOptions(output=str(student), tracking="off"),
        ).run()
        results = self.output / f"results-{name}"
        Evaluate(
            by=LabellingModel(model=str(student)),
            data=Truth(images=str(self.output / "test-images"), truth=str(self.output / "test-truth")),
            ontology="toyworld",
            output=str(results),
            tracking="off",
        ).run()
        found = read_results(results)[0][1]
        assert isinstance(found, EvaluationResult)
        return found.metrics["miou"] or 0.0


@contextmanager
def _served(place: str) -> Iterator[str]:
    limits = Limits(per_minute=0)
    app = create_review_app(open_desk(read_queue(place)), limits)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = make_server(app, limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
