"""`python -m transformer_xl.cli`, for launchers that start a module."""

from transformer_xl.cli import main

main()
