"""`python -m fasttax` is the `fasttax` command."""

import sys

from fasttax.cli import main

sys.exit(main())
