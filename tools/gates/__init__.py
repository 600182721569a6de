"""Checks of the kernels' machine code, for all supported GPUs, on a machine without a GPU.

`shipped` lists calls that launch every shipped kernel, `compiling` compiles their launches, `checks`
and `spills` say what must hold, `cuda` does the same for the kernels in CUDA C++. See
`python -m tools.gates --help`.
"""
