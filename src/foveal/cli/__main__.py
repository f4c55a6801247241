"""`python -m foveal.cli`: the same as `foveal`."""

import sys

from foveal.cli import main

sys.exit(main())
