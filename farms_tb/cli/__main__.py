"""`python -m farms_tb.cli`, where the command itself is not on the path."""

from farms_tb.cli import main

main()
