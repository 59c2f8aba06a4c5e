"""Examples that people run or copy. A package, since a dependency (opacus) installs another one of the same name."""
