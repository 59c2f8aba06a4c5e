"""`python -m hecate`."""

from hecate.cli import main

main()
