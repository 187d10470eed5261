"""Checkpoints: what is in a file, reading any file with nothing in it run, writing ours."""

# ruff: noqa: F401 - names of the package

from engine.checkpoints.format import (
    BEST,
    BINARIZED,
    BINARY_1BIT,
    FINAL,
    KINDS,
    LARGEST_LOGIT_SCALE,
    LAST,
    PACKED,
    Checkpoint,
    digest,
    examine,
    library_versions,
    load,
    make,
    plain_state,
    save,
    serialize,
)
