"use strict";
// What the page holds, and how its elements are made. Text is only ever set as text, never as markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const COLOURS = 8;
const $ = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key in element && key !== "list") element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function withVariable(element, name, value) {
  element.style.setProperty(name, value);
  return element;
}

function swatch(number, dashed = false) {
  return withVariable(make("i", { className: dashed ? "swatch dashed" : "swatch", ariaHidden: "true" }), "--s", `var(--c${number % COLOURS})`);
}

function table(head, rows, label) {
  const body = make("tbody");
  for (const row of rows) body.append(make("tr", {}, ...row.map((cell) => (cell instanceof Node ? cell : make("td", { textContent: cell })))));
  const whole = make("table", {}, body);
  const classOf = (index) => (rows[0]?.[index]?.className === "number" ? "number" : "");
  if (head) whole.prepend(make("thead", {}, make("tr", {}, ...head.map((name, index) => (name instanceof Node ? name : make("th", { scope: "col", textContent: name, className: classOf(index) }))))));
  return make("div", { className: "scroll", tabIndex: 0, role: "region", ariaLabel: label }, whole);
}

const rowHead = (text, className = "") => make("th", { scope: "row", textContent: text, className });
const number = (text) => make("td", { className: "number", textContent: text });

function choose(label, options, value, onChange) {
  const select = make("select", { ariaLabel: label });
  for (const [key, name] of options) select.append(make("option", { value: key, textContent: name }));
  select.value = value;
  select.addEventListener("change", () => onChange(select.value));
  return select;
}

function press(text, isOn, onChange, properties = {}) {
  const button = make("button", { type: "button", ...properties }, ...(Array.isArray(text) ? text : [text]));
  button.setAttribute("aria-pressed", isOn);
  button.addEventListener("click", () => {
    const now = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", now);
    onChange(now);
  });
  return button;
}

// Numbers for people.
function format(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e7) ? value.toExponential(digits - 1) : String(Number(value.toPrecision(digits)));
}

function seconds(value) {
  if (value === null || value === undefined) return "–";
  return value >= 100 ? `${Math.round(value)} s` : value >= 1 ? `${value.toFixed(1)} s` : `${Number((1000 * value).toPrecision(3))} ms`;
}

const share = (value) => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)}%`;
const moment = (stamp) => (typeof stamp === "number" ? new Date(1000 * stamp).toISOString().replace("T", " ").slice(0, 19) + " UTC" : "–");

function download(name, text, type) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
