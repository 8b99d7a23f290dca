"""Key-value caches, and caches of prompt prefixes and image features."""
