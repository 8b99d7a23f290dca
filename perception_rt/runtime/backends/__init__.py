"""One module per backend, each with `open_session`; `perception_rt.targets` names them."""
