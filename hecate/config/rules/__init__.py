"""Which keys of a configuration go together, by subject."""
