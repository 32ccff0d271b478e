"""Compares the package with reference tensors of diffusers and transformers, conversion included.

`folder.py` reads a folder of reference tensors; `networks.py`, `schedulers.py`, `tables.py` and
`pipelines.py` compute what its cases hold; `runner.py` compares both. `python -m tests.goldens
FOLDER` runs all.
"""
