// The curves of a report, and the start of the page.
const GIB = 1 / 2 ** 30;
const CURVES = [
  ["Training loss (nats per token)", { log: false }, [["loss", "cross-entropy"], ["objective", "objective: what is minimised"]]],
  ["held-out"],
  ["Gradient norm", { log: false }, [["grad_norm", "before clipping"]]],
  ["Learning rate", { log: false, tickformat: ".3~g" }, [["lr", "as used", { smooth: false }]]],
  ["Tokens per second", { log: false }, [["tokens_per_second", "all ranks"], ["tokens_per_second_per_gpu", "each rank"]]],
  ["Model FLOPs utilisation", { tickformat: ".3~p" }, [["mfu", "usual count"], ["mfu_causal", "causal attention counted once"]]],
  ["Seconds of a step", { log: false }, [["step_seconds", "whole step"], ["data_wait_seconds", "waiting for data"]]],
  ["Peak memory of rank 0 (GiB)", {}, [["memory_bytes", "memory", { scale: GIB, smooth: false }]]],
  ["Steps out of the ordinary, so far", {}, [["clipped_steps", "clipped"], ["skipped_steps", "skipped"]].map((one) => [...one, { smooth: false }])],
];
const LAYER = /^layer\/(\d+|embedding|final_norm|output)\/(.+)$/; // a block's number, or what is no block; what is measured there
const AROUND = { embedding: ["embedding", -1, 2], final_norm: ["final norm", 1e6, 3], output: ["output layer", 1e7, 4] }; // name, place, colour
const DRAWN_ELSEWHERE = /^(epoch\/|attempt$|damaged_|tokens$)/;

function addCurves() {
  const known = new Set(CURVES.flatMap(([, , keys]) => (keys ?? []).map(([key]) => key)));
  const others = [...new Set(RUNS.flatMap((run) => Object.keys(run.curves.series)))].filter((key) => !known.has(key) && !DRAWN_ELSEWHERE.test(key) && !LAYER.test(key));
  const all = others.length ? [...CURVES, ["Other values", { log: false }, others.sort(new Intl.Collator("en", { numeric: true }).compare).map((key) => [key, key])]] : CURVES;
  for (const [title, options, keys] of all) {
    if (title === "held-out") {
      addHeldOut();
      continue;
    }
    const there = keys.filter(([key]) => RUNS.some((run) => run.curves.series[key]));
    let chosen = there[0]?.[0];
    const lines = () => (chosen ? RUNS.map((run, index) => lineOf(index, chosen, RUNS.length > 1 ? run.name : "", { ...(there.find(([key]) => key === chosen)[2] ?? {}), dash: dashOf(index) })) : []);
    addChart("charts", title, lines, { ...options, choices: [["What is drawn", there, chosen, (value) => { chosen = value; }]] });
  }
}

// One line a layer, from the embedding to the output, of the run that is chosen below; what is no block has a colour of its own.
function addLayers() {
  const found = [...new Set(RUNS.flatMap((run) => Object.keys(run.curves.series)))].map((key) => LAYER.exec(key)).filter(Boolean);
  if (!found.length) return;
  const measures = [...new Set(found.map(([, , measure]) => measure))];
  let chosen = measures[0];
  const lines = () => {
    const place = ([, layer]) => AROUND[layer]?.[1] ?? Number(layer);
    const own = found.filter(([, , measure]) => measure === chosen).sort((a, b) => place(a) - place(b)), blocks = own.filter(([, layer]) => !AROUND[layer]);
    return own.map((one) => {
      const [key, layer] = one, [name, , colour] = AROUND[layer] ?? [`layer ${layer}`, 0, colourBetween(blocks.indexOf(one), blocks.length)];
      return lineOf(view.detail, key, name, { colour, dash: AROUND[layer] ? "dot" : "solid" });
    });
  };
  const legend = Object.entries(AROUND).filter(([layer]) => found.some(([, own]) => own === layer)).map(([, [name, , colour]]) => [name, colour]);
  addChart("charts", "By layer, the first blue, the last orange", lines, { log: false, choices: [["What is measured", measures.map((name) => [name, name]), chosen, (value) => { chosen = value; }]], legend });
}

const isTask = (key) => key.startsWith("task/") && key.split("/").length > 2;

function evalLine(index, key, name, colour, extra = {}) {
  const { evals } = RUNS[index], values = evals.values[key];
  if (!values) return null;
  const x = view.axis === "tokens" ? evals.tokens : view.axis === "hours" ? evals.hours : evals.step;
  return { name, steps: evals.step, x, mean: values, smooth: false, colour, run: index, dash: dashOf(colour), dots: 5, ...extra };
}

function addHeldOut() {
  const measures = [["loss", "loss (nats per token)"], ["bits_per_byte", "bits per byte"], ["perplexity", "perplexity"]].filter(([key]) => RUNS.some((run) => run.evals.values[key]));
  const sources = [...new Set(RUNS.flatMap((run) => Object.keys(run.evals.values)))].filter((key) => key.endsWith("/loss") && !isTask(key)).map((key) => key.slice(0, -"/loss".length));
  let measure = "loss", source = "";
  const isOne = RUNS.length === 1;
  const lines = () => isOne
    ? [evalLine(0, measure, "together", 0, { width: 2.6, dots: 6 }), ...sources.map((name, number) => evalLine(0, `${name}/${measure}`, name, number + 1, { width: 1.3, dots: 4 }))]
    : RUNS.map((run, index) => evalLine(index, source ? `${source}/${measure}` : measure, run.name, index));
  const choices = [["Measure", measures, measure, (value) => { measure = value; }]];
  if (!isOne) choices.push(["Source", [["", "all sources"], ...sources.map((name) => [name, name])], "", (value) => { source = value; }]);
  addChart("charts", "Held-out loss", lines, { log: false, choices, legend: isOne ? ["together", ...sources].map((name, number) => [name, number]) : [] });
}

function addTasks() {
  const keys = [...new Set(RUNS.flatMap((run) => Object.keys(run.evals.values)))].filter((key) => isTask(key) && !key.endsWith("_stderr"));
  if (!keys.length) return;
  let chosen = keys[0];
  const lines = () => RUNS.map((run, index) => evalLine(index, chosen, RUNS.length > 1 ? run.name : "", index));
  addChart("task-charts", "Tasks during training", lines, { choices: [["Task", keys.map((key) => [key, key.slice("task/".length)]), chosen, (value) => { chosen = value; }]] });
}

// What one run's sections draw; the run is the chosen one.
function addOwnCharts() {
  const run = () => RUNS[view.detail];
  const phases = [...new Set(RUNS.flatMap((one) => Object.keys(one.curves.phases)))];
  const stack = (name, colour, mean, smooth, write) => ({ name, steps: run().curves.step, x: placesOf(run().curves), mean, counts: run().curves.steps, smooth, colour, write });
  const timeLines = () => {
    const { curves } = run(), whole = curves.series.step_seconds?.[0];
    const own = phases.map((name, index) => (curves.phases[name] ? stack(name, index, curves.phases[name], true, seconds) : null));
    const rest = whole?.map((value, index) => Math.max(0, (value ?? 0) - Object.values(curves.phases).reduce((sum, part) => sum + (part[index] ?? 0), 0)));
    return phases.length && rest ? [...own, stack("rest", phases.length, rest, true, seconds)] : [];
  };
  addChart("time-charts", "Seconds of a step, by phase", timeLines, { stacked: true, legend: [...phases, "rest"].map((name, index) => [name, index]) });
  addChart("time-charts", "Waiting for data (share of the step)", () => {
    const { curves } = run(), wait = curves.series.data_wait_seconds?.[0], whole = curves.series.step_seconds?.[0];
    return wait && whole ? [{ ...stack("", view.detail, wait.map((value, index) => (value === null || !whole[index] ? null : value / whole[index])), true), dash: "solid" }] : [];
  }, { tickformat: ".3~p" });

  const corpora = [...new Set(RUNS.flatMap((one) => Object.keys(one.curves.mixture)))], legend = corpora.map((name, index) => [name, index]);
  let way = "window";
  addChart("data-charts", "Mixture (share of tokens)", () => {
    const { curves } = run(), size = Math.ceil(curves.step.length / 50);
    const taken = corpora.map((name) => curves.mixture[name] ?? []), places = placesOf(curves);
    const ends = curves.step.map((_, index) => index).filter((index) => (index + 1) % size === 0 || index === curves.step.length - 1);
    const parts = taken.map((tokens) => ends.map((end, number) => tokens.slice(way === "window" && number ? ends[number - 1] + 1 : 0, end + 1).reduce((sum, value) => sum + (value ?? 0), 0)));
    const sums = ends.map((_, index) => parts.reduce((sum, part) => sum + part[index], 0));
    return corpora.map((name, index) => ({
      name, steps: ends.map((end) => curves.step[end]), x: ends.map((end) => places[end]), mean: parts[index].map((value, at) => (sums[at] ? value / sums[at] : 0)), smooth: false, colour: index, write: share,
    }));
  }, { stacked: true, top: 1, tickformat: ".0%", legend, choices: [["Over which steps", [["window", "fiftieths of the run"], ["all", "since the start"]], way, (value) => { way = value; }]] });
  addChart("data-charts", "Epochs", () => corpora.map((name, index) => ({ ...lineOf(view.detail, `epoch/${name}`, name, { smooth: false, colour: index, dash: dashOf(index) }) })).filter((line) => line.x), { log: false, legend });
  addChart("data-charts", "Damaged, so far", () => [["damaged_documents", "documents", 0], ["damaged_tokens", "tokens", 1]].map(([key, name, colour]) => lineOf(view.detail, key, name, { smooth: false, colour })), { legend: [["documents", 0], ["tokens", 1]] });
}

function showRun(number) {
  view.detail = number;
  const run = RUNS[number];
  for (const show of [showTime, showCorpora, showSamples, showKept, showEnvironment]) show(run);
  redraw();
}

function setSmoothing() {
  const value = Number($("smooth").value), most = Math.max(2, LONGEST / 4);
  view.halfLife = value ? most ** (value / 100) : 0;
  const shown = view.halfLife < 10 ? Number(view.halfLife.toFixed(1)) : Math.round(view.halfLife);
  $("smooth-text").textContent = value ? `half-life ${shown.toLocaleString("en-US")} steps` : "off";
  redraw();
}

function addTools(listEvents) {
  for (const [axis, [name]] of Object.entries(AXES)) {
    const button = make("button", { type: "button", textContent: name });
    button.setAttribute("aria-pressed", axis === view.axis);
    button.addEventListener("click", () => {
      const run = RUNS.find((one) => one.curves.step.length), steps = view.range && run && view.range.map((place) => stepAt(run, place));
      view.axis = axis;
      for (const other of $("axis").children) other.setAttribute("aria-pressed", other === button);
      showWindow(steps ? steps.map((step) => placeOf(run, step)) : null);
    });
    $("axis").append(button);
  }
  const most = Math.max(2, LONGEST / 4), half = Math.min(LONGEST / 100, 30 + LONGEST / 1000);
  $("smooth").value = half > 1 ? Math.round((100 * Math.log(half)) / Math.log(most)) : 0;
  $("smooth").addEventListener("input", setSmoothing);
  for (const id of ["from", "to"]) $(id).addEventListener("change", () => {
    const [low, high] = wholeRange(), read = (name, other) => ($(name).value === "" ? other : Number($(name).value));
    showWindow($("from").value === "" && $("to").value === "" ? null : [read("from", low), read("to", high)]);
  });
  $("whole").addEventListener("click", () => showWindow(null));
  $("marks").addEventListener("change", () => { view.marks = $("marks").checked; redraw(); });
  if (RUNS.length > 1) RUNS.forEach((run, index) => $("runs").append(press([swatch(index, dashOf(index) !== "solid"), run.name], true, (isOn) => {
    if (isOn) view.hidden.delete(index);
    else view.hidden.add(index);
    listEvents();
    redraw();
  }, { className: "chip" })));
}

function stepAt(run, place) {
  if (view.axis === "step") return place;
  const places = placesOf(run.curves), { step: steps } = run.curves, at = places.findIndex((one) => one >= place);
  if (at < 0) return steps.at(-1);
  if (at === 0) return places[0] ? (steps[0] * place) / places[0] : steps[0];
  return steps[at - 1] + ((steps[at] - steps[at - 1]) * (place - places[at - 1])) / (places[at] - places[at - 1] || 1);
}

function curvesHint() {
  const widest = Math.max(...RUNS.map((run) => run.curves.width));
  const buckets = widest > 1 ? ` There are more steps than a page can draw: each point stands for up to ${widest.toLocaleString("en-US")} steps, the line for their mean, the band for their least and greatest values.` : "";
  const zoom = TOUCH ? "“from” and “to” zoom, for all curves at once." : "Drag to zoom all curves, double-click to see the whole run.";
  return `${zoom} A curve that has the focus follows arrow keys, + and −.${buckets} Marks at the bottom are events: ▲ trouble, ◆ the run's course, ● notes.`;
}

async function unpackLibrary() {
  const packed = Uint8Array.from(atob($("library").textContent), (letter) => letter.charCodeAt(0));
  const text = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"))).text();
  document.head.append(make("script", { textContent: text }));
}

async function begin() {
  readColours();
  showHead();
  showFigures();
  const listEvents = showEvents();
  $("curves-hint").textContent = curvesHint();
  addTools(listEvents);
  if (RUNS.length > 1) $("which").append("The sections below are of the run", choose("Run of the sections below", RUNS.map((run, index) => [index, run.name]), 0, (value) => showRun(Number(value))));
  await unpackLibrary();
  addCurves();
  addLayers();
  addOwnCharts();
  addTasks();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); redraw(); });
  showRun(0);
  setSmoothing();
  document.documentElement.dataset.ready = "yes";
}
begin();
