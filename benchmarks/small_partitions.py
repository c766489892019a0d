"""The command with partitions and rounds of so many images: they have 100,000 and more otherwise.

python -m benchmarks.small_partitions 4000 label --images photos/ …
"""

from __future__ import annotations

import functools
import sys

from jobs import label
from jobs.cli import main
from pipeline.cluster.session import make_variables
from pipeline.corpus.manifest import build_corpus

if __name__ == "__main__":
    size = int(sys.argv[1])
    make_variables()  # before Ray, which reads them
    from pipeline.labelling import rounds

    vars(label).update(PARTITION=size, build_corpus=functools.partial(build_corpus, most=size))
    vars(rounds).update(PARTITION=size, ROUND_IMAGES=1)
    main(sys.argv[2:])
