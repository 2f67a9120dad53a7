"""`python -m raqu_onnx`."""

from __future__ import annotations

import sys

from raqu_onnx.cli import main

if __name__ == "__main__":
    sys.exit(main())
