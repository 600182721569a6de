"""Tests of the native CPU kernels for Linux on aarch64, on a machine with another processor.

`__main__` builds the library with Debian's cross compiler and runs the op tests in QEMU. `system`
makes the emulated machine: Debian's Python for arm64 and the files that describe its processor.
`packages` installs PyTorch's wheel for aarch64, `stubs` the CUDA libraries that it links.
See `python -m tools.arm --help`.
"""
