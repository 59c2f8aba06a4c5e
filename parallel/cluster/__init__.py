"""The devices and links of a job, and its ranks' groups, as values."""
