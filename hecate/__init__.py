"""hecate: an FSSDP trainer for mixtures of LoRA experts. Importing it costs nothing: every subpackage imports what it needs."""

__version__ = "0.1.0"
