"""Decisions about a job on devices that may differ. Nothing in this folder starts a process or sends a message."""
