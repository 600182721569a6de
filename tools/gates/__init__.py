"""Checks of the kernels' machine code, for all supported GPUs, on a machine without a GPU.

`shipped` lists the calls that launch every shipped Triton kernel, `compiling` compiles their
launches, `checks` has the limits, `spills` the exceptions. `cuda` checks the kernels in CUDA C++.
See `python -m tools.gates --help`.
"""
