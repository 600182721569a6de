"""txl_kernels as a kernel for Hugging Face's `kernels`: generated from the package's own sources.

`generate` writes the folder that kernel-builder builds from and the variants that it would build.
`relative` rewrites imports. The files in `overlay` replace those of the package with the same path,
or are added to it: a kernel has its own namespace of operators, no native library, and layers.
"""
