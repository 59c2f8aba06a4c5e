"""Plans of whole steps: by layer, from which loads, and who owns which expert."""
