"""Fuzzing of every file format that this project reads: `python -m tools.fuzz`, or `make fuzz`.

formats.py   the list of formats
texts.py     texts, archives, token files, vocabularies: valid files, how each is read
runs.py      checkpoints, windows, configurations, logs, records: the same
folder.py    a folder of valid files, one of which each input replaces
oracle.py    what must hold for every input, and the check of one input
mutate.py    changes an input at random: JSON, safetensors, tar and compressed data keep their form
worker.py    one format under libFuzzer, guided by coverage (atheris)
"""
