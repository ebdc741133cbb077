"""`python -m qlora`, and what `accelerate launch -m qlora train ...` runs: the same as the `qlora` command."""

import sys

from qlora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
