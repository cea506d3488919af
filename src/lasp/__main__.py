"""`python -m lasp`: the same as the command `lasp`, where that is not on the PATH."""

import sys

from lasp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
