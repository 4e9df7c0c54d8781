"""Compiled networks in the user's cache: `artifacts` writes and reads them, `listing` and `gc` serve the command line."""
