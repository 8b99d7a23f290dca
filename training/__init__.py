"""Training of Perception Encoders: recipes, data and the loop. Uses torch; never in the wheel."""
