"""The largest head size of the kernels. The native build reads it from this file."""

MAX_HEAD_SIZE = 256  # of keys, values and positions
