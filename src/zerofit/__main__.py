"""``python -m zerofit``: the command line where the script ``zerofit`` is not on the path."""

from .cli.main import main

main()
