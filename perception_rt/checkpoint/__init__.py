"""Foreign weights in: readers, name tables, strict checks, hub download."""
