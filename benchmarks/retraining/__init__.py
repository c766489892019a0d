"""Disturb whole retrainings, on real processes, and count what it costs.

    python -m benchmarks.retraining [--cases NAME …] [--times 1] [--seed 0] [--minutes 60] [--output FILE]
    python -m benchmarks.retraining --luck       # how often a worse model is promoted because it was lucky
    python -m benchmarks.retraining --growing    # three ticks on a world that changes

Each case begins with a retraining that has a champion and new images: scenes of the toy world, a real MLflow
server, in some cases a real S3 server and a cluster of three nodes. The case disturbs the next tick of
``maskmill retrain``, or brings a candidate that must be refused. Then the same command runs again until it
ends. What is left is compared with an undisturbed tick:

* promoted: wrong promotions, which are versions that are or were champion and should not have been;
* doubled: steps that were done and are done again, ids with several rows, steps of a training with several
  lines, finished runs in MLflow, versions, entries of the ledger and moves of the alias beyond one each (a
  trigger in MLflow's database counts the moves);
* lost: images without a row, steps of a training without a line, runs, versions or entries that are missing;
* wrong: another verdict, other weights, exit statuses or messages than expected;
* hung: a command that does not end within 900 s.

Each case is saved as it is counted (JSON lines), so that the same command resumes where it was stopped. The
exit status is 1 if anything but times is above 0.
"""
