"""Parts of `generate.py`: scenarios for a package, and runners of a decoder alone."""
