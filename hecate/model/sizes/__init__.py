"""What a run needs, from its configuration and its model's headers alone: shapes, memory, room for replicas."""
