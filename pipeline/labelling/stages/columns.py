"""The columns that travel from one stage to the next."""

from __future__ import annotations

import pyarrow as pa

from pipeline.table import labels

CHUNK_BYTES = 64 << 20
"""A stage hands on its rows when they have so many bytes."""
KNOWN = ("id", "uri", "sha256", "height", "width", "status", "error", "version")
"""Columns of the label table that are known before an image is labelled, and go through all stages."""
DECODED = pa.schema(
    [
        *(labels.LABEL_SCHEMA.field(name) for name in KNOWN),
        ("pixels", pa.binary()),
        ("network_height", pa.int32()),
        ("network_width", pa.int32()),
        ("decode_s", pa.float32()),
        ("fetch_s", pa.float32()),
        # Where a large image is, which has no pixels here: its windows are read when it is labelled.
        ("address", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
    ]
)
LABELLED = pa.schema(
    [
        *(labels.LABEL_SCHEMA.field(name) for name in KNOWN),
        ("labels", pa.binary()),
        ("confidence", pa.binary()),
        labels.LABEL_SCHEMA.field("segment_agreement"),
        ("decode_s", pa.float32()),
        ("fetch_s", pa.float32()),
        ("label_s", pa.float32()),
        ("batches", pa.float32()),
        # Of a large image, encoded already.
        ("maps", pa.struct([("mask", pa.binary()), ("confidence", pa.binary())])),
        ("segments", labels.LABEL_SCHEMA.field("segments").type),
        ("softmin", pa.float32()),
    ]
)
WRITTEN = pa.schema(
    [
        ("done", pa.int64()),
        ("failures", pa.list_(pa.string())),
        ("decode_s", pa.float64()),
        ("label_s", pa.float64()),
        ("encode_s", pa.float64()),
        ("fetch_s", pa.float64()),
        ("write_s", pa.float64()),
        ("batches", pa.float64()),
        ("written", pa.int64()),
    ]
)
SPENT = ("decode_s", "fetch_s", "label_s", "batches", "encode_s")
"""Seconds that the stages spent on a row; ``batches`` is its share of a batch."""
