// Everything that is no curve: figures, events, samples, tables.
function showFigures() {
  if (RUNS.length === 1) {
    const tiles = make("dl", { className: "tiles" });
    for (const [name, [text]] of DATA.figures) tiles.append(make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: text })));
    $("figures").append(tiles);
    return;
  }
  const head = ["", ...RUNS.map((run, index) => make("th", { scope: "col" }, swatch(index, dashOf(index) !== "solid"), run.name))];
  $("figures").append(table(head, DATA.figures.map(([name, texts]) => [rowHead(name), ...texts.map((text) => make("td", { textContent: text }))]), "Figures of each run"));
  $("differences").append(make("h3", { textContent: "Options that differ" }));
  const rows = DATA.differences.map(([name, values]) => [rowHead(name, "code"), ...values.map((value) => make("td", { textContent: value, className: "code" }))]);
  const unknown = RUNS.filter((run) => !run.config).length;
  $("differences").append(rows.length ? table(head.map((cell) => (cell instanceof Node ? cell.cloneNode(true) : cell)), rows, "Options that differ")
    : make("p", { className: "hint", textContent: `None, of the configs that can be read${unknown ? ` (${unknown} cannot)` : ""}.` }));
}

function showHead() {
  const planned = RUNS.map((run) => run.state).filter(Boolean);
  const about = $("about");
  about.append(`Longhaul ${DATA.version}, written ${moment(DATA.written)}. `);
  RUNS.forEach((run, index) => {
    if (!run.state) return;
    const isBad = ["failed", "lost"].includes(run.state);
    about.append(make("span", { className: isBad ? "badge bad" : "badge" }, RUNS.length > 1 ? `${run.name}: ${run.state}` : run.state), " ");
    if (run.reason && (isBad || RUNS.length === 1)) about.append(`${run.reason}. `);
  });
  if (planned.some((state) => ["running", "starting"].includes(state))) about.append("The run was going on when this was written: run the command again for newer figures.");
  for (const run of RUNS) for (const note of run.notes) $("notes").append(make("li", { textContent: (RUNS.length > 1 ? `${run.name}: ` : "") + note }));
  for (const section of document.querySelectorAll("main section")) $("contents").append(make("a", { href: `#${section.id}`, textContent: section.querySelector("h2").textContent }));
}

function showEvents() {
  const all = RUNS.flatMap((run, index) => run.events.map((event) => [index, ...event])).sort((a, b) => a[1] - b[1] || a[0] - b[0]);
  const counts = new Map();
  for (const [, , kind] of all) counts.set(kind, (counts.get(kind) ?? 0) + 1);
  for (const run of RUNS) for (const [kind, count] of Object.entries(run.left_out)) counts.set(kind, counts.get(kind) + count);
  // what tells of every start alike is there to be asked for
  for (const kind of ["mixture", "plan", "first_step", "network"]) if (counts.has(kind)) view.offKinds.add(kind);
  let most = 200;
  const list = () => {
    const asked = $("find").value.trim().toLowerCase();
    const found = all.filter(([index, , kind, message]) => !view.offKinds.has(kind) && !view.hidden.has(index) && (!asked || `${kind} ${message} ${RUNS[index].name}`.toLowerCase().includes(asked)));
    $("found").textContent = `${found.length.toLocaleString("en-US")} of ${all.length.toLocaleString("en-US")}`;
    const body = make("tbody");
    for (const [index, step, kind, message] of found.slice(0, most)) {
      const go = make("button", { type: "button", textContent: step.toLocaleString("en-US"), title: "show the curves around this step" });
      go.addEventListener("click", () => showStep(RUNS[index], step));
      body.append(make("tr", {}, make("td", { className: "number" }, go), ...(RUNS.length > 1 ? [make("td", {}, swatch(index), RUNS[index].name)] : []),
        make("td", { textContent: kind, className: groupOf(kind) ? "" : "trouble" }), make("td", { textContent: message, className: "text" })));
    }
    if (found.length > most) {
      const more = make("button", { type: "button", textContent: "show more" });
      more.addEventListener("click", () => { most *= 4; list(); });
      body.append(make("tr", {}, make("td", { colSpan: 4 }, more)));
    }
    const head = ["step", ...(RUNS.length > 1 ? ["run"] : []), "kind", "what happened"].map((name) => make("th", { scope: "col", textContent: name }));
    $("event-list").replaceChildren(make("thead", {}, make("tr", {}, ...head)), body);
  };
  for (const [kind, count] of [...counts].sort((a, b) => groupOf(a[0]) - groupOf(b[0]) || (a[0] < b[0] ? -1 : 1))) {
    $("kinds").append(press(`${kind} ${count.toLocaleString("en-US")}`, !view.offKinds.has(kind), (isOn) => {
      if (isOn) view.offKinds.delete(kind);
      else view.offKinds.add(kind);
      list();
      redraw();
    }, { className: "chip" }));
  }
  for (const run of RUNS) for (const [kind, count] of Object.entries(run.left_out)) {
    $("kinds").after(make("p", { className: "hint", textContent: `${run.name}: ${count.toLocaleString("en-US")} events “${kind}” in the middle are not in this page; metrics.jsonl has all.` }));
  }
  $("find").addEventListener("input", list);
  list();
  return list;
}

function showStep(run, step) {
  const around = Math.max(10, LONGEST / 50);
  showWindow([placeOf(run, Math.max(0, step - around)), placeOf(run, step + around)]);
  $("curves").scrollIntoView();
}

function showTime(run) {
  const whole = Object.entries(run.phase_seconds), mean = run.num_steps ? run.step_seconds / run.num_steps : 0;
  if (whole.length) {
    const rest = Math.max(0, mean - whole.reduce((sum, [, value]) => sum + value, 0));
    const rows = [...whole, ["rest", rest]].sort((a, b) => b[1] - a[1]).map(([name, value]) => [rowHead(name), number(seconds(value)), withVariable(make("td", { className: "bar-cell", textContent: share(value / mean) }), "--p", (100 * value) / mean)]);
    $("phases").replaceChildren(make("h3", { textContent: `A step: ${seconds(mean)} on average over ${run.num_steps.toLocaleString("en-US")} steps` }), table(["phase", "mean", "share"], rows, "Seconds by phase"));
  } else $("phases").replaceChildren();
  showStartParts(run);
}

function showStartParts(run) {
  const starts = run.start_parts.slice(-8);
  if (!starts.length) return $("start-parts").replaceChildren();
  const parts = [...new Set(starts.flatMap(([, own]) => Object.keys(own)))];
  const most = Math.max(...starts.flatMap(([, own]) => Object.values(own)));
  const rows = parts.map((part) => [rowHead(part), ...starts.map(([, own, cpu]) => withVariable(make("td", { className: "bar-cell", textContent: seconds(own[part]), title: part in cpu ? `${seconds(cpu[part])} of it computing` : "" }), "--p", (100 * (own[part] ?? 0)) / most))]);
  rows.push([rowHead("all"), ...starts.map(([, own]) => make("td", { textContent: seconds(Object.values(own).reduce((sum, value) => sum + value, 0)) }))]);
  const before = run.start_parts.length > starts.length ? ` (the last ${starts.length} of ${run.start_parts.length} that are recorded)` : "";
  $("start-parts").replaceChildren(make("h3", { textContent: `From the start of the process to its first step${before}` }), table(["part", ...starts.map(([step]) => `start at step ${(step - 1).toLocaleString("en-US")}`)], rows, "Seconds by part of the start"));
}

function showCorpora(run) {
  const { mixture, series } = run.curves, sums = Object.entries(mixture).map(([name, tokens]) => [name, tokens.reduce((sum, value) => sum + (value ?? 0), 0)]);
  const total = sums.reduce((sum, [, tokens]) => sum + tokens, 0);
  const rows = sums.map(([name, tokens]) => [rowHead(name), number(tokens.toLocaleString("en-US")), withVariable(make("td", { className: "bar-cell", textContent: total ? share(tokens / total) : "–" }), "--p", total ? (100 * tokens) / total : 0), number(format(series[`epoch/${name}`]?.[0].at(-1), 3))]);
  $("corpora").replaceChildren(...(rows.length ? [make("h3", { textContent: "Corpora so far" }), table(["corpus", "tokens", "share", "epochs"], rows, "Corpora")] : []));
}

function showSamples(run) {
  const box = $("sample-box"), prompts = [...new Set(run.samples.map(([, prompt]) => prompt))];
  if (!prompts.length) return box.replaceChildren(make("p", { className: "hint", textContent: "No text was sampled (eval.sample_every_steps)." }));
  const strip = make("div", { className: "strip", tabIndex: 0, role: "region", ariaLabel: "Samples by step" });
  const fill = (chosen) => {
    const own = run.samples.filter(([, prompt]) => prompt === prompts[chosen]);
    strip.replaceChildren(...own.map(([step, prompt, text, endedBy, leftOut]) => make("article", {},
      make("h4", { textContent: `step ${step.toLocaleString("en-US")}, ended by ${endedBy}` }),
      make("pre", {}, make("span", { className: "prompt", textContent: prompt }), text, leftOut ? make("i", { textContent: ` … and ${leftOut} characters` }) : null))));
  };
  const names = prompts.map((prompt, index) => [index, prompt.length > 70 ? JSON.stringify(prompt.slice(0, 69) + "…") : JSON.stringify(prompt)]);
  fill(0);
  box.replaceChildren(make("div", { className: "bar" }, "prompt", choose("Prompt", names, 0, (value) => fill(Number(value)))), strip);
}

function showKept(run) {
  const steps = run.kept.map(({ step, name, numbers }) => [step, name, numbers]);
  if (!steps.length) {
    const keys = Object.keys(run.evals.values);
    const none = keys.length ? !keys.some(isTask) && "No tasks (eval.tasks, launch/evaluate.py); held-out losses are among the curves." : "Nothing was evaluated (eval.every_steps, launch/evaluate.py).";
    return $("kept").replaceChildren(...(none ? [make("p", { className: "hint", textContent: none })] : []));
  }
  const figures = new Map();
  for (const [, name, numbers] of steps) for (const key of Object.keys(numbers)) figures.set(JSON.stringify([name, key]), [name, key]);
  const rows = [...figures.values()].map(([name, key]) => [rowHead(name), make("td", { textContent: key, className: "code" }),
    ...steps.map(([, own, numbers]) => number(own === name && key in numbers ? format(numbers[key], 6) : ""))]);
  const whole = table(["of", "figure", ...steps.map(([step, name]) => `step ${step.toLocaleString("en-US")}${steps.filter(([other]) => other === step).length > 1 ? `: ${name}` : ""}`)], rows, "Results of launch/evaluate.py");
  whole.classList.add("tall");
  $("kept").replaceChildren(make("h3", { textContent: "Kept by launch/evaluate.py" }), whole);
}

function showEnvironment(run) {
  const rows = run.starts.map((start, index) => [rowHead(String(index + 1), "narrow"), make("td", { className: "moment", textContent: moment(start.timestamp) }), ...[start.host, `${start.world_size ?? "–"} × ${start.device ?? "–"}`, start.slurm_job, start.git_commit].map((value) => make("td", { textContent: value ?? "–" })),
    make("td", { className: "code", textContent: [].concat(start.command ?? "–").join(" ") })]);
  $("starts").replaceChildren(...(rows.length ? [make("h3", { textContent: "Starts" }), table(["", "time", "host", "ranks × device", "job", "commit", "command"], rows, "Starts")] : []));
  const packages = [...new Set(run.starts.flatMap((start) => Object.keys(start.versions ?? {})))];
  const versions = packages.map((name) => [rowHead(name), make("td", { textContent: run.starts.map((start) => start.versions?.[name] ?? "–").filter((value, index, list) => value !== list[index - 1]).join(", then ") })]);
  const known = new Set(["timestamp", "host", "world_size", "device", "slurm_job", "git_commit", "command", "versions"]);
  for (const [name, value] of Object.entries(run.starts.at(-1) ?? {})) if (!known.has(name)) versions.push([rowHead(name), make("td", { textContent: typeof value === "object" ? JSON.stringify(value) : String(value), className: "text" })]);
  $("versions").replaceChildren(...(versions.length ? [make("h3", { textContent: "Versions and machine" }), table(null, versions, "Versions")] : []));
  if (run.config) {
    const save = make("button", { type: "button", textContent: "download config.yaml" });
    save.addEventListener("click", () => download(`${run.name.replace(/[^\w.-]+/g, "-")}-config.yaml`, run.config, "application/yaml"));
    $("config").replaceChildren(make("h3", { textContent: "Config as resolved" }), make("div", { className: "bar" }, save), make("details", {}, make("summary", { textContent: `config.yaml (${run.config.split("\n").length - 1} lines)` }), make("pre", { textContent: run.config, tabIndex: 0 })));
  } else $("config").replaceChildren();
  $("log").replaceChildren(...(run.log ? [make("details", {}, make("summary", { textContent: `The last lines of log.txt (${run.log.split("\n").length})` }), make("pre", { textContent: run.log, tabIndex: 0 }))] : []));
}
