"""Reads the data of tasks: labelled or captioned images and videos, class names, digests."""
