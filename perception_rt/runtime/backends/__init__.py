"""One module per backend, with `check_device` and `open_session`; `targets.py` names them."""
