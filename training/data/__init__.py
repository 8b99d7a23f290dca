"""Training data: reading, packing and mixing samples by lane and position."""
