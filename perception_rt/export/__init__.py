"""From a checkpoint to an engine package: trace once, lower per backend, verify, publish."""
