// Curves: one axis, one window and one smoothing for all of them.
const AXES = { step: ["steps", "step"], tokens: ["tokens", "tokens"], hours: ["hours", "hours since the first start"] };
const TOUCH = matchMedia("(pointer: coarse)").matches; // a drag scrolls the page there
const LONGEST = Math.max(1, ...RUNS.map((run) => run.curves.step.at(-1) ?? 1));
const view = { axis: "step", halfLife: 0, range: null, marks: true, hidden: new Set(), detail: 0, offKinds: new Set() };
const charts = [];
let colours = {};

function readColours() {
  const style = getComputedStyle(document.documentElement);
  const names = ["bg", "fg", "muted", "line", "panel", "hot", "accent", "grid", ...Array.from({ length: COLOURS }, (_, index) => `c${index}`)];
  colours = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}
const colourOf = (index) => (typeof index === "string" ? index : colours[`c${index % COLOURS}`]);

function partsOf(colour) {
  const digits = colour.length === 4 ? colour.replace(/[0-9a-f]/gi, "$&$&") : colour;
  return [1, 3, 5].map((place) => parseInt(digits.slice(place, place + 2), 16));
}
const seeThrough = (colour, opacity) => `rgba(${partsOf(colour).join(",")},${opacity})`;

// The colour of the number-th of so many things that have an order, such as layers.
function colourBetween(number, count) {
  const [first, last] = [partsOf(colourOf(0)), partsOf(colourOf(1))];
  return `#${first.map((part, index) => Math.round(part + ((last[index] - part) * number) / Math.max(1, count - 1)).toString(16).padStart(2, "0")).join("")}`;
}
const DASHES = ["solid", "dash", "dot", "dashdot"];
const dashOf = (index) => DASHES[Math.floor(index / COLOURS) % DASHES.length];

// plotly.js takes some tags in its texts for markup.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function wrap(text, width = innerWidth < 700 ? 34 : 64) {
  const lines = [""];
  for (const word of text.slice(0, 600).split(/\s+/)) {
    if (lines.at(-1).length + word.length > width && lines.at(-1)) lines.push("");
    lines[lines.length - 1] += (lines.at(-1) ? " " : "") + word.slice(0, 4 * width);
  }
  return lines.slice(0, 12).map(plain).join("<br>");
}

function placesOf(curves) {
  const places = curves[view.axis];
  return places && places.length ? places : curves.step;
}

// Where a step is on the axis: between the two that there are.
function placeOf(run, step) {
  if (view.axis === "step") return step;
  const { step: steps } = run.curves, places = placesOf(run.curves);
  if (!steps.length) return 0;
  let low = 0, high = steps.length - 1;
  if (step <= steps[0]) return steps[0] ? (places[0] * step) / steps[0] : places[0];
  if (step >= steps[high]) return places[high];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle;
    else high = middle;
  }
  return places[low] + ((places[high] - places[low]) * (step - steps[low])) / (steps[high] - steps[low]);
}

// An exponential mean whose weights halve every `halfLife` steps; divided by their sum, so the first values are not pulled to 0.
function smoothed(steps, values, counts, halfLife) {
  if (!halfLife) return values;
  let sum = 0, weight = 0, last = null;
  return values.map((value, index) => {
    if (value === null) return null;
    const decay = last === null ? 0 : 0.5 ** ((steps[index] - last) / halfLife), count = counts ? counts[index] : 1;
    last = steps[index];
    sum = sum * decay + value * count;
    weight = weight * decay + count;
    return sum / weight;
  });
}

// A line of a chart from a series of a run: [mean], or [mean, least, greatest] of buckets.
function lineOf(runNumber, key, name, { scale = 1, smooth = true, colour = runNumber, dash = "solid" } = {}) {
  const { curves } = RUNS[runNumber], series = curves.series[key];
  if (!series) return null;
  const [mean, least, greatest] = series.map((part) => (scale === 1 ? part : part.map((value) => (value === null ? null : value * scale))));
  return { name, steps: curves.step, x: placesOf(curves), mean, least, greatest, counts: curves.steps, smooth, colour, dash, run: runNumber };
}

function withoutGaps(line, ...columns) {
  const kept = line.x.map((_, index) => index).filter((index) => columns[0][index] !== null && line.x[index] !== null);
  return [line.x, ...columns].map((column) => kept.map((index) => column[index]));
}

function tracesOf(line) {
  const colour = colourOf(line.colour), shown = line.smooth ? smoothed(line.steps, line.mean, line.counts, view.halfLife) : line.mean;
  const isSmoothed = shown !== line.mean, traces = [], quiet = { hoverinfo: "skip", showlegend: false, mode: "lines" };
  if (line.least) {
    const [x, least, greatest] = withoutGaps(line, line.least, line.greatest);
    traces.push({ ...quiet, x, y: greatest, line: { width: 0.5, color: colour }, opacity: 0.45 });
    traces.push({ ...quiet, x, y: least, line: { width: 0.5, color: colour }, opacity: 0.45, fill: "tonexty", fillcolor: seeThrough(colour, 0.22) });
  } else if (isSmoothed) {
    const [x, y] = withoutGaps(line, line.mean);
    traces.push({ ...quiet, x, y, line: { width: 1, color: colour }, opacity: 0.35 });
  }
  const [x, y, mean, least, greatest] = withoutGaps(line, shown, line.mean, line.least ?? line.mean, line.greatest ?? line.mean);
  const text = y.map((value, index) => {
    const parts = [];
    if (isSmoothed) parts.push(`${line.least ? "mean" : "here"} ${format(mean[index])}`);
    if (line.least) parts.push(`${format(least[index])} to ${format(greatest[index])}`);
    return plain(`${line.name ? line.name + ": " : ""}${format(value, 5)}${parts.length ? ` (${parts.join("; ")})` : ""}`);
  });
  const few = x.length <= (line.dots ? 60 : 2);
  traces.push({
    x, y, text, hovertemplate: "%{text}<extra></extra>", mode: few ? "lines+markers" : "lines", name: plain(line.name), showlegend: false,
    line: { width: line.width ?? 1.8, color: colour, dash: line.dash }, marker: { size: line.dots ?? 5, color: colour },
  });
  return traces;
}

function stackOf(line) {
  const shown = line.smooth ? smoothed(line.steps, line.mean, line.counts, view.halfLife) : line.mean, colour = colourOf(line.colour);
  const y = shown.map((value) => value ?? 0);
  return {
    x: line.x, y, stackgroup: "one", mode: "lines", name: plain(line.name), showlegend: false, line: { width: 0.8, color: colour },
    fillcolor: seeThrough(colour, 0.6), text: y.map((value) => plain(`${line.name}: ${line.write(value)}`)), hovertemplate: "%{text}<extra></extra>",
  };
}

// Events under the curves: one mark for all of a run at one step.
const TROUBLE = /spike|rollback|skipped|fault|failed|straggler|slow|damaged|lost|corrupt|unreachable|little_space|clock_skew|uneven/;
const COURSE = new Set(["start", "phase", "done", "stopped", "checkpoint", "config_changed", "resumed_from"]);
const groupOf = (kind) => (TROUBLE.test(kind) ? 0 : COURSE.has(kind) ? 1 : 2);
const GROUPS = [
  { symbol: "triangle-up", colour: "hot", size: 10 },
  { symbol: "diamond", colour: "accent", size: 8 },
  { symbol: "circle", colour: "muted", size: 5 },
];

function marks() {
  const found = GROUPS.map(() => ({ x: [], text: [], edge: [] }));
  RUNS.forEach((run, number) => {
    if (view.hidden.has(number)) return;
    const bySteps = new Map();
    for (const event of run.events) if (!view.offKinds.has(event[1])) bySteps.set(event[0], [...(bySteps.get(event[0]) ?? []), event]);
    for (const [step, events] of bySteps) {
      const worst = found[Math.min(...events.map((event) => groupOf(event[1])))];
      const lines = events.slice(0, 4).map(([, kind, message]) => `<b>${plain(kind)}</b> ${wrap(message)}`);
      if (events.length > 4) lines.push(`and ${events.length - 4} more: see the list`);
      worst.x.push(placeOf(run, step));
      worst.edge.push(RUNS.length > 1 ? colourOf(number) : colours.bg);
      worst.text.push(`step ${step.toLocaleString("en-US")}${RUNS.length > 1 ? ` of ${plain(run.name)}` : ""}<br>${lines.join("<br>")}`);
    }
  });
  return found.map(({ x, text, edge }, group) => ({
    x, y: x.map(() => 0.035), text, yaxis: "y2", mode: "markers", showlegend: false, cliponaxis: false, hovertemplate: "%{text}<extra></extra>", name: "events",
    marker: { symbol: GROUPS[group].symbol, size: GROUPS[group].size, color: colours[GROUPS[group].colour], line: { width: RUNS.length > 1 ? 2 : 1, color: edge } },
  })).filter((trace) => trace.x.length);
}

// The least and greatest value in the window, with some air.
function boundsOf(traces, chart) {
  let [low, high] = [Infinity, -Infinity];
  for (const onlyInside of view.range ? [true, false] : [false]) {
    for (const trace of traces) {
      trace.x.forEach((x, index) => {
        const y = trace.y[index];
        if (y === null || (chart.log && y <= 0) || (onlyInside && (x < view.range[0] || x > view.range[1]))) return;
        if (y < low) low = y;
        if (y > high) high = y;
      });
    }
    if (low <= high) break;
  }
  if (low > high) return null;
  if (chart.log) return [Math.log10(low) - 0.04, Math.log10(high) + 0.04].map((value, index) => value + (low === high ? (index ? 0.1 : -0.1) : 0));
  const isFlat = high - low <= 1e-6 * Math.max(Math.abs(low), Math.abs(high)); // what smoothing rounds is no change
  const air = isFlat ? Math.abs(high) * 0.05 || 1 : 0.06 * (high - low);
  const floor = low >= 0 && low - air < 0 ? -0.03 * (high + air) : low - air;
  return [floor, high + air];
}

function layoutOf(chart, bounds) {
  const axis = { gridcolor: colours.grid, linecolor: colours.line, zerolinecolor: colours.line, tickfont: { size: 11 }, automargin: true };
  return {
    autosize: true, margin: { l: 52, r: 10, t: 6, b: 34 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colours.muted, family: "system-ui, sans-serif", size: 12 },
    hovermode: "x unified", hoverdistance: 12, dragmode: TOUCH ? false : "zoom", showlegend: false,
    hoverlabel: { bgcolor: colours.panel, bordercolor: colours.line, font: { color: colours.fg, size: 12 }, align: "left" },
    xaxis: { ...axis, title: { text: AXES[view.axis][1], font: { size: 11 }, standoff: 6 }, range: view.range ?? wholeRange(), hoverformat: view.axis === "hours" ? ".4f" : ",.6~g" },
    yaxis: { ...axis, type: chart.log ? "log" : "linear", range: chart.y ?? bounds, tickformat: chart.tickformat, ...(chart.log ? { dtick: bounds && bounds[1] - bounds[0] > 1 ? 1 : "D2", exponentformat: "power" } : {}) },
    yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
  };
}

function wholeRange() {
  const ends = RUNS.flatMap((run, number) => (view.hidden.has(number) ? [] : [placesOf(run.curves).at(-1) ?? 0, ...run.evals.step.slice(-1).map((step) => placeOf(run, step))]));
  const end = Math.max(0, ...ends) || 1;
  return [-0.02 * end, 1.02 * end];
}

function draw(chart) {
  chart.dirty = false;
  const lines = chart.lines().filter((line) => line && !chart.off.has(line.name) && !view.hidden.has(line.run) && line.mean.some((value) => value !== null));
  chart.empty.hidden = lines.length > 0;
  chart.plot.hidden = !lines.length;
  if (!lines.length) return;
  const traces = chart.stacked ? lines.map(stackOf) : lines.flatMap(tracesOf);
  let bounds = boundsOf(traces, chart);
  if (chart.stacked) {
    const sums = lines[0].x.map((_, index) => traces.reduce((sum, trace) => sum + trace.y[index], 0));
    bounds = [0, (chart.top ?? 1.05 * Math.max(...sums)) || 1];
  }
  const label = lines.slice(0, 8).map((line) => {
    const known = line.mean.filter((value) => value !== null);
    return `${line.name || chart.title}: ${format(known[0])} at first, ${format(known.at(-1))} at last, from ${format(known.reduce((a, b) => Math.min(a, b)))} to ${format(known.reduce((a, b) => Math.max(a, b)))}`;
  });
  chart.plot.setAttribute("aria-label", `${chart.title}. ${label.join("; ")}`);
  const settings = { responsive: true, displayModeBar: false, doubleClick: false, showTips: false };
  Plotly.react(chart.plot, [...traces, ...(view.marks ? marks() : [])], layoutOf(chart, bounds), settings);
  if (!chart.listens) {
    chart.listens = true;
    // plotly.js would keep a finger from scrolling the page; a tap still arrives, as a click
    if (TOUCH) for (const kind of ["touchstart", "touchmove", "touchend"]) chart.plot.addEventListener(kind, (event) => event.stopPropagation(), { capture: true, passive: true });
    chart.plot.on("plotly_relayout", (change) => followDrag(chart, change));
    chart.plot.on("plotly_doubleclick", () => showWindow(null));
  }
}

function followDrag(chart, change) {
  if (change["yaxis.range[0]"] !== undefined) chart.y = [change["yaxis.range[0]"], change["yaxis.range[1]"]];
  if (change["xaxis.range[0]"] !== undefined) showWindow([change["xaxis.range[0]"], change["xaxis.range[1]"]], true);
}

function showWindow(range, keepsHeights = false) {
  view.range = range && range[1] > range[0] ? range : null;
  if (!keepsHeights || !view.range) for (const chart of charts) chart.y = null;
  const write = (value) => (value === undefined ? "" : Number(value.toPrecision(6)));
  $("from").value = write(view.range?.[0]);
  $("to").value = write(view.range?.[1]);
  redraw();
}

let isDue = false;
function redraw() {
  for (const chart of charts) chart.dirty = true;
  if (isDue) return;
  isDue = true;
  setTimeout(() => {
    isDue = false;
    for (const chart of charts) if (chart.isSeen && chart.dirty) draw(chart);
  });
}

const watch = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const chart = charts.find((one) => one.figure === entry.target);
    chart.isSeen = entry.isIntersecting;
    if (chart.isSeen && chart.dirty) draw(chart);
  }
}, { rootMargin: "300px" });
addEventListener("beforeprint", () => charts.filter((chart) => chart.dirty).forEach(draw));

function keyPressed(event) {
  if (event.target.closest("button, select, input")) return;
  const [low, high] = view.range ?? wholeRange(), width = high - low, middle = (low + high) / 2;
  const windows = {
    ArrowLeft: [low - width / 5, high - width / 5], ArrowRight: [low + width / 5, high + width / 5],
    "+": [middle - width / 4, middle + width / 4], "-": [middle - width, middle + width], 0: null, Escape: null,
  };
  if (!(event.key in windows) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  showWindow(windows[event.key]);
}

// A chart in a grid. `lines` gives what to draw; `choices` are [label, [[key, name], …], first, onChange].
function addChart(place, title, lines, { choices = [], log = null, stacked = false, legend = [], tickformat, top } = {}) {
  const plot = make("div", { className: "plot", role: "img" }), empty = make("div", { className: "empty", textContent: "nothing is recorded", hidden: true });
  const tools = make("span", { className: "tools" }), caption = make("figcaption", {}, make("b", { textContent: title }), tools);
  const figure = make("figure", { className: "chart", tabIndex: 0, ariaLabel: `${title}. Arrow keys move the window, plus and minus zoom, 0 shows the whole run.` }, caption, plot, empty);
  const chart = { title, lines, stacked, figure, plot, empty, tickformat, top, log: log === true, off: new Set(), y: null, dirty: true, isSeen: false };
  for (const [label, options, first, onChange] of choices) {
    if (options.length > 1) tools.append(choose(label, options, first, (value) => { onChange(value); chart.y = null; draw(chart); }));
  }
  if (log !== null) tools.append(press("log", chart.log, (isOn) => { chart.log = isOn; chart.y = null; draw(chart); }, { title: "logarithmic vertical axis" }));
  const save = make("button", { type: "button", textContent: "PNG", title: "save this chart as a picture" });
  save.addEventListener("click", () => Plotly.downloadImage(plot, { format: "png", scale: 2, width: 800, height: 450, filename: title.replace(/\W+/g, "-").toLowerCase() }));
  tools.append(save);
  if (legend.length > 1) {
    const names = make("div", { className: "legend", role: "group", ariaLabel: "Lines" });
    legend.forEach(([name, index]) => names.append(press([swatch(index, dashOf(index) !== "solid"), name], true, (isOn) => {
      if (isOn) chart.off.delete(name);
      else chart.off.add(name);
      draw(chart);
    }, { className: "chip" })));
    figure.insertBefore(names, plot);
  }
  figure.addEventListener("keydown", keyPressed);
  $(place).append(figure);
  charts.push(chart);
  watch.observe(figure);
  return chart;
}
