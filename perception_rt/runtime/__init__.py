"""Runs engine packages: numpy and a backend, never torch."""
