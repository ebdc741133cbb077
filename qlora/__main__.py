"""`python -m qlora`, and what `accelerate launch -m qlora train ...` runs: the same as the `qlora` command."""

import sys

from qlora.cli.main import main
from qlora.distributed.leave import is_one_of_several, leave

if __name__ == "__main__":
    code = main()
    if is_one_of_several():
        leave(code)
    sys.exit(code)
