"""`make gpu`: checks and measures the GPU kernels on this machine within a time budget."""

import time

STARTED = time.monotonic()  # the budget includes the imports
