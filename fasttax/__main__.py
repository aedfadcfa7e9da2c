import sys

from fasttax.cli import main

sys.exit(main())
