"""One lowering per backend, from the traced graph to what that backend runs best."""
