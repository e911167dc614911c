"""`python -m meditok` is `meditok doctor`, and takes its options; with anything else it is `meditok`."""

import sys

from .cli import run

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("--json", "--log-json", "--quiet", "--debug"):
        arguments = ["doctor", *arguments]
    sys.exit(run(arguments))
