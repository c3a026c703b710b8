"""The page of a report: what it holds, that nothing in it becomes markup, and how it behaves in a browser."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import zlib

import pytest
from plotly.offline import get_plotlyjs

from launch import report as command
from tests.reporting.report_helpers import lines_of, loss_of, training_line, write_run

MARKUP = "</script><img src=x onerror=alert(1)>\u2028<!--"


def page_of(*folders, out):
    assert command.main([*map(str, folders), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_nothing_in_a_run_becomes_part_of_the_page(tmp_path):
    lines = [
        *lines_of(5),
        {"step": 3, "event": "spike", "message": MARKUP},
        training_line(6, **{f"tokens/{MARKUP}": 5}),
    ]
    folder = write_run(tmp_path / "<b>run", lines)
    (folder / "samples/step-00000003.txt").write_text(f"\n--- prompt '', ended by eos ---\n{MARKUP}", encoding="utf-8")
    (folder / "log.txt").write_text(MARKUP, encoding="utf-8")
    page = page_of(folder, out=tmp_path / "page.html")
    assert page.count("</script>") == 3 and "<img" not in page and "<b>run" not in page
    assert "<title>&lt;b&gt;run</title>" in page and "\u2028" not in page
    [content] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    [run] = json.loads(content)["runs"]
    assert (
        run["log"] == MARKUP.replace("\u2028", "\n")
        and [3, "spike", MARKUP] in run["events"]
        and MARKUP in run["curves"]["mixture"]
    )


def test_the_page_may_load_nothing_and_runs_its_own_scripts_alone(tmp_path):
    page = page_of(write_run(tmp_path / "a"), out=tmp_path / "page.html")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith(
        "default-src 'none'; img-src data: blob:; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'; script-src 'sha256-"
    )
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    [packed] = re.findall(r'<script type="application/octet-stream" id="library">(.*?)</script>', page)
    library = zlib.decompress(base64.b64decode(packed)).decode()
    assert library == get_plotlyjs() and "Licensed under the MIT license" in library[:300]
    digests = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (script, library)
    ]
    assert policy.partition("script-src ")[2] == " ".join(digests)
    assert len(page) < 3_000_000 and not re.search(r"https?:|url\(", page.replace(packed, ""))


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Loads the page in a frame, uses it as people do, and reads what is there. High enough that every chart is seen.
PROBE = """<iframe id="frame" src="page.html" width="WIDTH" height="14000"></iframe><pre id="out"></pre><script>
const wait = (ready) => new Promise((go) => { const ask = () => (ready() ? go() : setTimeout(ask, 20)); ask(); });
const pause = () => new Promise((go) => setTimeout(go, 50));
(async () => {
  const frame = document.getElementById("frame");
  await wait(() => frame.contentDocument?.documentElement?.dataset.ready);
  const page = frame.contentDocument, view = frame.contentWindow, $ = (id) => page.getElementById(id);
  const figure = (title) => [...page.querySelectorAll(".chart")].find((one) => one.textContent.includes(title));
  const plot = (title) => figure(title)?.querySelector(".plot");
  const lines = (title) => (plot(title)?.data ?? []).filter((trace) => trace.hoverinfo !== "skip" && trace.name !== "events");
  const press = (name) => figure("Training loss").dispatchEvent(new view.KeyboardEvent("keydown", { key: name, bubbles: true }));
  const button = (place, text) => [...place.querySelectorAll("button")].find((one) => one.textContent.includes(text));
  await wait(() => [...page.querySelectorAll(".chart")].every((one) => one.querySelector(".main-svg") || !one.querySelector(".empty").hidden));
  await pause();
  const out = { wide: page.documentElement.scrollWidth, charts: page.querySelectorAll(".chart").length, drawn: page.querySelectorAll(".chart .main-svg").length > 0 };
  out.empty = [...page.querySelectorAll(".chart")].filter((one) => !one.querySelector(".empty").hidden).map((one) => one.querySelector("b").textContent);
  out.paths = [...page.querySelectorAll(".chart")].filter((one) => one.querySelector(".js-line, .js-fill")).length;
  out.loss = lines("Training loss").map((trace) => [trace.name, trace.x.length, trace.y[0], trace.y.at(-1)]);
  out.heldOut = lines("Held-out loss").map((trace) => [trace.name, trace.x, trace.y]);
  out.marks = plot("Training loss").data?.filter((trace) => trace.name === "events").map((trace) => [trace.marker.symbol, trace.x, trace.text]);
  out.events = [...page.querySelectorAll("#event-list tbody tr")].map((row) => row.textContent);
  out.text = Object.fromEntries(["about", "notes", "figures", "differences", "phases", "start-parts", "corpora", "sample-box", "kept", "starts", "versions", "log"].map((id) => [id, $(id).textContent]));
  out.mixture = lines("Mixture").map((trace) => [trace.name, trace.y.at(-1)]);
  out.phases = lines("Seconds of a step, by phase").map((trace) => [trace.name, trace.y.at(-1)]);
  out.layers = lines("By layer").map((trace) => [trace.name, trace.x, trace.y.at(-1), trace.line.color]);
  out.images = page.querySelectorAll("main img").length;
  if (out.loss.length) {
    $("smooth").value = 0; $("smooth").dispatchEvent(new view.Event("input"));
    button($("axis"), "tokens").click();
    await pause();
    out.byTokens = lines("Training loss").map((trace) => [trace.x.at(-1), trace.y.at(-1)]);
    press("+"); await pause();
    out.zoomed = [plot("Training loss").layout.xaxis.range, plot("Gradient norm").layout.xaxis.range, $("from").value];
    figure("Training loss").querySelector("button").click(); await pause();
    out.log = plot("Training loss").layout.yaxis.type;
    $("whole").click(); await pause();
    out.whole = plot("Gradient norm").layout.xaxis.range;
    await view.Plotly.relayout(plot("Training loss"), { "xaxis.range[0]": 1000, "xaxis.range[1]": 2000 }); await pause();
    out.dragged = plot("Gradient norm").layout.xaxis.range;
    $("find").value = "going on after step 60"; $("find").dispatchEvent(new view.Event("input"));
    out.found = [...page.querySelectorAll("#event-list tbody tr")].map((row) => row.textContent);
    const picture = await view.Plotly.toImage(plot("Training loss"), { format: "png", width: 300, height: 200 });
    out.picture = picture.slice(0, 22);
    out.sample = page.querySelectorAll("#samples article").length;
    const runs = $("runs").querySelectorAll("button");
    if (runs.length) {
      runs[0].click(); await pause();
      out.one = lines("Training loss").map((trace) => trace.name);
      const which = page.querySelector("#which select"); which.value = 1; which.dispatchEvent(new view.Event("change"));
      out.other = $("starts").textContent;
    }
  }
  document.getElementById("out").textContent = JSON.stringify(out);
})();</script>"""


def look(folder, *runs, width=1280):
    """Open the page of runs, and return what the probe has seen."""
    page_of(*runs, out=folder / "page.html")
    (folder / "probe.html").write_text(PROBE.replace("WIDTH", str(width)), encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--allow-file-access-from-files",
             f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=120000", "--window-size=1400,14100", "--dump-dom"]  # fmt: skip
    done = subprocess.run([BROWSER, *flags, f"file://{folder}/probe.html"], capture_output=True, text=True, timeout=200)
    assert ":CONSOLE" not in done.stderr, done.stderr  # no error, and nothing that the policy had to refuse
    return json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S)[1]))


needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium is installed (Debian: apt-get install chromium)"
)


@pytest.mark.slow
@pytest.mark.launches
@needs_browser
def test_page_of_a_run_works_in_a_browser(tmp_path):
    lines = lines_of(90, step_50={"step_seconds": 4.0})
    lines += [{"step": 40, "event": "spike", "message": "<b>loss</b> is <img src=x>"}]
    out = look(tmp_path, write_run(tmp_path / "<i>a", lines), width=390)
    assert out["wide"] <= 390 and out["charts"] == out["paths"] == 16 and out["empty"] == [] and out["images"] == 0
    assert out["loss"] == [["", 90, pytest.approx(loss_of(1), rel=1e-4), pytest.approx(loss_of(90), rel=1e-4)]]
    assert [name for name, *_ in out["heldOut"]] == ["together", "web", "code", "books", "math", "wiki"]
    assert out["heldOut"][2][1] == [30, 60, 90] and out["heldOut"][2][2] == pytest.approx(
        [loss_of(step) + 0.3 for step in (30, 60, 90)], rel=1e-4
    )
    assert [name for name, *_ in out["layers"]] == [f"layer {layer}" for layer in range(12)]
    assert (
        out["layers"][11][1] == list(range(10, 91, 10))
        and out["layers"][11][2] == pytest.approx(11.9)
        and out["layers"][11][3] == "#d55e00"
    )
    trouble, course = out["marks"]
    assert (trouble[0], trouble[1]) == ("triangle-up", [40, 50]) and (course[0], course[1]) == (
        "diamond",
        [0, 30, 60, 90],
    )
    assert trouble[2][0] == "step 40<br><b>spike</b> &lt;b&gt;loss&lt;/b&gt; is &lt;img src=x&gt;"
    assert "40spike<b>loss</b> is <img src=x>" in out["events"] and not any(
        "first_step" in row for row in out["events"]
    )
    for place, texts in {
        "about": ["done", "trained 90 steps"], "figures": ["steps90 of 90", f"best held-out loss{loss_of(90) + 0.2:.4f} at step 90"],
        "phases": ["forward300 ms", "rest"], "start-parts": ["start at step 60", "imports4.0 s4.0 s4.0 s", "all7.0 s37.0 s67.0 s"],
        "corpora": ["web36,00040%"], "sample-box": ["step 30, ended by length"], "kept": ["held-outsources.web.loss2.25"],
        "starts": ["node2", "8 × H100", "launch/pretrain.py c2.yaml"], "versions": ["torch2.13.0, then 2.14.0"], "log": ["INFO step 90/90"],
    }.items():  # fmt: skip
        for text in texts:
            assert text in out["text"][place], (place, out["text"][place])
    assert dict(out["mixture"]) == pytest.approx({"web": 0.4, "code": 0.3, "books": 0.15, "math": 0.1, "wiki": 0.05})
    assert dict(out["phases"])["forward"] == pytest.approx(0.3) and out["byTokens"] == [
        [90_000, pytest.approx(loss_of(90), rel=1e-4)]
    ]
    (low, high), other, shown = out["zoomed"]
    assert (
        high - low == pytest.approx(1.04 * 90_000 / 2)
        and other == [low, high]
        and float(shown) == pytest.approx(low, rel=1e-4)
    )
    assert out["log"] == "log" and out["whole"] == [-1800, 91_800] and out["dragged"] == [1000, 2000]
    assert (
        out["found"] == ["60startgoing on after step 60"]
        and out["picture"] == "data:image/png;base64,"
        and out["sample"] == 2
    )


@pytest.mark.slow
@pytest.mark.launches
@needs_browser
def test_page_of_several_runs_works_in_a_browser(tmp_path):
    runs = [
        write_run(tmp_path / "x"),
        write_run(tmp_path / "y", lines_of(40), lr=5e-4),
        write_run(tmp_path / "none", []),
        write_run(tmp_path / "one", lines_of(1)),
    ]
    out = look(tmp_path, *runs)
    assert [(name, count) for name, count, *_ in out["loss"]] == [("x", 90), ("y", 40), ("one", 1)]
    assert out["byTokens"] == [
        [90_000, pytest.approx(loss_of(90), rel=1e-4)],
        [40_000, pytest.approx(loss_of(40), rel=1e-4)],
        [1000, pytest.approx(loss_of(1), rel=1e-4)],
    ]
    assert (
        "optim.lr0.0010.00050.0010.001" in out["text"]["differences"]
        and "none: No step is recorded yet." in out["text"]["notes"]
    )
    assert out["one"] == ["y", "one"] and "c2.yaml" in out["other"]


@pytest.mark.slow
@pytest.mark.launches
@needs_browser
def test_page_of_a_run_without_steps_opens(tmp_path):
    folder = write_run(tmp_path / "a", [])
    for name in ("samples", "evaluations", "checkpoints"):
        shutil.rmtree(folder / name)
    out = look(tmp_path, folder)
    assert (
        out["paths"] == 0 and len(out["empty"]) == out["charts"] and "No step is recorded yet." in out["text"]["notes"]
    )
    assert "No text was sampled" in out["text"]["sample-box"] and "Nothing was evaluated" in out["text"]["kept"]
