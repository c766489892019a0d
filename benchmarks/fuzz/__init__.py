"""Throw broken input at everything that reads what users bring.

    python -m benchmarks.fuzz --seed 1 --minutes 10 [--kinds images coco formats …] [--failures DIR]
    python -m benchmarks.fuzz --seed 1 --kinds coco --first 123 --count 1        (one input again)

Every input must end in a result, in a row or answer with a code, or in an error of the family of
``models.errors``, told in words. Faults are any other exception, a crash, more than the kind's seconds or
memory, and a message that shows a Python object. Inputs depend on seed, kind and number alone. They run in a
subprocess, which is replaced when it dies. Failing inputs are kept in a folder with what they did; the exit
status is 1 if there are any.

* ``images``: mutated files of all formats, through ``pipeline.files.images.decode`` and the stage ``Decode``;
  addresses that are no files.
* ``sources``: mutated tar shards, Parquet files with images, COCO's JSON and JSON lines, listed and read.
* ``coco``: mutated COCO JSON, opened and drawn.
* ``formats``: exports of label tables with one mutated file, read back.
* ``documents``: mutated ontologies, recipes, views, mappings of classes, lists, lists of classes, ``--set``
  options.
* ``http``: mutated requests to a real ``maskmill serve`` on loopback.
"""
