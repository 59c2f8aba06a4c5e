"""Federated rounds: clients that train apart, what travels between them and the server, and what the server makes of it."""
