"""PE and PLM in torch: pure functions of a configuration, without I/O or global state."""
