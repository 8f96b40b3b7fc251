"""`python -m videolavit` is the command."""

from videolavit.cli import main

main()
