import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch import generate as command
from pretrain.config import ModelSection
from pretrain.errors import CheckpointError, ConfigError
from pretrain.families import resolve_shape
from pretrain.generate import GenerateOptions, _choose, generate
from pretrain.model import Transformer

ROOT = Path(__file__).resolve().parent.parent
SEQ_LEN = 32
PROMPTS = ["hello", "a", "the quick brown", "x y"]
GREEDY = GenerateOptions(max_new_tokens=8, temperature=0.0)
FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])


class Characters:
    """A tokenizer whose ids are characters."""

    bos_id, eos_id, pad_id, vocab_size = 1, 2, 3, 128

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(chr(token) for token in ids if token > 3)


def build(family="llama", std=0.3):
    section = ModelSection(
        family=family, dim=32, num_layers=2, num_heads=4, sliding_window=6 if family == "qwen3" else None
    )
    model = Transformer(resolve_shape(section, 128, SEQ_LEN), seed=1).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name else 0.0, std)
    return model


def spell(text, end=2):
    """Return a model that is certain of each letter's successor in `text`, and of `end` after the last one."""
    model = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm.weight" in name else 0.0)  # the residual stream is the embedding alone
        codes = torch.nn.functional.normalize(torch.randn(128, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
        model.embedding.weight[:128] = codes
        for token, successor in zip(text.encode(), [*text.encode()[1:], end], strict=True):
            model.output.weight[successor] += 20 * codes[token]
    return model


def greedy_by_hand(model, ids, count):
    for _ in range(count):
        ids = [*ids, int(model.logits(torch.tensor([ids]))[0, -1].argmax())]
    return ids[-count:]


@FAMILIES
def test_greedy_takes_the_most_probable_token_of_the_uncached_model(family):
    model = build(family)
    for prompt in PROMPTS:
        [completion] = generate(model, Characters(), [prompt], GREEDY)
        expected = greedy_by_hand(model, [1, *prompt.encode()], 8)
        assert 2 not in expected and completion.ids == expected and completion.finish == "length"


@FAMILIES
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_of_different_lengths_gives_what_each_prompt_gives_alone(family, temperature):
    model = build(family)
    options = GenerateOptions(max_new_tokens=40, temperature=temperature, seed=5)
    together = generate(model, Characters(), PROMPTS, options)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        assert [completion] == generate(model, Characters(), [prompt], options)


def test_seed_fixes_the_text_and_a_repeated_prompt_gets_another():
    model, options = build(), GenerateOptions(max_new_tokens=10)
    first, second = generate(model, Characters(), ["ab", "ab"], options)
    assert generate(model, Characters(), ["ab", "ab"], options) == [first, second]
    assert first.ids != second.ids
    assert generate(model, Characters(), ["ab"], GenerateOptions(max_new_tokens=10, seed=2))[0].ids != first.ids


def test_stops_at_the_end_of_the_document():
    [completion] = generate(spell("abcdefgh"), Characters(), ["xyzab"], GenerateOptions(temperature=0))
    assert (completion.text, completion.ids, completion.finish) == ("cdefgh", list(b"cdefgh"), "eos")


def test_stops_before_a_stop_string_that_spans_tokens():
    options = GenerateOptions(temperature=0, stop=("zz", "ef", "fg"))
    [completion] = generate(spell("abcdefgh"), Characters(), ["xa"], options)
    assert (completion.text, completion.finish) == ("bcd", "stop")


@FAMILIES
@pytest.mark.parametrize("prompt", ["a", "a" * 20, "a" * (SEQ_LEN - 2)])
def test_stops_with_a_reason_when_the_context_is_full(family, prompt):
    [completion] = generate(build(family), Characters(), [prompt], GenerateOptions(max_new_tokens=500, temperature=0))
    assert completion.finish == "context"
    assert 1 + len(prompt) + len(completion.ids) == SEQ_LEN


def test_a_prompt_that_fills_the_context_is_refused():
    with pytest.raises(
        ConfigError, match=r"--prompt is 32 tokens .* expected fewer than data.seq_len \(32\). Shorten it by at least 1"
    ):
        generate(build(), Characters(), ["a", "a" * (SEQ_LEN - 1)], GREEDY)


def test_no_prompts_give_no_completions():
    assert generate(build(), Characters(), [], GREEDY) == []


def draw(logits, times=4000, **options):
    generator = torch.Generator().manual_seed(0)
    chosen = [_choose(torch.tensor(logits), generator, GenerateOptions(**options)) for _ in range(times)]
    return [chosen.count(token) / times for token in range(len(logits))]


def test_temperature_divides_the_logits():
    assert draw([0.0, 1.0], temperature=1.0)[1] == pytest.approx(0.731, abs=0.03)
    assert draw([0.0, 1.0], temperature=0.5)[1] == pytest.approx(0.881, abs=0.03)
    assert draw([0.0, 1.0], temperature=0.0) == [0.0, 1.0]


def test_top_k_keeps_the_most_probable():
    shares = draw([1.0, 3.0, 2.0, 0.0], top_k=2)
    assert shares[0] == shares[3] == 0.0
    assert shares[1] == pytest.approx(0.731, abs=0.03)
    assert draw([1.0, 1.0, 1.0], times=200, top_k=7).count(0.0) == 0


def test_top_p_keeps_the_fewest_that_hold_the_probability():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert draw(logits, top_p=0.5)[0] == 1.0
    assert draw(logits, top_p=0.6) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert draw(logits, top_p=1e-6)[0] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "--temperature is -1.0; expected 0 or more. Use 0 for greedy text."),
        ({"top_p": 0.0}, "--top-p is 0.0; expected more than 0 and at most 1. Use 1 for all tokens."),
        (
            {"top_k": -1, "max_new_tokens": 0},
            "--max-new-tokens is 0; expected at least 1. Use 1 or more.\n--top-k is -1",
        ),
        ({"stop": ("",)}, "--stop is ''; expected text."),
        ({"temperature": float("nan")}, "--temperature is nan; expected 0 or more."),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(ConfigError) as error:
        GenerateOptions(**options).check()
    assert str(error.value).startswith(message)


@pytest.fixture
def run(monkeypatch):
    config = SimpleNamespace(data=SimpleNamespace(seq_len=SEQ_LEN))
    loaded = SimpleNamespace(model=spell("abcdefgh"), tokenizer=Characters(), step=7, config=config)
    asked = []
    monkeypatch.setattr("pretrain.run_folder.load_run", lambda run, step: asked.append((run, step)) or loaded)
    return asked


def test_command_prints_prompt_and_text(run, capsys):
    assert command.main(["runs/x", "--prompt", "a", "--temperature", "0", "--step", "7"]) == 0
    assert capsys.readouterr().out == "abcdefgh\n"
    assert run == [("runs/x", 7)]


def test_command_prints_one_json_object(run, capsys):
    arguments = ["runs/x", "--prompt", "a", "--prompt", "c", "--temperature", "0", "--stop", "g", "--json"]
    assert command.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 7
    assert [(item["prompt"], item["text"], item["finish"]) for item in found["completions"]] == [
        ("a", "bcdef", "stop"),
        ("c", "def", "stop"),
    ]


def test_command_notes_a_full_context_on_stderr(run, capsys):
    assert command.main(["runs/x", "--prompt", "a" * 29, "--max-new-tokens", "99", "--temperature", "0"]) == 0
    assert "note: stopped at 32 tokens, the length that the model was trained on" in capsys.readouterr().err


def test_command_reports_errors_without_a_traceback(monkeypatch, capsys):
    def fail(run, step):
        raise CheckpointError("runs/x: damaged")

    monkeypatch.setattr("pretrain.run_folder.load_run", fail)
    assert command.main(["runs/x", "--prompt", "a"]) == 1
    assert capsys.readouterr().err == "error: runs/x: damaged\n"
    assert command.main(["runs/x", "--prompt", "a", "--top-p", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: --top-p is 2.0; expected")


@pytest.mark.launches
@pytest.mark.parametrize("form", ["file", "module", "symlink"])
def test_command_starts_from_anywhere(form, tmp_path):
    link = tmp_path / "generate-link.py"
    link.symlink_to(ROOT / "launch" / "generate.py")
    arguments = {
        "file": [str(ROOT / "launch/generate.py")],
        "module": ["-m", "launch.generate"],
        "symlink": [str(link)],
    }
    environment = dict(os.environ) | ({"PYTHONPATH": str(ROOT)} if form == "module" else {})
    done = subprocess.run(
        [sys.executable, *arguments[form], str(tmp_path / "no-run"), "--prompt", "a"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "holds no checkpoint" in done.stderr and "Traceback" not in done.stderr
