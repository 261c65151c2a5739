// Of the page: the arrays of its document, elements, the tooltip, themes and colours.

const find = (id) => document.getElementById(id);
const data = JSON.parse(find("data").textContent);
const chosen = { source: "all", mode: "absolute" };
const dash = "–";

// ---- Arrays of the document -------------------------------------------------------------------------------------

const bytesOf = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
const floats = (encoded) => (encoded.values ??= new Float32Array(bytesOf(encoded.float32).buffer));

/** Decompresses every array of shares that the document has, into `values`: ten-thousandths. */
async function unpack(node) {
  if (node === null || typeof node !== "object") return;
  if (typeof node.shares === "string") {
    const stream = new Blob([bytesOf(node.shares)]).stream().pipeThrough(new DecompressionStream("deflate"));
    node.values = new Uint16Array(await new Response(stream).arrayBuffer());
    return;
  }
  await Promise.all(Object.values(node).map(unpack));
}

const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}%`;
const source = () => data.sources[chosen.source];
const sinks = () => source().by[chosen.mode];

/** Rows of a table whose columns are arrays of one length. */
function rowsOf(columns) {
  const names = Object.keys(columns);
  return Array.from({ length: columns[names[0]].length }, (_, at) =>
    Object.fromEntries(names.map((name) => [name, columns[name][at]])));
}

function headRows(mode = chosen.mode) {
  const columns = { ...data.places };
  for (const [name, values] of Object.entries(source().by[mode].heads)) columns[name] = floats(values);
  return rowsOf(columns);
}

function positionRows(positions) {
  const rates = sinks().positions[positions];
  return rowsOf({ start: floats(rates.start), end: floats(rates.end), range: rates.range, rate: floats(rates.overall) });
}

function layerPositionRows(positions) {
  const bins = positionRows(positions);
  return Array.from(floats(sinks().positions[positions].by_layer), (rate, at) =>
    ({ ...bins[at % bins.length], layer: Math.floor(at / bins.length), rate }));
}

// ---- Elements ---------------------------------------------------------------------------------------------------

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const fillList = (list, sentences) => list?.replaceChildren(...sentences.map((text) => make("li", {}, text)));

// ---- Tooltip ----------------------------------------------------------------------------------------------------

const tooltip = find("tooltip");
let focused = null;  // puts the tooltip beside what has the focus, where the keyboard called it
const hideTooltip = () => {
  tooltip.hidden = true;
  focused = null;
};

function showTooltip(entries, x, y) {
  const list = make("dl");
  for (const [name, value] of Object.entries(entries))
    if (value !== "") list.append(make("dt", {}, name), make("dd", {}, String(value)));
  (find("enlarged").open ? find("enlarged") : document.body).append(tooltip);  // a modal dialog covers all else
  focused = null;
  tooltip.replaceChildren(list);
  tooltip.hidden = false;
  const { width, height } = tooltip.getBoundingClientRect();
  const left = x + 14 + width > document.documentElement.clientWidth ? x - width - 10 : x + 14;
  const top = y + 14 + height > window.innerHeight ? y - height - 10 : y + 14;
  tooltip.style.left = `${Math.max(4, left)}px`;
  tooltip.style.top = `${Math.max(4, top)}px`;
}

function showBeside(element, entries) {
  const box = element.getBoundingClientRect();
  showTooltip(entries, box.right - 8, box.bottom - 8);
  focused = () => showBeside(element, entries);
}

// ---- Moving among many small things with the arrow keys: one of them is in the tab order -------------------------

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function rove(container, elements, placeOf, entriesOf) {
  hideTooltip();  // it may speak of an element that these replace, which no pointer will be seen to leave
  const at = new Map(elements.map((element) => [placeOf(element).join(), element]));
  let current = elements[0];
  const enter = (element) => {
    current.tabIndex = -1;
    current = element;
    current.tabIndex = 0;
  };
  for (const element of elements) {
    element.tabIndex = -1;
    element.addEventListener("focus", () => { enter(element); showBeside(element, entriesOf(element)); });
    element.addEventListener("blur", hideTooltip);
  }
  if (current) current.tabIndex = 0;
  container.onkeydown = (event) => {
    const step = STEPS[event.key];
    if (!step || !elements.includes(document.activeElement)) return;
    const [x, y] = placeOf(current);
    const next = at.get([x + step[0], y + step[1]].join());
    event.preventDefault();
    next?.focus();
  };
}

// ---- Theme ------------------------------------------------------------------------------------------------------

const systemDark = window.matchMedia("(prefers-color-scheme: dark)");
const remembered = {
  get() { try { return localStorage.getItem("act-export-theme"); } catch { return null; } },
  set(theme) { try { localStorage.setItem("act-export-theme", theme); } catch { /* nothing remembers it */ } },
};
const theme = () => document.documentElement.dataset.theme ?? (systemDark.matches ? "dark" : "light");

function setTheme(name) {
  if (name === "light" || name === "dark") document.documentElement.dataset.theme = name;
  find("theme").setAttribute("aria-pressed", String(theme() === "dark"));
}

// ---- Colours: every one is there for both themes, and CSS chooses, so that nothing is drawn again to print ---------

/** A ramp in 256 even steps, [red, green, blue] each. */
function stepsOf(ramp) {
  const stops = ramp.map((text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16)));
  return Array.from({ length: 256 }, (_, step) => {
    const place = (step / 255) * (stops.length - 1);
    const below = Math.min(Math.floor(place), stops.length - 2);
    return stops[below].map((value, channel) => Math.round(value + (place - below) * (stops[below + 1][channel] - value)));
  });
}
const [onLight, onDark] = [stepsOf(data.ramps.light), stepsOf(data.ramps.dark)];
const stepOf = (share) => Math.min(255, Math.round(255 * Math.sqrt(share)));
const colourOf = (step) => `light-dark(rgb(${onLight[step].join(" ")}), rgb(${onDark[step].join(" ")}))`;

/** Vega colours by step, grey k for step k; this puts the ramps' colours in the place of the greys. */
const GREYS = ["#000000", "#ffffff"];
function colour(element) {
  for (const name of ["fill", "stop-color"]) {
    for (const part of element.querySelectorAll(`[${name}^="rgb("]`)) {
      const grey = /^rgb\((\d+), \1, \1\)$/.exec(part.getAttribute(name));
      if (grey) part.style.setProperty(name, colourOf(Number(grey[1])));
    }
  }
}
