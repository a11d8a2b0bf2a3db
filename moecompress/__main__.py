"""`python -m moecompress` is the command line."""

from moecompress.cli import main

main()
