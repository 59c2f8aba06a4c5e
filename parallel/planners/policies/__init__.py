"""Placement policies, one a file, by its name. Each file has a `POLICY`; a file that is put here is a policy (docs/extend)."""
