"""The static model's tables for `docs/benchmarks.md`: what each launch should take, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from txl_kernels.testing.aot import sass, speed
from txl_kernels.testing.aot.shipped import Call
from txl_kernels.testing.aot.survey import Surveyed

PAGE = Path(__file__).resolve().parents[3] / "docs/benchmarks.md"
ARCHITECTURE = 90  # that the processors of the model have
BEGIN, END = "<!-- model -->", "<!-- /model -->"

LOOPS = (
    "launch",
    "H100 ms",
    "tile, warps, stages",
    "registers",
    "spilled B",
    "shared KiB",
    "blocks",
    "loop",
    "tensor",
    "issue",
    "fma",
    "alu",
    "exp",
    "shared",
    "bytes / pair",
)
TIMES = (
    "call",
    "part",
    *(f"{gpu.name} {what}" for gpu in speed.GPUS for what in ("ms", "rate")),
    "asked of a GPU",
)


def text(found: Sequence[Surveyed], version: str) -> str:
    """Both tables in Markdown; `version` is of what compiled. Calls that stand for a flag alone
    are not in them."""
    modelled = [each for each in found if each.call.modelled and each.binary.arch == ARCHITECTURE]
    return "\n".join(
        [
            f"Machine code of {version} for sm_90. **Modelled, not measured: nothing of this has "
            "been run on a GPU.** TFLOP/s are useful ones: 6·D per attended pair forward, 16·D "
            'backward, three products for each weight of the adaptive softmax. "of copy": the '
            "keys, the values and r once, over the time, as a share of the bandwidth that the "
            "model has for memory. What is asked has to be shown by `make gpu`; the model only "
            "says how far off it should be.",
            "",
            *_table(TIMES, _times(modelled)),
            "",
            "By kernel, with the clocks of a multiprocessor that one pass of a block through its "
            "loop asks of each pipe, as a rule (`loop`: instructions of such a pass). The time of "
            "a kernel without products is that of its bytes; that of products by torch's library "
            "is in the table above alone.",
            "",
            *_table(LOOPS, [_loop(each) for each in modelled]),
        ]
    )


def write(found: Sequence[Surveyed], version: str) -> None:
    """Puts the tables between the marks in the page.

    Raises:
        ValueError: the page has no such marks.
    """
    page = PAGE.read_text(encoding="utf-8")
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"{PAGE.name} has no {BEGIN} … {END}")
    new = f"{before}{BEGIN}\n{text(found, version)}\n{END}{after}"
    PAGE.write_text(new, encoding="utf-8")


def expected(each: Surveyed, gpu: speed.Processor) -> float:
    """The model's seconds of one kernel of a call, over all its launches."""
    kernel = each.kernel
    seconds = 0.0
    for launch in each.launches:
        binary = dataclasses.replace(each.binary, launch=launch)
        passes = 0.0
        if kernel.passes is not None:
            passes = kernel.passes(launch)
        elif kernel.flop is not None:
            passes = speed.passes_for(binary, kernel.flop)
        seconds += speed.estimate(binary, passes, gpu).seconds
    return seconds


def _times(modelled: Sequence[Surveyed]) -> list[list[str]]:
    """One row for each part of a call (forward, backward): the sum of its launches."""
    parts: dict[tuple[str, str], list[Surveyed]] = {}
    for each in modelled:
        parts.setdefault((each.call.name, each.kernel.part), []).append(each)
    rows = []
    for (call, part), launched in parts.items():
        row = [f"`{call}`", part]
        for gpu in speed.GPUS:
            library = sum(each.library_flop for each in launched) / gpu.library
            seconds = library + sum(expected(each, gpu) for each in launched)
            row += [f"{seconds * 1e3:.3g}", _rate(launched[0].call, part, seconds, gpu)]
        asked = launched[0].call.asked.get(part)
        rows.append([*row, str(asked or "–")])
    return rows


def _rate(call: Call, part: str, seconds: float, gpu: speed.Processor) -> str:
    """Of what bounds it: a share of the bandwidth, or useful FLOP/s."""
    if call.least_bytes:
        return f"{call.least_bytes / seconds / gpu.bandwidth:.0%} of copy"
    flop = call.flop.get(part)
    return f"{flop / seconds / 1e12:.0f} TFLOP/s" if flop else "–"


def _loop(each: Surveyed) -> list[str]:
    binary, gpu = each.binary, speed.H100
    steady = sass.steady(binary.code.main_loop())
    pipes = speed.loop_pipes(binary, gpu)
    names = binary.launch.constexprs
    tile = " × ".join(str(names[n]) for n in names if n in ("BLOCK_Q", "BLOCK_K", "BLOCK_ROWS"))
    pairs = names.get("BLOCK_Q", 0) * names.get("BLOCK_K", 0)
    clocks = (pipes.tensor, pipes.issue, pipes.fma, pipes.alu, pipes.exp, pipes.shared)
    call, _, kernel = each.name.removesuffix(f"/sm_{binary.arch}").rpartition("/")
    return [
        f"`{call.removeprefix('rel_attention/')}` `{kernel.strip('_').removesuffix('_kernel')}`",
        f"{expected(each, gpu) * 1e3:.3g}",
        f"{tile or '–'}, {binary.num_warps}, {binary.launch.options.num_stages}",
        str(binary.code.registers),
        str(binary.code.stack),
        f"{binary.shared / 1024:.0f}",
        str(speed.resident_blocks(binary, gpu)),
        str(len(steady)),
        *(f"{value:.0f}" for value in clocks),
        f"{pipes.loaded / pairs:.1f}" if pairs else "–",
    ]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]
