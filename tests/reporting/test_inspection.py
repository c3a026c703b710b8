"""What a page shows of a model, against the model: losses, layers, attention; and the page itself."""

import base64
import copy
import dataclasses
import hashlib
import html
import json
import math
import re
import shutil
import subprocess
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from launch import report as command
from pretrain.data.row_reader import Batch
from pretrain.errors import ConfigError, TrainingError
from pretrain.evaluation.evaluate import evaluate
from pretrain.options.config import ModelSection
from pretrain.options.families import resolve_shape
from pretrain.reporting import inspection
from pretrain.reporting.inspection import inspect, num_map_tokens
from pretrain.reporting.inspection_page import BYTES, SPECIAL, TEXT, page_data, render
from pretrain.transformer import layers
from pretrain.transformer.model import Transformer

ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN = 48
SENTENCE = "the cat sat on the mat\n\tand \u00e9\u2603 <b>"
CASES = pytest.mark.parametrize("case", ["llama", "gpt2", "window", "softcap"])


class Bytes:
    """A tokenizer whose ids are the bytes of UTF-8, after eight special ones."""

    bos_id, eos_id, pad_id, vocab_size = 1, 2, 3, 264
    fingerprint = "0" * 64

    def encode(self, text):
        return [8 + byte for byte in text.encode()]

    def decode(self, ids):
        return bytes(token - 8 for token in ids if token >= 8).decode(errors="replace")

    def bytes_of(self, token_id):
        return bytes([token_id - 8]) if token_id >= 8 else b""

    def token_bytes(self):
        return np.array([len(self.bytes_of(token_id)) for token_id in range(self.vocab_size)], dtype=np.int32)

    def name_of(self, token_id):
        return f"<{token_id}>"

    def special_tokens(self):
        return {"<s>": 1, "</s>": 2}


def build(case="llama", num_layers=2):
    own = {"gpt2": {"family": "gpt2"}, "window": {"family": "qwen3", "sliding_window": 5}}.get(case, {})
    if case == "softcap":
        own = {"family": "custom", "attention_softcap": 2.0, "logit_softcap": 3.0}
    if case != "gpt2":
        own["num_kv_heads"] = 2
    section = ModelSection.model_validate({"dim": 32, "num_layers": num_layers, "num_heads": 4, **own})
    model = Transformer(resolve_shape(section, Bytes.vocab_size, SEQ_LEN), seed=1).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.3)
    return model


def row_of(text):
    ids = [1, *Bytes().encode(text)]
    return torch.tensor([ids]), torch.tensor([[*ids[1:], -100]])


class OneRow:
    """What `evaluate` reads, of one text."""

    num_rows = 1

    def sources(self):
        return [("text", range(1))]

    def batch(self, numbers):
        tokens, targets = row_of(SENTENCE)
        return Batch(tokens, targets, torch.zeros_like(tokens), torch.tensor([0]))


@CASES
def test_losses_are_those_of_evaluation(case):
    model = build(case)
    found = inspect(model, Bytes(), SENTENCE)
    judged = evaluate(model, OneRow(), Bytes().token_bytes(), 1)
    assert float(found.loss_T.double().mean()) == pytest.approx(judged.loss, rel=1e-6)
    tokens, targets = row_of(SENTENCE)
    log_probs = model.logits(tokens)[0].log_softmax(-1)
    by_hand = -log_probs[torch.arange(len(found.ids) - 1), targets[0, :-1]]
    torch.testing.assert_close(found.loss_T, by_hand)
    torch.testing.assert_close(found.guess.entropy_P, torch.distributions.Categorical(logits=log_probs).entropy())
    assert found.guess.target_rank_P[-1] == -1 and found.guess.target_prob_P[-1] == 0
    ranks = (log_probs[:-1] > -by_hand[:, None]).sum(-1)
    assert found.guess.target_rank_P[:-1].tolist() == ranks.tolist() and ranks.max() > 20


@CASES
def test_the_last_layer_of_the_lens_is_the_output(case):
    model = build(case)
    found = inspect(model, Bytes(), SENTENCE)
    top = model.logits(row_of(SENTENCE)[0])[0].softmax(-1).topk(inspection.NUM_CHOICES)
    for guess, k in ((found.guess, inspection.NUM_CHOICES), (found.lens[-1], inspection.NUM_LENS_CHOICES)):
        assert guess.ids_PK.tolist() == top.indices[:, :k].tolist()
        torch.testing.assert_close(guess.probs_PK, top.values[:, :k])
    torch.testing.assert_close(found.lens[-1].target_prob_P[:-1].log(), -found.loss_T, atol=1e-4, rtol=1e-4)


def without_last_blocks(model, num_blocks):
    shorter = copy.deepcopy(model)
    shorter.blocks = shorter.blocks[:num_blocks]
    shorter.shape = dataclasses.replace(model.shape, num_layers=num_blocks)
    return shorter


@CASES
def test_a_layer_of_the_lens_is_the_model_without_the_blocks_above(case):
    model = build(case, num_layers=3)
    found = inspect(model, Bytes(), SENTENCE)
    assert len(found.lens) == 4
    for num_blocks, guess in enumerate(found.lens):
        probs = without_last_blocks(model, num_blocks).logits(row_of(SENTENCE)[0])[0].softmax(-1)
        top = probs.topk(inspection.NUM_LENS_CHOICES)
        assert guess.ids_PK.tolist() == top.indices.tolist()
        torch.testing.assert_close(guess.probs_PK, top.values)


def shares_of(found, layer, head):
    """The map of a head, as a page's script reads it."""
    n = found.num_map_tokens
    full = torch.zeros(n, n)
    full[tuple(torch.tril_indices(n, n))] = (found.maps_LHX[layer, head].float() / 255) ** 2
    return full


@pytest.mark.parametrize("case", ["llama", "gpt2", "window"])
def test_maps_are_the_weights_of_pytorchs_attention(case):
    model, seen = build(case), []
    for block in model.blocks:
        block.attention.register_forward_pre_hook(lambda module, inputs: seen.append((module, *inputs)))
    found = inspect(model, Bytes(), SENTENCE)
    n = found.num_map_tokens
    assert n == len(found.ids) and 0 < found.map_error < 1e-5
    for layer, (attention, x, context) in enumerate(seen):
        q, k, _ = (part.transpose(1, 2) for part in attention.project(x, context.rope_tables))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        mask = mask.triu(-4) if case == "window" else mask
        weights = F.scaled_dot_product_attention(q, k, torch.eye(n).expand(1, q.shape[1], n, n), attn_mask=mask)[0]
        for head in range(q.shape[1]):
            shares = shares_of(found, layer, head)
            torch.testing.assert_close(shares, weights[head], atol=5e-3, rtol=0)
            torch.testing.assert_close(shares.sum(-1), torch.ones(n), atol=2e-2, rtol=0)
            assert (shares[~mask] == 0).all()


def test_maps_that_are_not_what_the_model_computed_are_an_error(monkeypatch):
    real = layers.attention
    monkeypatch.setattr(layers, "attention", lambda *inputs: real(*inputs) * 1.01)
    with pytest.raises(RuntimeError, match="attention and its maps differ by 9.9e-03"):
        inspect(build(), Bytes(), SENTENCE)


def test_what_is_shown_is_bounded(monkeypatch):
    assert num_map_tokens(98, 6, 4) == 98 and num_map_tokens(3000, 6, 4) == inspection.MAX_MAP_TOKENS
    for num_layers, num_heads in ((80, 64), (126, 128), (6, 4)):
        n = num_map_tokens(5000, num_layers, num_heads)
        assert num_layers * num_heads * n * (n + 1) // 2 <= inspection.MAX_MAP_VALUES and n >= 30
    model = build()
    whole = inspect(model, Bytes(), SENTENCE)
    monkeypatch.setattr(inspection, "MAX_LENS_CELLS", 30)
    monkeypatch.setattr(inspection, "MAX_MAP_TOKENS", 7)
    part = inspect(model, Bytes(), SENTENCE)
    assert part.num_lens_places == 10 and len(part.guess.ids_PK) == len(part.ids) == whole.num_map_tokens
    assert part.lens[1].ids_PK.tolist() == whole.lens[1].ids_PK[:10].tolist()
    torch.testing.assert_close(shares_of(part, 1, 2), shares_of(whole, 1, 2)[:7, :7])


def test_texts_that_cannot_be_looked_at():
    with pytest.raises(ConfigError, match=r"^--inspect is empty; expected a text of at least one token. Give one.$"):
        inspect(build(), Bytes(), "")
    with pytest.raises(
        ConfigError,
        match=r"--inspect is 50 tokens .*; expected at most 48, as fit data.seq_len \(48\). Shorten it by at least 2",
    ):
        inspect(build(), Bytes(), "a" * 49)
    assert len(inspect(build(), Bytes(), "a" * 47).ids) == SEQ_LEN
    model = build()
    with torch.no_grad():
        model.blocks[1].ffn.down.weight[0] = math.nan
    with pytest.raises(TrainingError, match="model: its losses are NaN or infinite; expected numbers"):
        inspect(model, Bytes(), "abc")


# The page


def page_of(text, model=None):
    model = model or build()
    found = inspect(model, Bytes(), text)
    data = page_data(found, Bytes(), {"run": "<x>"}, Bytes.vocab_size)
    return found, data, render(f"x: {text}", data)


def test_a_page_holds_the_numbers_of_the_inspection():
    found, data, page = page_of(SENTENCE)
    [content] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    read = json.loads(content)
    assert read == json.loads(json.dumps(data))
    assert read["loss"] == pytest.approx(found.loss_T.tolist(), rel=1e-4)
    assert [read["pieces"][number][0] for number in read["tokens"]] == found.ids
    assert [read["pieces"][number][0] for number in read["lens"]["layers"][1]["ids"]] == found.lens[
        1
    ].ids_PK.flatten().tolist()
    assert read["lens"]["layers"][2]["target"] == pytest.approx(
        found.lens[2].target_prob_P.tolist(), rel=5e-3, abs=1e-9
    )
    maps = zlib.decompress(base64.b64decode(read["maps"]["values"]))
    assert np.array_equal(np.frombuffer(maps, np.uint8), found.maps_LHX.numpy().ravel())


def test_tokens_are_shown_as_what_they_are():
    _, data, _ = page_of("a\n\u00e9\u2603")
    shown = [tuple(data["pieces"][number][1:]) for number in data["tokens"]]
    parts = [(BYTES, code) for code in ("C3", "A9", "E2", "98", "83")]
    assert shown == [(SPECIAL, "<s>"), (TEXT, "a"), (TEXT, "\n"), *parts]
    assert data["characters"] == {3: "\u00e9", 4: "\u00e9", 5: "\u2603", 6: "\u2603", 7: "\u2603"}


def test_a_text_cannot_become_part_of_the_page():
    text = "</script><img src=x>\u2028<!--"
    _, data, page = page_of(text)
    assert page.count("</script>") == 2 and "<img" not in page and "<title>x: &lt;/script&gt;&lt;img" in page
    assert "\u2028" not in page.partition('id="data">')[2]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none';") and not re.search(
        r"https?:", page.replace("http://www.w3.org/2000/svg", "")
    )
    for kind, content in (("script", page.rpartition("<script>")[2].partition("</script>")[0]),
                          ("style", page.partition("<style>")[2].partition("</style>")[0])):  # fmt: skip
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


@pytest.fixture
def run(monkeypatch, tmp_path):
    loaded = types.SimpleNamespace(
        model=build(), tokenizer=Bytes(), step=7, num_tokens=12345, run=tmp_path / "tiny",
        config=types.SimpleNamespace(model=types.SimpleNamespace(family="llama")),
    )  # fmt: skip
    monkeypatch.setattr("pretrain.checkpoints.run_folder.load_run", lambda run, step: loaded)
    return loaded


def test_command_writes_a_page(run, tmp_path, capsys):
    assert command.main(["tiny", "--inspect", "the cat", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    page = (tmp_path / first["out"]).read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "<title>tiny, step 7: the cat</title>" in page
    assert (first["step"], first["tokens"], first["bytes"]) == (7, 7, len(page.encode()))
    assert first["loss"] == pytest.approx(float(inspect(run.model, Bytes(), "the cat").loss_T.mean()))
    assert (tmp_path / "tiny/inspect").samefile((tmp_path / first["out"]).parent)
    (tmp_path / "text.txt").write_text("a dog", encoding="utf-8")
    out = tmp_path / "new/page.html"
    assert command.main(["tiny", "--inspect-file", str(tmp_path / "text.txt"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out} (") and "a dog" in out.read_text(encoding="utf-8")


def test_command_says_what_it_cannot_do(run, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for arguments, message in (
        ([], "RUN is tiny; expected the folder of a run that was started, with a metrics.jsonl"),
        (["--inspect", ""], "--inspect is empty; expected a text"),
        (["--inspect-file", "none.txt"], "--inspect-file is none.txt; expected a readable file of UTF-8 text ("),
        (
            ["--inspect", "a", "--out", str(tmp_path / "file/page.html")],
            f"--out is {tmp_path}/file/page.html; expected a file that",
        ),
    ):
        assert command.main(["tiny", *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.launches
def test_help_is_quick():
    code = "import sys, launch.report as r\ntry: r.main(['--help'])\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "False" and "--inspect-file" in done.stdout


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Loads the page in a frame as wide as a phone, presses a key, touches a head, and reads what is there.
PROBE = """<iframe id="frame" src="page.html" width="390" height="800"></iframe><pre id="out"></pre><script>
const wait = (ready) => new Promise((go) => { const ask = () => (ready() ? go() : setTimeout(ask, 20)); ask(); });
(async () => {
  const frame = document.getElementById("frame");
  await wait(() => frame.contentDocument?.documentElement?.dataset.ready);
  const page = frame.contentDocument, view = frame.contentWindow;
  const key = (name) => page.getElementById("text").dispatchEvent(new view.KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
  const text = (id) => page.getElementById(id).textContent;
  const out = { wide: page.documentElement.scrollWidth, tokens: page.querySelectorAll("#text [data-i]").length };
  key("Home"); out.home = text("details");
  key("ArrowRight"); out.first = text("details"); out.curve = text("curve-caption");
  page.getElementById("t5").click(); out.fifth = text("details"); out.columns = page.querySelectorAll("#lens thead th").length;
  page.querySelectorAll("#heads button")[3].click(); out.from = text("attention-from");
  key("End"); out.end = text("details"); out.rows = page.querySelectorAll("#lens tbody tr").length;
  document.getElementById("out").textContent = JSON.stringify(out);
})();</script>"""


@pytest.mark.slow
@pytest.mark.launches
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
def test_page_works_in_a_browser(tmp_path):
    found, _, page = page_of(SENTENCE)
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    (tmp_path / "probe.html").write_text(PROBE, encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--allow-file-access-from-files",
             f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", "--dump-dom"]  # fmt: skip
    done = subprocess.run(
        [BROWSER, *flags, f"file://{tmp_path}/probe.html"], capture_output=True, text=True, timeout=120
    )
    assert ":CONSOLE" not in done.stderr, done.stderr
    out = json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S)[1]))
    assert out["wide"] <= 390 and out["tokens"] == len(found.ids) + 1
    assert "given and not predicted" in out["home"]
    for place, shown in ((0, out["first"]), (4, out["fifth"])):
        assert f"loss {found.loss_T[place]:.3f} nats" in shown
        assert f"rank {int(found.guess.target_rank_P[place]) + 1}" in shown
    assert "(token 1) after each block; its rank goes from" in out["curve"]
    assert (out["columns"], out["rows"]) == (33, 3) and out["end"].startswith("What follows?entropy")
    shares = shares_of(found, 1, 3)[5]
    most = int(shares.argmax())
    place, percent = re.search(r"looks at “.*?” \((\d+)\) ([\d.]+)%", out["from"]).groups()
    assert int(place) == most and float(percent) == pytest.approx(100 * float(shares[most]), abs=0.1)
