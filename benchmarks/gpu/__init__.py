"""`make gpu`: everything that a machine with a GPU can prove and measure, in one go.

Needs torch, Triton and numpy, and for the native part cmake, a C++ compiler and nvcc; nothing of
what the language model or the commands need. Each stage runs in a process of its own, so that a
kernel which breaks the device's context breaks one stage.
"""
