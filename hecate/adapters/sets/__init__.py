"""Adapters as bags of rank-one terms: sets of them, and the operations that make one set of several.

`terms` computes with the terms of one module, `adapter_set` says what a set is, `set_files` reads and writes sets as adapter folders. The
other modules are the operations: pure functions of sets and weights, whose results are computed when they are read, one module at a time.
"""
