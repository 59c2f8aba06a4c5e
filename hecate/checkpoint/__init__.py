"""Checkpoints: one safetensors file per rank and a JSON manifest with a digest of every tensor, committed by a single rename.

    checkpoint-40/  rank-00000-of-00002.safetensors  rank-00001-of-00002.safetensors  manifest.json  COMMIT

The functions of this package only read and write files. Nothing is pickled, and everything read is checked. They use no process
group: the caller coordinates the ranks (see `save`). What the package itself exports needs no torch, so that launchers can ask which
checkpoints there are; `save` and `shard` need it.
"""

from hecate.checkpoint.files import CheckpointError
from hecate.checkpoint.history import committed, good_checkpoints, latest_good, prune, remove_stale_staging, stopped_early
from hecate.checkpoint.layout import TensorEntry
from hecate.checkpoint.manifest import Manifest, read_manifest

__all__ = [
    "CheckpointError",
    "Manifest",
    "TensorEntry",
    "committed",
    "good_checkpoints",
    "latest_good",
    "prune",
    "read_manifest",
    "remove_stale_staging",
    "stopped_early",
]
