"""Installs the project in every way that users do, and runs the smoke test after each.

`environments` makes an environment that has torch and nothing else. `ways` has the commands of each
way. `python -m tools.installs` runs them and prints one line per installation.
"""
