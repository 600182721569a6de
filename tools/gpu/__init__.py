"""`make gpu`: checks and measures the GPU kernels on this machine within a time budget.

Each stage is a function of a `stages.Context` and runs in a process of its own, so that a crash or
a hang ends one stage only.
"""

import time

STARTED = time.monotonic()  # the budget includes the imports
