"""Run the command line: `python -m qkd.cli` is `qkd`."""

import sys

from qkd.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
