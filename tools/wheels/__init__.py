"""Builds the distributions of a release: one wheel for Linux, one for every system, and the sdist.

`torches` unpacks the files of torch that a build needs, `native` runs CMake once for each torch and
once for each Python, `distributions` makes the files that users install, `checks` inspects them.
See `python -m tools.wheels --help`.
"""
