"""``python -m musiclm_fast`` is the command ``musiclm-fast``."""

import sys

from musiclm_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
