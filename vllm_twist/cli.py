"""The command ``vllm-twist``: one subcommand per job.

A subcommand is a module with ``add_parser(subparsers)``, which adds a parser of its name, and
``run(args)``, which does the job. Only the module of the command at hand is imported.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

#: Module and summary by name of the command.
COMMANDS = {
    "eval": ("vllm_twist.cli_eval", "bounds of log Z and divergences of a twist head"),
    "trace": ("vllm_twist.cli_trace", "one group's life as a picture"),
    "train": ("vllm_twist.cli_train", "learn a twist head for a potential"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vllm-twist``; return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="vllm-twist", description="Twisted sequential Monte Carlo inside vLLM.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {}
    for name, (module, summary) in COMMANDS.items():
        if argv[:1] == [name]:
            modules[name] = importlib.import_module(module)
            modules[name].add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    args = parser.parse_args(argv)
    try:
        modules[args.command].run(args)
    except ValueError as error:
        print(f"vllm-twist {args.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
