"""Make a recipe of a configuration of axolotl, LLaMA-Factory or TRL, and say of each of its keys what becomes of it.

`meanings` is the one table of what their keys mean, `convert` goes through a file. The core finds this app by its name
(`hecate.config.other_names`) for the hints at keys that it does not know.
"""
