"""The program: `vlmq` and `python -m vlmq`."""

import signal
import sys

from vlmq import _vlmq


def main() -> None:
    """Runs the command line of this process and ends it."""
    # Python would only note Ctrl-C and act on it after the command.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(_vlmq.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
