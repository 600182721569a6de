"""The commands from end to end, and how they speak of errors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from transformer_xl import cli
from transformer_xl.cli.app import app
from transformer_xl.training.report import read_log

TINY_MODEL = (
    *("model.n_layer=1", "model.d_model=16", "model.n_head=2", "model.d_head=8"),
    *("model.d_inner=32", "model.mem_len=8"),
)
TINY_RUN = (
    *("train.batch_size=4", "train.tgt_len=8", "train.eval_batch_size=4", "train.eval_tgt_len=8"),
    *("train.max_step=6", "train.log_interval=1", "train.eval_interval=3", "train.warmup_step=2"),
    *("train.checkpoint_interval=3", "train.autocast=off", "train.max_eval_steps=20"),
    *("evaluate.batch_size=2", "evaluate.tgt_len=8", "evaluate.mem_len=16"),
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stdout


def fail(*arguments: object) -> str:
    """The one sentence on stderr."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def data(text_file: Path) -> list[str]:
    return ["data.name=text", f"data.path={text_file}", f"data.cache_dir={text_file.parent}/cache"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: list[str]) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    shown = succeed("train", "demo", *TINY_MODEL, *TINY_RUN, *data, "--out", out)
    assert "step 6/6" in shown
    assert "valid bpc" in shown
    return out


def test_training_leaves_everything_in_its_folder(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        *("best", "last", "log.jsonl", "curve.png", "tensorboard"),
    }


def test_evaluate_prints_the_score_with_its_protocol(trained: Path) -> None:
    shown = " ".join(succeed("evaluate", trained).split())
    assert re.search(r"bpc +\d\.\d{4} +ppl +\d+\.\d{4}", shown)
    for part in ("test split of text", "batch 2, tgt_len 8, mem_len 16", "not scored", "float32"):
        assert part in shown, part
    shown = " ".join(
        succeed(
            *("evaluate", trained / "best", "--split", "valid", "--tgt-len", "4"),
            *("--mem-len", "5", "--clamp-len", "7", "--same-length", "--batch-size", "3"),
            *("--precision", "bf16"),
        ).split()
    )
    assert "valid split" in shown
    assert "batch 3, tgt_len 4, mem_len 5, clamp_len 7, same_length yes" in shown
    assert "autocast to bfloat16" in shown


def test_generate_writes_the_same_text_from_the_same_seed(trained: Path) -> None:
    arguments = ("generate", trained, "--prompt", "the ", "--length", "40", "--top-k", "30")
    first, second = (succeed(*arguments, "--seed", "3") for _ in range(2))
    assert first == second
    assert first.startswith("the ")
    assert succeed(*arguments, "--seed", "4") != first
    greedy = ("generate", trained, "--prompt", "the ", "--length", "10", "--temperature", "0")
    assert succeed(*greedy) == succeed(*greedy, "--seed", "9", "--top-p", "0.5")


def test_resume_goes_on(trained: Path, data: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    succeed("train", "demo", *TINY_MODEL, *TINY_RUN, *data, "--out", out)
    succeed("train", "train.max_step=8", "--resume", out)
    assert [e["step"] for e in read_log(out) if "train_loss" in e] == list(range(1, 9))


def test_fine_tuning(trained: Path, data: list[str], tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    arguments = ("train", "demo", *TINY_MODEL, *TINY_RUN, *data, "--out", out)
    succeed(*arguments, "train.max_step=1", "--init-from", trained)
    assert read_log(out)[0]["train_loss"] < read_log(trained)[0]["train_loss"]


def test_doctor_says_what_runs_and_why_not() -> None:
    shown = succeed("doctor")
    for part in ("rel_attention", "reference", "imported from", torch.__version__, "processor"):
        assert part in shown, part


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "name a preset: demo, enwik8_base"),
        (["train", "enwik8_bas"], "unknown preset 'enwik8_bas'; did you mean 'enwik8_base'?"),
        (["train", "demo", "train.lrr=1"], "unknown field of train 'lrr'; did you mean 'lr'?"),
        (["train", "demo", "trian.lr=1"], "unknown section 'trian'; did you mean 'train'?"),
        (["train", "demo", "train.max_step=many"], "train.max_step: expected int, got 'many'"),
        (["train", "demo", "wt2"], "expected one preset, got demo, wt2"),
        (["train", "demo", "data.name=text", "data.path=nowhere.txt"], "nowhere.txt"),
        (["train", "--resume", "nowhere"], "nowhere does not exist"),
        (["evaluate", "nowhere"], "nowhere does not exist; expected a checkpoint directory"),
        (["generate", "nowhere"], "nowhere does not exist; expected a checkpoint directory"),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = fail(*arguments)
    assert found.startswith("error ")
    assert message in found


def test_bad_values_name_the_option(trained: Path, data: list[str], tmp_path: Path) -> None:
    assert "temperature: expected 0 or more" in fail("generate", trained, "--temperature", "-1")
    assert "prompt: expected at least one token" in fail("generate", trained, "--prompt", "")
    found = fail("evaluate", trained, "--same-length", "--mem-len", "0")
    assert "same_length: expected mem_len > 0" in found
    assert "expected FIELD=VALUE, got 'demo'" in fail("evaluate", trained, "demo")
    assert "exclude each other" in fail("train", "--resume", trained, "--init-from", trained)
    assert "holds a run already" in fail("train", "demo", *TINY_RUN, *data, "--out", trained)
    characters = ("train", "demo", *TINY_MODEL, *TINY_RUN, *data, "data.tokenizer=char")
    out = tmp_path / "characters"
    assert "has another vocabulary" in fail(*characters, "--init-from", trained, "--out", out)
    assert "has another vocabulary" in fail("evaluate", trained, "data.tokenizer=char")
    short = tmp_path / "short.txt"
    short.write_text("a few words only\n" * 20)
    found = fail("train", "demo", *TINY_RUN, "data.name=text", f"data.path={short}", "--out", out)
    assert "shorter than one segment" in found


def test_unexpected_errors_keep_their_traceback(trained: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        CliRunner().invoke(app, ["--traceback", "evaluate", "x"], catch_exceptions=False)


def test_without_the_extra_one_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "typer" else object())
    with pytest.raises(
        SystemExit, match=r'typer not installed.*pip install "transformer-xl\[lm\]"'
    ):
        cli.main()


def test_module_and_help() -> None:
    command = [sys.executable, "-m", "transformer_xl.cli", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("train", "evaluate", "generate", "doctor", "demo"):
        assert name in shown
