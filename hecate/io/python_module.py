"""How hecate starts another Python."""

import sys

RUN_MODULE = (sys.executable, "-P", "-m")
"""Followed by the name of a module of hecate's and its arguments. Without -P Python looks for each module in the working directory first,
where a `json.py` may lie beside the data."""
