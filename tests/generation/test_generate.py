import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch import generate as command
from pretrain.console import TextPrinter
from pretrain.errors import CheckpointError, ConfigError, TrainingError
from pretrain.generation.generate import generate
from pretrain.generation.generate_options import GenerateOptions, read_prompts
from pretrain.generation.sampling import choose_tokens
from pretrain.options.config import ModelSection
from pretrain.options.families import resolve_shape
from pretrain.transformer.model import Transformer

ROOT = Path(__file__).resolve().parents[2]
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


def test_prompts_do_not_share_their_random_numbers():
    model = build(std=0.0)  # every token is equally probable
    first, second = generate(model, Characters(), ["a", "b"], GenerateOptions(max_new_tokens=20))
    assert sum(one == other for one, other in zip(first.ids, second.ids, strict=False)) < 5


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
        ConfigError,
        match=r"--prompt \(number 2\) is 32 tokens .* expected fewer than data.seq_len \(32\). Shorten it by at least 1",
    ):
        generate(build(), Characters(), ["a", "a" * (SEQ_LEN - 1)], GREEDY)


def test_no_prompts_give_no_completions():
    assert generate(build(), Characters(), [], GREEDY) == []


def draw(logits, times=4000, **options):
    uniform = torch.rand(times, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chosen = choose_tokens(torch.tensor(logits).expand(times, -1), uniform, GenerateOptions(**options))
    return (torch.bincount(chosen, minlength=len(logits)) / times).tolist()


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
    config = SimpleNamespace(data=SimpleNamespace(max_seq_len=SEQ_LEN), train=SimpleNamespace(precision="bf16"))
    loaded = SimpleNamespace(model=spell("abcdefgh"), tokenizer=Characters(), step=7, config=config)
    asked = []
    monkeypatch.setattr(
        "pretrain.checkpoints.run_folder.load_run", lambda run, step: asked.append((run, step)) or loaded
    )
    return asked


def test_command_prints_prompt_and_text(run, capsys):
    assert command.main(["runs/x", "--prompt", "a", "--temperature", "0", "--step", "7"]) == 0
    assert capsys.readouterr().out == "abcdefgh\n"
    assert run == [("runs/x", 7)]


@pytest.mark.parametrize("dtype", ["auto", "fp32", "bf16"])
def test_dtype_is_that_of_the_weights(run, monkeypatch, capsys, dtype):
    seen = []
    monkeypatch.setattr(
        "pretrain.generation.generate.generate", lambda model, *rest: seen.append(model.output.weight.dtype) or []
    )
    assert command.main(["runs/x", "--prompt", "a", "--dtype", dtype]) == 0
    on_gpu = torch.cuda.is_available() and dtype == "auto"
    assert seen == [torch.bfloat16 if dtype == "bf16" or on_gpu else torch.float32]


def test_text_is_sampled_in_bf16_too():
    [completion] = generate(spell("abcdefgh").bfloat16(), Characters(), ["a"], GenerateOptions(temperature=0))
    assert completion.text == "bcdefgh"


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

    monkeypatch.setattr("pretrain.checkpoints.run_folder.load_run", fail)
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


# Many prompts, streaming and the command line


def test_more_prompts_than_a_batch_give_what_one_batch_gives():
    model, prompts = build(), ["ab", "hello", "ab", "x", "hello", "the quick brown"]
    options = GenerateOptions(max_new_tokens=12, seed=3, temperature=0.9, top_k=20, repetition_penalty=1.2)
    whole = generate(model, Characters(), prompts, options)
    assert whole == generate(model, Characters(), prompts, dataclasses.replace(options, batch_size=2))
    assert whole[0].ids != whole[2].ids and whole[1].ids != whole[4].ids


def test_a_longer_text_begins_with_the_shorter_one():
    model = build()
    [short], [long] = (
        generate(model, Characters(), ["a"], GenerateOptions(max_new_tokens=count, seed=4)) for count in (5, 25)
    )
    assert long.ids[:5] == short.ids


def test_rows_that_are_complete_leave_the_batch(monkeypatch):
    model, sizes = spell("abcdefgh"), []
    logits = model.logits
    monkeypatch.setattr(
        model, "logits", lambda tokens, *rest, **kind: sizes.append(len(tokens)) or logits(tokens, *rest, **kind)
    )
    found = generate(model, Characters(), ["g", "a", "e"], GenerateOptions(temperature=0))
    assert [item.text for item in found] == ["h", "bcdefgh", "fgh"]
    assert sizes == [3, 3, 2, 2, 1, 1, 1, 1]


def test_text_arrives_in_pieces_that_make_the_completion():
    events = []
    options = GenerateOptions(temperature=0, stop=("ef",))
    done = generate(spell("abcdefgh"), Characters(), ["a", "b"], options, lambda *event: events.append(event))
    assert events == [
        (0, "b", ""),
        (1, "c", ""),
        (0, "c", ""),
        (1, "d", ""),
        (0, "d", ""),
        (1, "", "stop"),
        (0, "", "stop"),
    ]
    assert [item.text for item in done] == ["bcd", "cd"]


def test_a_model_that_computes_nan_is_an_error():
    model = build()
    with torch.no_grad():
        model.output.weight[5] = float("nan")
    with pytest.raises(TrainingError, match=r"model: its logits are NaN or infinite; expected numbers. Use an earlier"):
        generate(model, Characters(), ["a"], GREEDY)


def test_ranks_take_the_tokens_that_they_agree_on():
    forced = iter(torch.tensor([[98], [99], [2]]))
    [item] = generate(build(), Characters(), ["a"], GREEDY, agree=lambda chosen: next(forced))
    assert (item.text, item.finish) == ("bc", "eos")


class Terminal(io.StringIO):
    """Remembers what was on the screen whenever it was shown."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def flush(self):
        if not self.shown or self.shown[-1] != self.getvalue():
            self.shown.append(self.getvalue())


def test_a_single_text_is_shown_as_it_grows():
    screen = Terminal()
    printer = TextPrinter(["a"], stream=True, output=screen)
    for text, finish in (("b", ""), ("c", ""), ("", "eos")):
        printer.add(0, text, finish)
    assert screen.shown == ["a", "ab", "abc", "abc\n"]


@pytest.mark.parametrize("stream", [True, False])
def test_several_texts_are_shown_in_their_order(stream):
    screen = Terminal()
    printer = TextPrinter(["a", "A"], stream, screen)
    for event in ((0, "b", ""), (1, "B", "stop"), (0, "c", "eos")):
        printer.add(*event)
    end = "--- 1 of 2 ---\nabc\n--- 2 of 2 ---\nAB\n"
    assert screen.shown == (["--- 1 of 2 ---\na", "--- 1 of 2 ---\nab", end] if stream else ["", end])


def test_command_streams_only_where_it_is_wanted(run, monkeypatch):
    for arguments, pieces in ((["--stream"], 8), ([], 1)):
        screen = Terminal()
        monkeypatch.setattr("sys.stdout", screen)
        assert command.main(["runs/x", "--prompt", "a", "--temperature", "0", *arguments]) == 0
        assert screen.getvalue() == "abcdefgh\n" and len([text for text in screen.shown if text]) >= pieces
    assert [text for text in screen.shown if text] == ["abcdefgh\n"]


def test_command_reads_prompts_from_files(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "lines.txt").write_text("a\r\n\n  \nc\n", encoding="utf-8")
    (tmp_path / "lines.jsonl").write_text('{"prompt": "e\\nf"}\n{"prompt": ""}\n', encoding="utf-8")
    assert read_prompts(str(tmp_path / "lines.txt")) == ["a", "c"]
    assert read_prompts(str(tmp_path / "lines.jsonl")) == ["e\nf", ""]
    monkeypatch.setattr("sys.stdin", io.StringIO("c\ne\n"))
    arguments = ["runs/x", "--prompt", "a", "--prompt-file", "-", "--num-samples", "2", "--temperature", "0", "--json"]
    assert command.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)["completions"]
    assert [(item["prompt"], item["text"]) for item in found] == [
        ("a", "bcdefgh"), ("a", "bcdefgh"), ("c", "defgh"), ("c", "defgh"), ("e", "fgh"), ("e", "fgh")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt is missing; expected at least one prompt. Add --prompt TEXT or --prompt-file FILE."),
        (["--prompt-file", "none.txt"], "--prompt-file is none.txt; expected a readable file of UTF-8 text ("),
        (["--prompt-file", "empty.txt"], "--prompt is missing and empty.txt holds none; expected at least one prompt."),
        (["--prompt-file", "bad.jsonl"], 'bad.jsonl:2: the line is {"text": "a"}; expected JSON such as {"prompt": "text"} or {"messages": ['),
        (["--prompt-file", "latin.txt"], "--prompt-file is latin.txt; expected a readable file of UTF-8 text ("),
        (["--prompt", "a", "--num-samples", "0"], "--num-samples is 0; expected at least 1. Use 1 or more."),
        (["--prompt", "a", "--min-p", "1.5"], "--min-p is 1.5; expected 0 to 1. Use 0 for all tokens."),
        (["--prompt", "a", "--repetition-penalty", "0"], "--repetition-penalty is 0.0; expected more than 0. Use 1 for none."),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size is 0; expected at least 1. Use 1 or more."),
    ],
)  # fmt: skip
def test_command_refuses_what_it_cannot_use(run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "a"}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    assert command.main(["runs/x", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}") and run == []


def test_help_is_quick_and_names_every_option():
    code = "import sys, launch.generate as g\ntry: g.main(['--help'])\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "False"
    for option in dataclasses.fields(GenerateOptions):
        assert f"--{option.name.replace('_', '-')}" in done.stdout
