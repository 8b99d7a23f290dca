"""Turns images, videos and texts into arrays; shared by training, export and runtime."""
