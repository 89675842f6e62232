"""Run the command line: `python -m qkd` is `qkd`."""

from qkd.cli.entry import main
from qkd.engines.membership import end_process

if __name__ == "__main__":
    end_process(main())
