"""``python -m refold.cli``, which is how launchers of several processes start the command."""

from refold.cli import main

main()
