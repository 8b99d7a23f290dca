"""The engine package as a file format: what is in the directory, and how it is published and read."""
