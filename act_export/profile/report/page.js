// Of the page: tokens, one prompt, and what happens when.
// The files are one script, in the order parts, charts, maps, page, and share their names.

// ---- Tokens -----------------------------------------------------------------------------------------------------

const order = { column: "mass", descending: true };

/** A token's text, its white space paler than the rest. */
function tokenText(text) {
  return text.split(/([·⏎⇥␍⍽]+)/).filter((part) => part !== "").map((part) =>
    /^[·⏎⇥␍⍽]/.test(part) ? make("span", { class: "space" }, part) : part);
}

function fillTokens() {
  const wanted = find("token-search").value.trim().toLowerCase();
  const spaced = wanted.replaceAll(" ", "·");
  const all = sinks().tokens;
  const rows = all.filter((row) => row.text.toLowerCase().includes(spaced) || String(row.id) === wanted);
  rows.sort((one, other) => {
    const [first, second] = [one[order.column], other[order.column]];
    return (order.descending ? -1 : 1) * (typeof first === "string" ? (first < second ? -1 : first > second ? 1 : 0) : first - second);
  });
  find("token-table").tBodies[0].replaceChildren(...rows.map((row) => make("tr", {},
    make("th", { scope: "row", class: "token" }, ...tokenText(row.text)),
    make("td", { class: "number" }, String(row.id)),
    make("td", { class: "number" }, row.occurrences.toLocaleString("en")),
    make("td", { class: "number" }, percent(row.share, 2)),
    make("td", { class: "number" }, percent(row.mass)),
    make("td", { class: "number" }, percent(row.outside)),
    make("td", {}, row.layers.join(", ") || dash))));
  find("token-count").textContent = `${rows.length} of ${all.length}`;
}

for (const heading of find("token-table").querySelectorAll("[data-sort]")) {
  heading.querySelector("button").addEventListener("click", () => {
    const column = heading.dataset.sort;
    order.descending = order.column === column ? !order.descending : column !== "text";
    order.column = column;
    for (const other of find("token-table").querySelectorAll("[aria-sort]")) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", order.descending ? "descending" : "ascending");
    fillTokens();
  });
}

// ---- One prompt -------------------------------------------------------------------------------------------------

function fillPrompt() {
  if (!find("example")) return;
  const example = data.examples[Number(find("example").value)];
  find("after-part").hidden = example.after === null;
  fillScores("before", example, example.before);
  if (example.after !== null) fillScores("after", example, example.after);
}

const inkOn = ([red, green, blue]) =>
  0.2126 * (red / 255) ** 2.2 + 0.7152 * (green / 255) ** 2.2 + 0.0722 * (blue / 255) ** 2.2 > 0.18 ? "#000" : "#fff";

function fillScores(id, example, scores) {
  const over = find("over").value;
  const tokens = example.texts.length;
  const values = over in scores ? scores[over].values
    : scores.layers.values.subarray(Number(over) * tokens, (Number(over) + 1) * tokens);
  const tau = chosen.mode === "absolute" ? sinks().tau : sinks().tau / tokens;
  const elements = example.texts.map((text, at) => {
    const score = values[at] / data.steps;
    const step = stepOf(score);
    const sink = score <= tau ? "" : at === 0 ? "initial sink" : "later sink";
    const name = `${text}, token ${at}, sink score ${score.toFixed(4)}${sink && `, ${sink}`}`;
    const element = make("span", { role: "listitem", "aria-label": name }, text);
    element.style.backgroundColor = colourOf(step);
    element.style.color = `light-dark(${inkOn(onLight[step])}, ${inkOn(onDark[step])})`;
    if (sink) {
      element.classList.add("sink");
      element.append(make("small", {}, score.toFixed(2)));
    }
    const entries = { Token: text, Id: example.ids[at], Position: at, "Sink score": score.toFixed(4), Kind: sink };
    element.addEventListener("pointerenter", (event) => showTooltip(entries, event.clientX, event.clientY));
    element.addEventListener("pointerleave", hideTooltip);
    element.entries = entries;
    return element;
  });
  find(id).replaceChildren(...elements.flatMap((element, at) =>
    [element, make(example.texts[at].endsWith("⏎") ? "br" : "wbr")]));
  const place = new Map(elements.map((element, at) => [element, at]));
  rove(find(id), elements, (element) => [place.get(element), 0], (element) => element.entries);
}

// ---- The page ---------------------------------------------------------------------------------------------------

async function show() {
  delete document.documentElement.dataset.ready;
  find("threshold").textContent = sinks().threshold;
  fillList(find("facts"), sinks().facts);
  drawMaps();
  fillTokens();
  fillPrompt();
  document.querySelectorAll("details[data-numbers]").forEach(fillNumbers);
  await Promise.all([drawHeads(), drawPositions("relative"), drawPositions("absolute"), drawEffects(), drawAccuracy()]);
  if (dialog.open) await showMap(...shown);
  document.documentElement.dataset.ready = "true";
}

find("source").addEventListener("change", (event) => { chosen.source = event.target.value; show(); });
find("mode").addEventListener("change", (event) => { chosen.mode = event.target.value; show(); });
find("quantity").addEventListener("change", drawHeads);
find("layer").addEventListener("change", drawHeadMaps);
find("token-search").addEventListener("input", fillTokens);
find("example")?.addEventListener("change", fillPrompt);
find("over")?.addEventListener("change", fillPrompt);
document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
document.querySelectorAll("details[data-numbers]").forEach((details) =>
  details.addEventListener("toggle", () => fillNumbers(details)));
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTooltip(); });
document.addEventListener("scroll", () => { if (focused) focused(); else hideTooltip(); }, { passive: true, capture: true });

find("enlarged-close").addEventListener("click", () => dialog.close());
const onBackdrop = ({ target, clientX, clientY }) => {
  const box = dialog.getBoundingClientRect();  // the padding is the dialog too
  return target === dialog && (clientX < box.left || clientX > box.right || clientY < box.top || clientY > box.bottom);
};
let pressed = false;  // on the backdrop: a selection that is drawn out of the dialog ends there, but doesn't begin there
dialog.addEventListener("pointerdown", (event) => { pressed = onBackdrop(event); });
dialog.addEventListener("click", (event) => { if (pressed && onBackdrop(event)) dialog.close(); });
dialog.addEventListener("close", () => { hideTooltip(); opener?.focus(); });

find("copy").addEventListener("click", async () => {
  getSelection().selectAllChildren(find("command"));  // to copy by hand where that is all that is allowed
  const copied = await navigator.clipboard.writeText(find("command").textContent).then(() => true, () => false);
  find("copy").textContent = copied ? "Copied" : "Selected";
});
find("theme").addEventListener("click", () => {
  setTheme(theme() === "dark" ? "light" : "dark");
  remembered.set(theme());
});
systemDark.addEventListener("change", () => setTheme(null));

let width = window.innerWidth;
let waiting = 0;
window.addEventListener("resize", () => {
  if (window.innerWidth === width) return;
  width = window.innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(show, 150);
});

setTheme(remembered.get());
find("map-legend").style.background = `linear-gradient(to right, ${onLight.map((_, step) => colourOf(step)).join()})`;
unpack(data).then(show);
