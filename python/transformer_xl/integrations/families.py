"""The families that `patch` supports: the adapters of each family, by the name of the family."""

from __future__ import annotations

from transformer_xl.integrations import (
    cosyvoice,
    espnet,
    espnet_transducer,
    fairseq,
    fireredasr,
    inkling,
    inkling2,
    nemo,
    nemotron_streaming,
    parakeet,
    wav2vec2_bert,
    wav2vec2_conformer,
    xlnet,
)
from transformer_xl.integrations.adapter import Adapter

FAMILIES: dict[str, tuple[Adapter, ...]] = {
    "inkling": inkling.ADAPTERS,
    "inkling2": inkling2.ADAPTERS,
    "parakeet": parakeet.ADAPTERS,
    "nemotron_streaming": nemotron_streaming.ADAPTERS,
    "nemo": nemo.ADAPTERS,
    "wav2vec2_conformer": wav2vec2_conformer.ADAPTERS,
    "seamless_m4t": wav2vec2_conformer.SEAMLESS_ADAPTERS,
    "wav2vec2_bert": wav2vec2_bert.ADAPTERS,
    "seamless_m4t_v2": wav2vec2_bert.SEAMLESS_ADAPTERS,
    "xlnet": xlnet.ADAPTERS,
    "espnet": espnet.ADAPTERS + espnet_transducer.ADAPTERS,
    "funasr": espnet.FUNASR_ADAPTERS + espnet_transducer.FUNASR_ADAPTERS,
    "chatterbox": cosyvoice.ADAPTERS,
    "fairseq": fairseq.ADAPTERS,
    "fireredasr": fireredasr.ADAPTERS,
}
