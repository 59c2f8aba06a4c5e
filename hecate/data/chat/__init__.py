"""Conversations as text: turns, chat templates, and which characters are the assistant's."""
