"""Long inputs before and after `transformer_xl.integrations.patch`: time, peak memory, a picture.

    python -m benchmarks.long_context inkling | parakeet

Needs transformers; `make demo-long` and `make demo-audio` run it in the environment that has it.
"""
