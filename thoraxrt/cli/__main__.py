"""`python -m thoraxrt.cli`."""

from thoraxrt.cli import main

main()
