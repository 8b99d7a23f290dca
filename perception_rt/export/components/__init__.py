"""The parts of each model family as an export sees them: eager reference, trace, graphs."""
