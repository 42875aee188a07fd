"""`python -m cellseg`."""

from cellseg.cli import main

main()
