"""The library of `tests/make_goldens.py`, one file for each kind of case."""
