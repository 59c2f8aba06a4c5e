"""The `mixlora` adapter format, and what others make of it."""
