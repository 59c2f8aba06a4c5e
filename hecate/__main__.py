"""`python -m hecate`."""

import os
import sys

if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
    del sys.path[0]  # Python puts it there; what lies beside the data is not hecate's code

from hecate.cli import main

main()
