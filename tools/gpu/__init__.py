"""`make gpu`: checks and measures the GPU kernels on this machine within a time budget.

Each stage is a module `tools/gpu/<stage>.py` with a function `run(context)` and runs in a process
of its own, so that a crash or a hang ends one stage only.
"""
