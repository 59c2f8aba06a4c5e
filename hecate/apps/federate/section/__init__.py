"""The section `rounds` of the configuration: its keys, and what goes together with them."""
