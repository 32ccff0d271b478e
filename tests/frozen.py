"""Loaded last by the process that commands are forked from: they share its memory as it is.

A collection of garbage in a forked process would touch, and so copy, every page of the libraries.
"""

import gc

gc.collect()
gc.freeze()
