"""``python -m vllm_twist.cli``, and ``accelerate launch --module vllm_twist.cli``."""

import sys

from vllm_twist.cli import main

if __name__ == "__main__":
    sys.exit(main())
