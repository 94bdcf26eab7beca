"""``python -m moe_peft CMD``: the same as ``moe-peft CMD``."""

import sys

from moe_peft.cli import main

if __name__ == "__main__":
    sys.exit(main())
