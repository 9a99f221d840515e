"""``python -m lightning_dualpipe.cli``, for where the console script is not on the path."""

import sys

from lightning_dualpipe.cli import main

sys.exit(main())
