"""Write files durably; read JSON strictly, and as dataclasses; receive signals; end a process."""
