"""`python -m meditok` is `meditok doctor`; with a command's name it is that command."""

import sys

from .cli import COMMANDS, run

if __name__ == "__main__":
    arguments = sys.argv[1:]
    named = bool(arguments) and arguments[0] in COMMANDS
    sys.exit(run(arguments if named else ["doctor", *arguments]))
