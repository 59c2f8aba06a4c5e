"""What each drill does: its faults, and what must follow."""
