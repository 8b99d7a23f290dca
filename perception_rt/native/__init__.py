"""A decoder for CPUs in C++: sources, build, interface and weight files."""
