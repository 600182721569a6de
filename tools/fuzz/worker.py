"""One format under libFuzzer: `python -m tools.fuzz.worker FORMAT FOLDER [libFuzzer's options]`."""

from __future__ import annotations

import logging
import os
import random
import resource
import sys
import warnings
from pathlib import Path

import atheris

# Modules are instrumented while they are imported.
with atheris.instrument_imports(
    include=["transformer_xl", "tarfile", "zipfile", "gzip", "_compression"],
    enable_loader_override=False,
):
    from tools.fuzz import oracle
    from tools.fuzz.formats import FORMATS

from tools.fuzz.mutate import mutate

MOST_ADDRESS_SPACE = 4 << 30  # above that of a process that has loaded torch


def main() -> None:
    """Fuzz until libFuzzer ends the process."""
    name, folder, options = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    warnings.simplefilter("error", RuntimeWarning)  # a record that is ignored is a warning
    logging.disable()
    form = FORMATS[name](folder / "files")
    corpus = folder / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(form.seeds()):
        (corpus / f"seed-{i}").write_bytes(seed)
    used = int(oracle.STATM.read_text().split()[0]) * oracle.PAGE
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_ADDRESS_SPACE, resource.RLIM_INFINITY))
    oracle.CLEAR_REFS.write_text("5")

    def one(data: bytes) -> None:
        fault = oracle.check(form, data)
        if fault is not None and oracle.keep(fault, data, folder / "faults" / name):
            print(f"{name}: {fault.place}: {fault.reason}", file=sys.stderr, flush=True)

    def changed(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.3:
            return bytes(atheris.Mutate(data, max_size))
        return mutate(data, rng)[:max_size]

    arguments = [sys.argv[0], *options, f"-artifact_prefix={folder}/faults/{name}-", str(corpus)]
    atheris.Setup(arguments, one, custom_mutator=changed)
    atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
