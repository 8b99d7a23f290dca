"""Parts of the embedder: checks of its package and its items."""
