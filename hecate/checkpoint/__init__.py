"""Checkpoints: one safetensors file per rank and a JSON manifest with a digest of every tensor, committed by a single rename.

    checkpoint-40/  rank-00000-of-00002.safetensors  rank-00001-of-00002.safetensors  manifest.json  COMMIT

The functions of this package only read and write files. Nothing is pickled, and everything read is checked. They use no process
group: the caller coordinates the ranks (see `save`).
"""

from hecate.checkpoint.files import CheckpointError
from hecate.checkpoint.history import good_checkpoints, latest_good, prune, remove_stale_staging
from hecate.checkpoint.layout import TensorEntry
from hecate.checkpoint.manifest import Manifest, read_manifest
from hecate.checkpoint.save import checkpoint_folder, commit, discard, staging_folder, write_shard
from hecate.checkpoint.shard import read_tensors

__all__ = [
    "CheckpointError",
    "Manifest",
    "TensorEntry",
    "checkpoint_folder",
    "commit",
    "discard",
    "good_checkpoints",
    "latest_good",
    "prune",
    "read_manifest",
    "read_tensors",
    "remove_stale_staging",
    "staging_folder",
    "write_shard",
]
