"""`python -m nemo_spin` is `nemo-spin`."""

from __future__ import annotations

import sys

from nemo_spin.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
