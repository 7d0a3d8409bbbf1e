"""`python -m mmdiff_ray.cli`."""

import sys

from mmdiff_ray.cli import main

sys.exit(main())
