"""Text generation: preprocessing, scheduling, engine calls, sampling, detokenisation."""
