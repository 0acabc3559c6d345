"""``python -m journeyman.cli``: the same as the ``journeyman`` command."""

import sys

from journeyman.cli import main

if __name__ == "__main__":
    sys.exit(main())
