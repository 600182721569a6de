"""Named cases of `rel_attention` with few queries: shapes and options of decoding."""

from __future__ import annotations

from typing import Any

from txl_kernels.testing.rel_attention_cases import RelAttentionCase, unordered_ranges


def _decode_cases() -> tuple[RelAttentionCase, ...]:
    def case(name: str, Tq: int = 1, Tm: int = 30, **given: Any) -> RelAttentionCase:
        options = {"causal": True, **given.pop("options", {})}
        return RelAttentionCase(name, **{"H": 2, "Tq": Tq, "Tm": Tm, **given, "options": options})

    return (
        case("one_query"),
        case("one_key", Tm=0),
        case("two_queries", Tq=2, D=64),
        case("five_queries", Tq=5, Tm=0, D=41),
        case("nine_queries", Tq=9, Tm=5, B=1),
        case("sixteen_queries", Tq=16, Tm=9, B=1, D=24),
        case("long_memory", Tm=300, B=1, H=1, D=64),
        case("many_rows", B=3, H=4, Tm=20),
        case("head_1", D=1),
        case("head_41", D=41, biases=False),
        case("head_128", D=128, Tm=90, B=1),
        case("head_256_values_40", D=256, Dv=40, B=1),
        case("values_wider", Tq=3, D=16, Dv=70, B=1),
        case("r_shared_by_heads", r_heads=False),
        case("r_per_row", r_batch=True, Tq=3, Tm=4),
        case("r_per_row_shared_by_heads", r_batch=True, r_heads=False),
        case("transposed", transposed=True, D=32, Tq=2),
        case("clamp", Tq=3, R=8, options={"offset": -23, "clamp": True}),
        case("clamp_both_sides", Tq=9, Tm=0, R=9, options={"offset": 4, "clamp": True}),
        case("short_r", Tq=4, R=6, options={"offset": -20}),
        case("far_offset", options={"offset": 2**40}),
        case("negative_offset", options={"offset": -(2**40)}),
        case("far_clamp", Tq=2, R=3, options={"offset": -(2**40), "clamp": True}),
        case("both_directions", Tq=6, Tm=20, R=31, options={"causal": False}),
        case("window", Tq=4, options={"causal": False, "window": (7, 1)}),
        case("window_left", Tq=3, options={"window": (9, None)}),
        case("window_self", Tq=2, options={"window": (0, 0)}),
        case("chunk", Tq=5, options={"causal": False, "chunk": (8, 1)}),
        case("chunk_phase", Tq=5, options={"chunk": (7, 0, -45)}),
        case("key_start", Tq=2, key_start=[0, 9]),
        case("key_lens", Tq=2, key_lens=[22, 3]),
        case(
            "wild_lengths", B=4, H=1, key_start=[-5, 2**40, 0, 3], key_lens=[2**50, 5, -(2**40), 9]
        ),
        case("mask", Tq=3, mask=(2, 2, 3, 33)),
        case("mask_broadcast", Tq=2, mask=(2, 1, 1, 32)),
        case("dead_rows", Tq=3, Tm=5, key_start=[4, 8], options={"window": (1, 0)}),
        case("softcap", Tq=2, options={"softcap": 5.0}),
        case("negative_scale", Tq=2, options={"scale": -0.4}),
        case("zero_scale", options={"scale": 0.0}),
        case("pos_scale", options={"pos_scale": -0.3}),
        case("q_pos", Dp=5),
        case("q_pos_wider", Tq=3, Dp=70, r_heads=False, options={"pos_scale": 0.0}),
        case("groups", H=6, Hk=2),
        case("one_key_head", H=8, Hk=1, Tq=5, Tm=20),
        case("q_start", B=4, Tq=3, q_start=[31, 10, -2, 50]),
        case("q_start_far", B=2, R=3, q_start=[2**40, -(2**63)], options={"causal": False}),
        case("ranges", Tq=7, **unordered_ranges(2, 7, 37)),
        case(
            "ranges_mixed",
            Tq=5,
            key_start=unordered_ranges(2, 5, 35)["key_start"],
            key_lens=[35, 20],
        ),
        case("cache", B=4, Tm=0, Ts=300, q_start=[0, 99, 299, 7], key_lens=[1, 100, 300, 0]),
        case("masked_groups", H=4, Hk=2, Tq=3, Tm=2, mask=(2, 4, 3, 5)),
        case(
            "inkling",
            H=4,
            Hk=1,
            Tq=2,
            D=128,
            Dp=16,
            R=20,
            r_heads=False,
            biases=False,
            options={"offset": -11, "scale": 1 / 128, "pos_scale": 1.0},
        ),
        case(
            "q_start_clamp",
            Tq=3,
            R=7,
            q_start=[4, 31],
            options={"offset": -20, "clamp": True, "chunk": (16, 1)},
        ),
        case("large_scores", spread=30.0),
        case(
            "everything",
            B=3,
            Tq=6,
            Tm=50,
            D=24,
            Dv=20,
            R=30,
            r_heads=False,
            transposed=True,
            mask=(3, 1, 6, 56),
            key_start=[0, 13, 40],
            key_lens=[56, 50, 45],
            options={
                "offset": -22,
                "clamp": True,
                "window": (40, None),
                "chunk": (16, 3, 5),
                "softcap": 8.0,
                "scale": 0.2,
            },
        ),
        case(
            "everything_else",
            B=3,
            H=6,
            Hk=2,
            Tq=6,
            Tm=50,
            D=24,
            Dv=20,
            Dp=16,
            R=30,
            q_start=[50, 20, -3],
            **unordered_ranges(3, 6, 56),
            options={
                "offset": 10,
                "window": (40, None),
                "softcap": 8.0,
                "scale": 0.2,
                "pos_scale": 0.5,
            },
        ),
    )


# Few queries, no gradients, nothing that decoding kernels lack.
DECODE_CASES = _decode_cases()
