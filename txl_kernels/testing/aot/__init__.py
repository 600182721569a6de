"""What a machine without a GPU can know of the Triton kernels: their machine code.

`record` notes the launches of a call on tensors without storage, `build` compiles them ahead of
time, `sass` reads the machine code, `gates` says what it must hold, `speed` estimates its time,
`shipped` lists the calls that stand for everything shipped. `python -m txl_kernels.testing.aot`
runs them. Nothing here is imported by the kernels.
"""
