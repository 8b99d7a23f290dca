"""`python -m perception_rt`, the same as `perception-rt`."""

import sys

from perception_rt.cli import main

sys.exit(main())
