"""The Perception Encoder in torch: pure functions of a configuration, no I/O and no globals."""
