"""The engine package as a file format: what its directory holds, how it is published and read."""
