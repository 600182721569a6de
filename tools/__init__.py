"""Commands for development that are not part of the installed packages."""
