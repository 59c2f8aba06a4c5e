"""Adapters in PEFT's format and in those that follow it."""
