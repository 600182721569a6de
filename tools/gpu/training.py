"""Stage "training": steps of WikiText-103 base, end to end.

The text is the source of Python's standard library, split into words: every machine has it, and its
170,000 words fill all four clusters of the model's vocabulary.
"""

from __future__ import annotations

import time

from tools.gpu.runner import BUILD, Context
from transformer_xl.config import load_preset, override
from transformer_xl.data import open_corpus
from transformer_xl.training import Trainer, fit_vocabulary, join_processes

DATA = {"data.name": "stdlib", "data.tokenizer": "word", "data.cache_dir": str(BUILD / "corpus")}
TINY = {"model.n_layer": 1, "model.d_model": 16, "model.d_inner": 16, "train.batch_size": 2}


def run(context: Context) -> None:
    """Results: tokens/s over the steps, and their mean loss in nats."""
    warm_up, most = (1, 1) if context.is_rehearsal else (10, 50)
    changes = DATA | {"train.autocast": "auto"} | (TINY if context.is_rehearsal else {})
    config = override(load_preset("wt103_base"), changes)
    corpus = open_corpus(config.data)
    config = override(config, {"model.cutoffs": [20000, 40000, len(corpus.vocab) * 3 // 4]})
    trainer = Trainer(fit_vocabulary(config, corpus), corpus, join_processes())
    for _ in range(warm_up):
        trainer.advance()
    trainer.mean_loss()  # waits for the GPU
    start, steps = time.perf_counter(), 0
    while steps < most and context.seconds_left() > 2:
        trainer.advance()
        steps += 1
    loss = trainer.mean_loss()
    rate = steps * trainer.tokens_per_step / (time.perf_counter() - start)
    context.results |= {"steps": steps, "tokens_per_second": rate, "loss_nats": loss}
    context.results["summary"] = [f"{rate:,.0f} tokens/s over {steps} steps, loss {loss:.2f} nats"]
