"""`hecate drill`: faults on the user's own machine, against tiny runs, and what became of them. `catalogue` lists the drills."""
