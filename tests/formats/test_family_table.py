"""Every family, tied and untied, with and without grouped heads: two ranks, ten steps, stopped, resumed, exported.

The table of it in `docs/families.md` is written by this test:
`WRITE_TABLE=1 python -m pytest tests/formats/test_family_table.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pretrain.checkpoints.checkpoint_files import list_steps
from pretrain.checkpoints.run_folder import load_run
from pretrain.errors import ExportError
from pretrain.formats import hf_export
from pretrain.formats.convert import convert
from pretrain.options.families import FAMILIES
from tests.helpers.rank_helpers import losses, run_cases

# About a minute on two quiet cores; machines are not always quiet.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PAGE = Path(__file__).resolve().parents[2] / "docs/families.md"
BEGIN, END = "<!-- written by tests/formats/test_family_table.py: begin -->\n", "<!-- end -->\n"
NUM_STEPS, STOP_AT = 10, 6  # rows have 32 tokens
LINEAR = "model.rope_scaling={type: linear, factor: 2}"
LLAMA3 = "model.rope_scaling={type: llama3, factor: 8, original_seq_len: 16}"
YARN = "model.rope_scaling={type: yarn, factor: 2, original_seq_len: 16}"
# What each case has beside its family's defaults: family, tied, grouped heads -> options.
CASES = {
    ("llama", False, True): [YARN, "model.head_dim=12"],
    ("llama", False, False): [LINEAR, "model.dropout=0.1"],
    ("llama", True, True): [LLAMA3, "model.rope_theta=500000"],
    ("llama", True, False): ["model.attention_bias=true", "model.ffn_bias=true"],
    ("mistral", False, True): ["model.sliding_window=9", "model.head_dim=12"],
    ("mistral", False, False): ["model.dropout=0.1"],
    ("mistral", True, True): [YARN],
    ("mistral", True, False): ["model.sliding_window=9", LINEAR],
    ("olmo2", False, True): ["model.rope_theta=500000", "model.norm_eps=1e-6"],
    ("olmo2", False, False): ["model.dropout=0.1", LINEAR],
    ("qwen3", False, True): ["model.sliding_window=9", YARN],
    ("qwen3", False, False): [LLAMA3],
    ("qwen3", True, True): ["model.head_dim=12", "model.rope_theta=1000000", "model.norm_eps=1e-6"],
    ("qwen3", True, False): ["model.sliding_window=9", "model.attention_dropout=0.1"],
    ("stablelm", False, True): ["model.attention_bias=qkv", "model.rope_fraction=0.25"],
    ("stablelm", False, False): [YARN],
    ("stablelm", True, True): [LLAMA3],
    ("stablelm", True, False): ["model.attention_bias=qkv", LINEAR],
    ("starcoder2", False, True): ["model.sliding_window=9", LINEAR],
    ("starcoder2", False, False): [YARN],
    ("starcoder2", True, True): ["model.sliding_window=9", "model.dropout=0.1"],
    ("starcoder2", True, False): [LLAMA3],
    ("gpt2", False, False): ["model.dropout=0.1", "model.attention_dropout=0.1"],
    ("gpt2", True, False): [],
    ("custom", True, True): ["model.norm=layernorm", "model.qk_norm=full", "model.attention_softcap=2", "model.logit_softcap=10",
                             "model.sliding_window=9", "model.attention_bias=qkv", LINEAR],
    ("custom", False, False): ["model.positions=learned", "model.activation=gelu", "model.ffn_bias=true"],
}  # fmt: skip
COMMON = ["train.micro_batch_size=8", f"train.num_steps={NUM_STEPS}", "model.ffn_dim=64", "train.global_batch_size=16"]


def name_of(case: tuple[str, bool, bool]) -> str:
    family, tied, grouped = case
    return f"{family}-{'tied' if tied else 'untied'}-{'gqa' if grouped else 'mha'}"


def overrides_of(case: tuple[str, bool, bool]) -> list[str]:
    family, tied, grouped = case
    return [
        f"model.family={family}",
        f"model.tie_embeddings={str(tied).lower()}",
        f"model.num_kv_heads={2 if grouped else 4}",
        *COMMON,
        *CASES[case],
    ]


def test_every_combination_is_there() -> None:
    for name, family in FAMILIES.items():
        heads = (False, True) if family.grouped_heads else (False,)
        wanted = {(name, tied, grouped) for tied in family.tie_embeddings for grouped in heads}
        if family.exported and not family.json_tokenizer:  # tests/formats/test_hf_import.py trains and exports those
            assert wanted == {case for case in CASES if case[0] == name}


@pytest.fixture(scope="module")
def runs(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train every case in one start of two ranks: undisturbed, and stopped by a signal and resumed."""
    folder = tmp_path_factory.mktemp("families")
    cases, outcomes = [], []
    for case in CASES:
        whole, cut = ([f"run.dir={folder}/{name_of(case)}{end}", *overrides_of(case)] for end in ("-whole", ""))
        cases += [{"overrides": whole}, {"overrides": cut, "signal_at": STOP_AT, "signal_rank": 1}, {"overrides": cut}]
        outcomes += ["done", "stopped", "done"]
    # A custom model that a family takes whole goes on as that family, and is exported from then on.
    renamed = [f"run.dir={folder}/renamed", *COMMON, "model.num_kv_heads=4"]
    cases += [
        {"overrides": [*renamed, "model.family=custom"], "signal_at": STOP_AT},
        {"overrides": [*renamed, "model.family=llama", "run.allow_changes=[model.family]"]},
    ]
    outcomes += ["stopped", "done"]
    assert run_cases(tiny_config, cases, 2, folder / "ranks", timeout=800) == outcomes
    return folder


def table_of(lines: list[str]) -> str:
    head = ["| family | output layer | heads | beside the family's defaults | resumed | export |", "|---" * 6 + "|"]
    return "\n".join([*head, *lines]) + "\n"


def options_in_words(options: list[str]) -> str:
    return ", ".join(f"`{option.removeprefix('model.').replace('=', ': ', 1)}`" for option in options) or "–"


@pytest.mark.launches
def test_every_family_trains_resumes_and_exports(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_export, "NUM_TEXTS", 100)  # the tokenizer is the same in all of them
    lines = []
    for case in CASES:
        run = runs / name_of(case)
        assert list_steps(run / "checkpoints") == [STOP_AT, NUM_STEPS]
        found, whole = losses(run), losses(runs / f"{name_of(case)}-whole")
        assert found == whole and len(found) == NUM_STEPS and found[-1] < found[0] - 0.1, (case, found)
        if FAMILIES[case[0]].exported:
            report = convert(run, tmp_path / name_of(case))
            assert report["logits"]["max_relative_difference"] < 5e-6 and report["logits"]["rows"]["held-out"] > 0
            outcome = f"`{report['logits']['architecture']}`, verified"
        else:
            with pytest.raises(ExportError, match="model.family is custom; expected one that is exported. The nearest"):
                convert(run, tmp_path / name_of(case))
            outcome = "refused"
        layer, heads = "tied" if case[1] else "untied", "GQA" if case[2] else "MHA"
        lines.append(f"| `{case[0]}` | {layer} | {heads} | {options_in_words(CASES[case])} | bit for bit | {outcome} |")
    assert load_run(runs / "renamed").config.model.family == "llama"
    assert convert(runs / "renamed", tmp_path / "renamed")["logits"]["architecture"] == "LlamaForCausalLM"
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    current = before + BEGIN + table_of(lines) + END + after
    if os.environ.get("WRITE_TABLE"):
        PAGE.write_text(current, encoding="utf-8")
    else:
        assert page == current, "run: WRITE_TABLE=1 python -m pytest tests/formats/test_family_table.py"
