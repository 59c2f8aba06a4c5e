"""The formats of adapters, one a file. Each file has a `FORMAT`, an `AdapterFormat`; a file that is put here is a format (docs/extend)."""
