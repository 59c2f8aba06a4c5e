"""What a run may do in its steps beside training, each in a file of its own (`extension` says when)."""
