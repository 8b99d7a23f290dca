"""Plans a run before it starts: memory per GPU, FLOPs, time."""
