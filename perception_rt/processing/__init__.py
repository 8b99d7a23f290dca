"""From files and strings to arrays, in numpy and Pillow: one code for training, export and runtime."""
