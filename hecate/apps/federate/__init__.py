"""Federated rounds: clients that train apart, what travels between them and the server, and what the server makes of it."""

import hecate.config  # noqa: F401 - before the section, of which it makes a part of itself
