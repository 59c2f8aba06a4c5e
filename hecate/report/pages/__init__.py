"""The report of a run as an HTML page and as pictures."""
