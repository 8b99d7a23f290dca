"""Tasks of encoders: zero-shot classification, retrieval, nearest neighbours, linear probe."""
