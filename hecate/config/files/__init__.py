"""The files that a configuration names: models, data, presets, topologies."""
