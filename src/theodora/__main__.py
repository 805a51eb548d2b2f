"""`python -m theodora`: the command `theodora`, also for launchers such as torchrun."""

import sys

from theodora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
