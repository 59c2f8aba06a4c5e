"""Write what a finished run has trained, and read adapters and whole models.

`adapter_format` says what a format can do, `formats` has one a file, and `format_table` finds the one of a folder.
"""
