"""Fuzzing of every file format that this project reads: `python -m tools.fuzz`, or `make fuzz`.

formats.py   the formats: small valid files, and how each is read
oracle.py    what must hold for every input, and the check of one input
mutate.py    changes an input at random: JSON, safetensors, tar and compressed data keep their form
worker.py    one format under libFuzzer, guided by coverage (atheris)
"""
