"use strict";
// What is called token i is the i-th of the document: 0 is its beginning, 1 to T the text, T + 1 what would follow.
const D = JSON.parse(document.getElementById("data").textContent);
const T = D.tokens.length - 1;
const LN_20 = Math.log(20);
const LENS_COLUMNS = 32;
const THUMB = 96;
const $ = (id) => document.getElementById(id);
const surprise = (i) => D.loss[i - 1] - D.entropy[i - 1];
const chosen = { token: 1, layer: 0, head: 0, lensFrom: 1 };
let maps = null;

function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "css") for (const [key, what] of Object.entries(value)) node.style.setProperty(key, what);
    else if (name.includes("-") || name === "role" || name === "for") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

function percent(p) {
  if (p <= 0) return "0%";
  return p >= 0.9995 ? "100%" : p >= 0.1 ? `${(100 * p).toFixed(1)}%` : `${Number((100 * p).toPrecision(2))}%`;
}

const KINDS = ["", "special", "bytes"];
const MARKS = { " ": "·", "\n": "↵", "\t": "→", "\r": "␍", "\u00a0": "⍽" };

function marked(text, keepsLines) {
  const parts = text.split(/([\s\u0000-\u001f\u007f])/).filter((part) => part !== "");
  return parts.map((part) => {
    const control = part < " " && part.length === 1 ? String.fromCharCode(0x2400 + part.charCodeAt(0)) : null;
    const mark = MARKS[part] || control;
    if (!mark) return /^\s$/.test(part) ? el("span", { className: "ws" }, "␣") : part;
    return el("span", { className: "ws" }, part === "\n" && keepsLines ? "↵\n" : mark);
  });
}

function pieceOf(index, keepsLines = false) {
  const [, kind, shown] = D.pieces[index];
  return kind === 0 ? marked(shown, keepsLines) : [shown];
}

const pieceClass = (index) => `piece ${KINDS[D.pieces[index][1]]}`;
const plain = (index) => pieceOf(index).map((part) => part.textContent ?? part).join("");
const nameOf = (i) => (i > T ? "what follows" : plain(D.tokens[i]));

function isWrong(i) {
  return i >= 1 && i <= T && surprise(i) > LN_20;
}

function tokenSpan(i) {
  if (i > T) return el("span", { className: "tok special" }, " what follows? ");
  const index = D.tokens[i];
  const names = ["tok", KINDS[D.pieces[index][1]], isWrong(i) ? "wrong" : ""].filter(Boolean).join(" ");
  return el("span", { className: names }, ...pieceOf(index, true));
}

// --- text ---

function drawText() {
  const spans = [];
  for (let i = 0; i <= T + 1; i++) {
    const span = tokenSpan(i);
    span.id = `t${i}`;
    span.dataset.i = i;
    span.setAttribute("role", "option");
    if (i >= 1 && i <= T) {
      span.style.setProperty("--h", (85 * Math.min(D.loss[i - 1] / D.scale, 1)).toFixed(1));
      span.setAttribute("aria-label", `${nameOf(i)}: loss ${D.loss[i - 1].toFixed(2)}`);
    }
    spans.push(span);
  }
  $("text").append(...spans);
  $("scale-end").textContent = `${D.scale.toFixed(1)} nats or more: no better than a guess among all ${D.vocab.toLocaleString("en")} tokens`;
  const tokenAt = (event) => event.target.closest("[data-i]");
  $("text").addEventListener("click", (event) => tokenAt(event) && choose(Number(tokenAt(event).dataset.i)));
  $("text").addEventListener("pointerover", (event) => {
    if (event.pointerType === "mouse" && tokenAt(event)) drawDetails(Number(tokenAt(event).dataset.i));
  });
  $("text").addEventListener("pointerleave", () => drawDetails(chosen.token));
  $("text").addEventListener("keydown", (event) => {
    const to = { ArrowRight: chosen.token + 1, ArrowLeft: chosen.token - 1, Home: 0, End: T + 1,
      ArrowDown: lineBelow(1), ArrowUp: lineBelow(-1) }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    choose(Math.max(0, Math.min(to, T + 1)));
  });
}

function lineBelow(direction) {
  const from = $(`t${chosen.token}`).getClientRects()[0];
  let best = chosen.token, cost = Infinity;
  for (let i = chosen.token + direction; i >= 0 && i <= T + 1; i += direction) {
    const box = $(`t${i}`).getClientRects()[0];
    if (!box || Math.abs(box.top - from.top) < from.height / 2) continue;
    const distance = Math.abs(box.left - from.left) + 100 * Math.abs(box.top - from.top);
    if (distance < cost) [best, cost] = [i, distance];
    else if (Math.abs(box.top - from.top) > 4 * from.height) break;
  }
  return best;
}

// --- details ---

function choices(list, start, count, target) {
  const rows = [];
  let found = false;
  for (let j = start; j < start + count; j++) {
    const isHit = list.ids[j] === target;
    found ||= isHit;
    rows.push(el("span", { className: `${pieceClass(list.ids[j])}${isHit ? " hit" : ""}`, css: { "--p": list.p[j] } }, ...pieceOf(list.ids[j])),
      el("span", { className: "share" }, percent(list.p[j])));
  }
  return [rows, found];
}

function drawDetails(i) {
  const nodes = [];
  const place = i - 1;
  const text = el("h3", {}, ...(i > T ? ["What follows?"] : pieceOf(D.tokens[i])));
  if (i <= T) text.className = pieceClass(D.tokens[i]);
  nodes.push(text);
  if (i <= T) {
    const [id, kind] = D.pieces[D.tokens[i]];
    const part = D.characters[i] ? `, bytes of the character ${D.characters[i]}` : "";
    nodes.push(el("p", { className: "note" }, `token ${i} of ${T}, id ${id}${kind === 1 ? ", special" : ""}${part}`));
  }
  if (i === 0) nodes.push(el("p", {}, "The beginning of the document, which is given and not predicted."));
  if (i >= 1 && i <= T) {
    const loss = D.loss[place];
    nodes.push(el("p", {}, el("b", {}, `loss ${loss.toFixed(3)}`), ` nats (${(loss / Math.LN2).toFixed(2)} bits), probability ${percent(Math.exp(-loss))}, rank ${(D.rank[place] + 1).toLocaleString("en")}`));
    nodes.push(el("p", { className: "note" }, `expected loss here (entropy): ${D.entropy[place].toFixed(2)}`));
    if (isWrong(i)) nodes.push(el("p", {}, `Surprising: ${Math.round(Math.exp(surprise(i))).toLocaleString("en")} times less probable than expected.`));
  } else if (i > T) nodes.push(el("p", { className: "note" }, `entropy ${D.entropy[T].toFixed(2)} nats`));
  if (i >= 1) {
    const [rows, found] = choices(D.top, place * D.top.k, D.top.k, D.tokens[i]);
    if (!found && i <= T) {
      const p = Math.exp(-D.loss[place]);
      rows.push(el("span", { className: `${pieceClass(D.tokens[i])} hit`, css: { "--p": p } }, ...pieceOf(D.tokens[i])), el("span", { className: "share" }, percent(p)));
    }
    nodes.push(el("div", { className: "choices" }, ...rows));
  }
  $("details").replaceChildren(...nodes);
}

// --- logit lens ---

function drawLens() {
  const lens = D.lens, from = chosen.lensFrom, to = Math.min(from + LENS_COLUMNS - 1, lens.places);
  const here = (i) => (i === chosen.token ? "here" : "");
  const head = el("tr", {}, el("th", { scope: "col" }, "place of"));
  for (let i = from; i <= to; i++) {
    head.append(el("th", { scope: "col", className: here(i), title: `token ${i}`, onclick: () => choose(i) }, ...(i > T ? ["?"] : pieceOf(D.tokens[i]))));
  }
  const body = el("tbody");
  for (let l = lens.layers.length - 1; l >= 0; l--) {
    const row = el("tr", {}, el("th", { scope: "row" }, l === 0 ? "embedding" : `block ${l}`));
    for (let i = from; i <= to; i++) {
      const first = (i - 1) * lens.k, layer = lens.layers[l], index = layer.ids[first];
      const right = i <= T && index === D.tokens[i] ? " hit" : "";
      const title = layer.ids.slice(first, first + lens.k).map((piece, j) => `${plain(piece)} ${percent(layer.p[first + j])}`).join("   ");
      row.append(el("td", { className: here(i) + right, title, css: { "--h": (80 * layer.p[first]).toFixed(0) }, onclick: () => choose(i) },
        el("span", { className: pieceClass(index) }, ...pieceOf(index))));
    }
    body.append(row);
  }
  $("lens").replaceChildren(el("thead", {}, head), body);
  const most = lens.places <= T ? ` (of ${T}: the page holds no more)` : "";
  $("lens-range").textContent = `places of tokens ${from} to ${Math.min(to, T)}${to > T ? " and what follows" : ""}${most}`;
  $("earlier").disabled = from <= 1;
  $("later").disabled = to >= lens.places;
  drawCurve();
}

function svg(tag, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
}

function drawCurve() {
  const place = chosen.token - 1, layers = D.lens.layers;
  if (place < 0 || chosen.token > T || place >= D.lens.places) {
    $("curve").replaceChildren();
    $("curve-caption").textContent = "Choose a token of the text to see its probability layer by layer.";
    return;
  }
  const width = Math.max(260, Math.min($("curve").parentElement.clientWidth, 740)), end = width - 12;
  $("curve").setAttribute("viewBox", `0 0 ${width} 150`);
  const x = (l) => 48 + (l * (end - 48)) / Math.max(layers.length - 1, 1);
  const y = (p) => 12 + (Math.min(-Math.log10(Math.max(p, 1e-6)), 6) * 110) / 6;
  const nodes = [0, 2, 4, 6].flatMap((power) => [
    svg("line", { x1: 48, x2: end, y1: y(10 ** -power), y2: y(10 ** -power) }),
    svg("text", { x: 42, y: y(10 ** -power) + 4, "text-anchor": "end" }, ["100%", "1%", "0.01%", "1e-6"][power / 2]),
  ]);
  const every = Math.ceil(layers.length / (width / 50));
  layers.forEach((_, l) => l % every === 0 && nodes.push(svg("text", { x: x(l), y: 140, "text-anchor": "middle" }, l === 0 ? "emb." : `${l}`)));
  nodes.push(svg("polyline", { points: layers.map((layer, l) => `${x(l)},${y(layer.target[place])}`).join(" ") }));
  layers.forEach((layer, l) => {
    const dot = svg("circle", { cx: x(l), cy: y(layer.target[place]), r: 3.5 });
    dot.append(svg("title", {}, `${l ? `block ${l}` : "embedding"}: ${percent(layer.target[place])}, rank ${layer.rank[place] + 1}`));
    nodes.push(dot);
  });
  $("curve").replaceChildren(...nodes);
  const ranks = layers.map((layer) => layer.rank[place] + 1);
  $("curve").setAttribute("aria-label", `Probability of the token by layer; ranks ${ranks.join(", ")}`);
  $("curve-caption").textContent = `Probability of “${nameOf(chosen.token)}” (token ${chosen.token}) after each block; its rank goes from ${ranks[0].toLocaleString("en")} to ${ranks.at(-1).toLocaleString("en")}.`;
}

// --- attention ---

const perHead = (D.maps.tokens * (D.maps.tokens + 1)) / 2;

function share(layer, head, query, key) {
  const root = maps[(layer * D.maps.heads + head) * perHead + (query * (query + 1)) / 2 + key] / 255;
  return root * root;
}

async function readMaps() {
  const packed = Uint8Array.from(atob(D.maps.values), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  maps = new Uint8Array(await new Response(stream).arrayBuffer());
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(name).split(",").map(Number);
  const [paper, ink] = [read("--paper"), read("--ink")];
  return Array.from({ length: 256 }, (_, v) => [0, 1, 2].map((c) => paper[c] + ((ink[c] - paper[c]) * v) / 255));
}

function paint(canvas, layer, head, size) {
  const n = D.maps.tokens, m = Math.min(n, size), table = colours();
  canvas.width = canvas.height = m;
  const context = canvas.getContext("2d"), image = context.createImageData(m, m), largest = new Uint8Array(m * m);
  let at = (layer * D.maps.heads + head) * perHead;
  for (let q = 0; q < n; q++) {
    const row = Math.floor((q * m) / n) * m;
    for (let k = 0; k <= q; k++, at++) {
      const cell = row + Math.floor((k * m) / n);
      if (maps[at] > largest[cell]) largest[cell] = maps[at];
    }
  }
  largest.forEach((value, cell) => image.data.set([...table[value], 255], 4 * cell));
  context.putImageData(image, 0, 0);
}

function drawHeads() {
  const n = D.maps.tokens, buttons = [];
  for (let h = 0; h < D.maps.heads; h++) {
    let first = 0, before = 0;
    for (let q = 1; q < n; q++) {
      first += share(chosen.layer, h, q, 0);
      before += share(chosen.layer, h, q, q - 1);
    }
    const canvas = el("canvas");
    paint(canvas, chosen.layer, h, THUMB);
    const about = n > 1 ? [el("small", {}, `first ${percent(first / (n - 1))}`), el("small", {}, `before ${percent(before / (n - 1))}`)] : [];
    buttons.push(el("button", { type: "button", "aria-pressed": String(h === chosen.head), title: "mean share of the first token, and of the token before", onclick: () => {
      chosen.head = h;
      [...$("heads").children].forEach((button, other) => button.setAttribute("aria-pressed", String(other === h)));
      drawMap();
    } }, canvas, `head ${h + 1}`, ...about));
  }
  $("heads").replaceChildren(...buttons);
  $("layer-name").textContent = `${chosen.layer + 1} of ${D.maps.layers}`;
  drawMap();
}

function drawMap() {
  paint($("map"), chosen.layer, chosen.head, D.maps.tokens);
  $("map").setAttribute("role", "img");
  $("map").setAttribute("aria-label", `Attention of block ${chosen.layer + 1}, head ${chosen.head + 1}; the chosen token's row is written out beside it`);
  drawAttentionFrom();
}

function drawAttentionFrom() {
  if (!maps) return;
  const n = D.maps.tokens, q = Math.min(chosen.token, n - 1), spans = [];
  $("map-row").style.top = `${(100 * q) / n}%`;
  $("map-row").style.height = `${100 / n}%`;
  $("map-caption").textContent = "A row is the token that looks, a column the token that it looks at.";
  const shares = Array.from({ length: q + 1 }, (_, k) => share(chosen.layer, chosen.head, q, k));
  for (let i = 0; i < n; i++) {
    const span = tokenSpan(i);
    span.classList.remove("wrong");
    if (i > q) span.classList.add("after");
    else {
      span.style.setProperty("--h", (90 * Math.sqrt(shares[i])).toFixed(1));
      span.title = percent(shares[i]);
    }
    if (i === q) span.classList.add("here");
    span.onclick = () => choose(i);
    spans.push(span);
  }
  $("attention-text").replaceChildren(...spans);
  const order = shares.map((_, k) => k).sort((a, b) => shares[b] - shares[a]).slice(0, 5);
  const listed = order.map((k) => `“${nameOf(k)}” (${k}) ${percent(shares[k])}`).join(", ");
  const beyond = chosen.token >= n && chosen.token <= T ? ` Maps are of the first ${n} tokens.` : "";
  $("attention-from").textContent = `“${nameOf(q)}” (token ${q}) looks at ${listed}.${beyond}`;
}

function startAttention() {
  $("layer").max = D.maps.layers - 1;
  $("layer").value = chosen.layer = Math.floor(D.maps.layers / 2);
  $("layer").addEventListener("input", () => {
    chosen.layer = Number($("layer").value);
    drawHeads();
  });
  const cut = D.maps.tokens <= T ? ` Maps are of the first ${D.maps.tokens} of ${T + 1} tokens.` : "";
  $("attention-hint").textContent = "What each token looks at, by block and head; small shares are shown larger than they are (by the square root). “first” is the mean share that goes to the document’s first token, “before” to the token before." + cut;
  const cell = (event) => {
    const box = $("map").getBoundingClientRect(), n = D.maps.tokens;
    const at = (position, size) => Math.max(0, Math.min(n - 1, Math.floor((position / size) * n)));
    return [at(event.clientY - box.top, box.height), at(event.clientX - box.left, box.width)];
  };
  $("map").addEventListener("pointermove", (event) => {
    const [q, k] = cell(event);
    $("map-caption").textContent = k > q ? `“${nameOf(k)}” (${k}) comes after “${nameOf(q)}” (${q}).` : `“${nameOf(q)}” (${q}) looks at “${nameOf(k)}” (${k}): ${percent(share(chosen.layer, chosen.head, q, k))}`;
  });
  $("map").addEventListener("click", (event) => choose(cell(event)[0]));
}

// --- all ---

function choose(i) {
  $(`t${chosen.token}`).classList.remove("here");
  $(`t${chosen.token}`).setAttribute("aria-selected", "false");
  chosen.token = i;
  const span = $(`t${i}`), box = $("text");
  span.classList.add("here");
  span.setAttribute("aria-selected", "true");
  box.setAttribute("aria-activedescendant", span.id);
  const top = span.offsetTop - box.offsetTop;
  if (top < box.scrollTop || top + span.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = top - box.clientHeight / 2;
  if (i < chosen.lensFrom || i >= chosen.lensFrom + LENS_COLUMNS) {
    chosen.lensFrom = Math.max(1, Math.min(i - LENS_COLUMNS / 2, D.lens.places - LENS_COLUMNS + 1));
  }
  drawDetails(i);
  drawLens();
  const column = $("lens").querySelector("th.here"), scroll = $("lens").parentElement;
  if (column) scroll.scrollLeft = Math.max(0, column.offsetLeft - scroll.clientWidth / 2);
  drawAttentionFrom();
}

async function start() {
  $("facts").append(...D.facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  drawText();
  for (const [id, by] of [["earlier", -LENS_COLUMNS], ["later", LENS_COLUMNS]]) {
    $(id).addEventListener("click", () => {
      chosen.lensFrom = Math.max(1, Math.min(chosen.lensFrom + by, D.lens.places - LENS_COLUMNS + 1));
      drawLens();
    });
  }
  const predicted = D.loss.map((_, place) => place + 1);
  choose(predicted.reduce((most, i) => (surprise(i) > surprise(most) ? i : most), 1));
  startAttention();
  await readMaps();
  drawHeads();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawHeads);
  addEventListener("resize", drawCurve);
  document.documentElement.dataset.ready = "true";
}

start();
