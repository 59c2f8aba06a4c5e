"""Who goes on after a loss: one automaton for all launchers, without clocks, processes or sockets. Begin to read at `automaton.py`."""
