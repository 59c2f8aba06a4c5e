"""What the processes of `testing.ranks` have imported before they are forked: all that a rank needs."""

from hecate.train.rank_main import preload

preload()
