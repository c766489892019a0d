"""Inject faults into real runs, and count what they cost.

    python -m benchmarks.faults --seed 1 --times 8 [--kinds actor …] [--minutes 60] [--output FILE]

Each kind of fault is injected ``--times`` times, at moments that follow from the seed, into real runs of
``maskmill label`` or ``maskmill train``. Then the fault is taken away, and where it ended the run, the
same command runs again until it succeeds. What is left is compared with an undisturbed run:

* lost: images of the manifest without a row, steps of a training without a line, runs that MLflow lacks;
* doubled: ids with several rows, steps with several lines, runs that MLflow has twice;
* wrong: masks, confidences or weights that are not equal byte for byte, statuses, counts in the record that
  are not those of the rows, exit statuses and messages other than expected;
* hung: a command that does not end within 900 s.

Several faults may hit one run; its losses are counted once. Each injection is saved as it is counted (JSON
lines), so that the same command resumes where it was stopped; another ``--times`` adds to what is there. The
exit status is 1 if anything was lost, doubled, wrong or hung, or if a kind cannot be injected here.
"""
