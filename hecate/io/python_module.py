"""How hecate starts another Python."""

import sys

RUN_MODULE = (sys.executable, "-P", "-m")
"""The beginning of a command that runs a module of hecate's; the module's name and its arguments follow. Without -P Python looks for each
module in the working directory first, where a `json.py` may lie beside the data."""
