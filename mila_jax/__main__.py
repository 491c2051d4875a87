"""`python -m mila_jax` is the command `mila`."""

import sys

from mila_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
