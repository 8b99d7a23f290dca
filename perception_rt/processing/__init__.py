"""Files and strings to arrays, in numpy and Pillow: one code for training, export, runtime."""
