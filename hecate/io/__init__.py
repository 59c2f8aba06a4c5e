"""Writing files durably and reading JSON strictly."""
