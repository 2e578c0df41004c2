"""`python -m nvmove`."""

import sys

from nvmove.cli import main

sys.exit(main())
