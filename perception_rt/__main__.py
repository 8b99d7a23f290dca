"""Runs `perception-rt` by `python -m perception_rt`."""

import sys

from perception_rt.cli import main

sys.exit(main())
