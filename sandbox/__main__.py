"""`python -m sandbox`, as torchrun starts it."""

from sandbox.cli import main

main()
