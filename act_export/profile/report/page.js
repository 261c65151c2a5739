"use strict";
(() => {
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

  // ---- Charts -----------------------------------------------------------------------------------------------------

  /** Draws a chart into an element; `placeOf` gives the place of a datum among the cells for the arrow keys. */
  function draw(id, chart, tables, { width, height, describe, marks, placeOf }) {
    const element = find(id);
    const specification = {
      ...data.charts[chart], width, height, description: describe, datasets: tables,
      autosize: { type: "pad" }, padding: 4,
    };
    const options = {
      renderer: "svg", actions: false, ast: true, defaultStyle: false,
      config: { ...data.config, range: { heatmap: GREYS, ramp: GREYS } },
      tooltip: (_handler, event, _item, value) => {
        if (value && typeof value === "object") showTooltip(value, event.clientX, event.clientY);
        else hideTooltip();
      },
    };
    const last = element.drawing ?? Promise.resolve();
    element.drawing = last.catch(() => { /* whoever asked for that drawing was told */ }).then(async () => {
      element.view?.finalize();
      element.view = null;
      element.view = (await vegaEmbed(element, specification, options)).view;
      element.querySelector(".vega-bindings")?.remove();  // a form for inputs, of which there are none
      colour(element);
      const cells = [...element.querySelectorAll(`.${marks}.role-mark path[role="graphics-symbol"]`)];
      rove(element, cells, (cell) => placeOf(cell.__data__.datum), (cell) => cell.__data__.tooltip);
    });
    return element.drawing;
  }

  const widthOf = (id) => find(id).clientWidth;

  function drawHeads() {
    const quantity = data.quantities.find((each) => each.column === find("quantity").value);
    const cell = Math.max(9, Math.min(30, (widthOf("heads-chart") - 60) / data.layers));
    return draw("heads-chart", `heads_${quantity.column}`, { heads: headRows() }, {
      width: cell * data.layers, height: cell * data.heads, marks: "mark-rect",
      describe: `${quantity.title} of every head, layers across and heads down`,
      placeOf: (row) => [row.layer, row.head],
    });
  }

  function drawPositions(positions) {
    const [bars, layers] = [`positions-${positions}-chart`, `layers-${positions}-chart`];
    const bins = positionRows(positions).map((row) => row.start);
    const figure = find(bars).closest("figure");
    for (const part of figure.querySelectorAll(".chart, details")) part.hidden = bins.length === 0;
    figure.querySelector(".note").hidden = bins.length > 0;
    if (bins.length === 0) return null;
    const width = Math.max(180, widthOf(bars) - 72);
    const words = positions === "relative" ? "share of the way through the prompt" : "position in the prompt";
    return Promise.all([
      draw(bars, `positions_${positions}`, { [`positions_${positions}`]: positionRows(positions) }, {
        width, height: 120, marks: "mark-rect", describe: `Rate of later sinks by ${words}`,
        placeOf: (row) => [bins.indexOf(row.start), 0],
      }),
      draw(layers, `layer_positions_${positions}`, { [`layer_positions_${positions}`]: layerPositionRows(positions) }, {
        width, height: Math.max(7 * data.layers, 60), marks: "mark-rect",
        describe: `Rate of later sinks by layer and ${words}`,
        placeOf: (row) => [bins.indexOf(row.start), row.layer],
      }),
    ]);
  }

  async function drawEffects() {
    if (!find("effects-chart")) return;
    find("effects-chart").closest("figure").hidden = !source().effects;
    fillList(find("effect-facts"), source().effects ?? ["Not measured on these prompts."]);
    if (!source().effects) return;
    const rows = headRows("absolute");  // the threshold that effects are measured at
    const order = rows.slice().sort((one, other) => one.mass - other.mass || one.effect - other.effect);
    const rank = new Map(order.map((row, at) => [`${row.layer},${row.head}`, at]));
    await draw("effects-chart", "effects", { heads: rows }, {
      width: Math.max(200, Math.min(640, widthOf("effects-chart") - 80)), height: 320, marks: "mark-symbol",
      describe: "Effect of calibrating each head alone against its later-sink mass",
      placeOf: (row) => [rank.get(`${row.layer},${row.head}`), 0],
    });
  }

  async function drawAccuracy() {
    if (!data.accuracy) return;
    const rows = rowsOf(data.accuracy);
    const place = new Map(rows.map((row, at) => [`${row.task},${row.model}`, at]));
    await draw("accuracy-chart", "accuracy", { accuracy: rows }, {
      width: Math.max(160, Math.min(560, widthOf("accuracy-chart") - 200)), height: 20 * rows.length,
      marks: "mark-symbol", describe: "Accuracy by task, plain and calibrated",
      placeOf: (row) => [0, place.get(`${row.task},${row.model}`)],
    });
  }

  // ---- Tables behind the figures ----------------------------------------------------------------------------------

  const tables = {
    heads: () => ({
      caption: "Heads", rows: headRows(),
      columns: {
        Layer: (row) => row.layer, Head: (row) => row.head, Beta: (row) => row.beta || dash,
        "Later-sink mass": (row) => percent(row.mass, 2), "Later sinks per prompt": (row) => row.count.toFixed(2),
        "Prompts with a later sink": (row) => percent(row.rate), "Initial sink score": (row) => row.initial_score.toFixed(3),
        "Prompts with an initial sink": (row) => percent(row.initial_rate), "Entropy (nats)": (row) => row.entropy.toFixed(2),
      },
    }),
    relative: () => rateTable("relative"),
    absolute: () => rateTable("absolute"),
    effects: () => source().effects && ({
      caption: "Effects, and mass by the absolute threshold", rows: headRows("absolute").sort((one, other) => other.effect - one.effect),
      columns: {
        Layer: (row) => row.layer, Head: (row) => row.head, Beta: (row) => row.beta || dash,
        "Effect (nats)": (row) => row.effect.toFixed(5), "Later-sink mass": (row) => percent(row.mass, 2),
      },
    }),
  };

  const rateTable = (positions) => ({
    caption: "Rate of later sinks over all layers", rows: positionRows(positions),
    columns: { Position: (row) => row.range, Rate: (row) => percent(row.rate, 3) },
  });

  function fillNumbers(details) {
    const numbers = details.open && tables[details.dataset.numbers]();
    if (!numbers) return;  // closed, or its figure is hidden
    const { caption, rows, columns } = numbers;
    const names = Object.keys(columns);
    const head = make("tr", {}, ...names.map((name) => make("th", { scope: "col", class: "number" }, name)));
    const body = rows.map((row) =>
      make("tr", {}, ...names.map((name) => make("td", { class: "number" }, String(columns[name](row))))));
    const table = make("table", {}, make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, ...body));
    details.querySelector(".scroll")?.remove();
    details.append(make("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": `Table: ${caption}` }, table));
  }

  // ---- Attention maps ---------------------------------------------------------------------------------------------

  const cellsOfMap = data.grid * data.grid;
  const headsOf = (layer) => data.head_maps.heads.filter(([its]) => its === layer).map(([, head]) => head);
  const betaOf = (layer, head) => data.places.beta[layer * data.heads + head];

  /** Values of a map in ten-thousandths; head null for the mean over the layer's heads. */
  function mapOf(layer, head) {
    if (head === null) return data.layer_maps[chosen.source].values.subarray(layer * cellsOfMap, (layer + 1) * cellsOfMap);
    const at = data.head_maps.heads.findIndex(([its, other]) => its === layer && other === head);
    const maps = data.head_maps.by_source[chosen.source] ?? data.head_maps.by_source.all;
    return maps.values.subarray(at * cellsOfMap, (at + 1) * cellsOfMap);
  }

  function pictureOf(map, steps, name) {
    const canvas = make("canvas", { width: data.grid, height: data.grid, class: name, "aria-hidden": "true" });
    const context = canvas.getContext("2d");
    const picture = context.createImageData(data.grid, data.grid);
    map.forEach((value, at) => picture.data.set([...steps[stepOf(value / data.steps)], 255], 4 * at));
    context.putImageData(picture, 0, 0);
    return canvas;
  }

  function thumbnail(layer, head) {
    const map = mapOf(layer, head);
    const pictures = [pictureOf(map, onLight, "on-light"), pictureOf(map, onDark, "on-dark")];
    const calibrated = head !== null && betaOf(layer, head) !== "";
    const name = head === null ? `Layer ${layer}, mean over heads` : `Layer ${layer}, head ${head}${calibrated ? ", calibrated" : ""}`;
    const label = head === null ? `${layer}` : `${head}${calibrated ? " ○" : ""}`;
    const button = make("button", { type: "button", class: calibrated ? "map calibrated" : "map", "aria-label": `${name}: enlarge the attention map` }, ...pictures, make("span", {}, label));
    button.addEventListener("click", () => enlarge(layer, head));
    return button;
  }

  function drawMaps() {
    find("layer-maps").replaceChildren(...Array.from({ length: data.layers }, (_, layer) => thumbnail(layer, null)));
    drawHeadMaps();
  }

  function drawHeadMaps() {
    const layer = Number(find("layer").value);
    const heads = headsOf(layer);
    const notes = heads.some((head) => betaOf(layer, head) !== "") ? ["○ calibrated."] : [];
    if (heads.length < data.heads)
      notes.push(`${heads.length} of ${data.heads} heads: to keep the page small, only the calibrated heads of the model and those with most later-sink mass have maps of their own.`);
    if (!data.head_maps.by_source[chosen.source])
      notes.push("Maps of single heads are means over all prompts, to keep the page small.");
    find("head-maps").replaceChildren(...heads.map((head) => thumbnail(layer, head)));
    find("head-maps-note").textContent = notes.join(" ");
  }

  const dialog = find("enlarged");
  let opener = null;
  let shown = null;

  function enlarge(layer, head) {
    opener = document.activeElement;
    hideTooltip();
    dialog.showModal();
    showMap(layer, head);
  }

  function showMap(layer, head) {
    shown = [layer, head];
    const overall = head !== null && !data.head_maps.by_source[chosen.source];
    const prompts = overall || chosen.source === "all" ? "all prompts" : chosen.source;
    find("enlarged-title").textContent = `Layer ${layer}, ${head === null ? "mean over heads" : `head ${head}`} (${prompts})`;
    const buttons = [null, ...headsOf(layer)].map((other) => {
      const button = make("button", { type: "button", "aria-pressed": String(other === head), "aria-label": other === null ? "Mean over heads" : `Head ${other}` }, other === null ? "mean" : String(other));
      button.addEventListener("click", () => {
        showMap(layer, other);
        find("enlarged-heads").querySelector('[aria-pressed="true"]').focus();
      });
      return button;
    });
    find("enlarged-heads").replaceChildren(...buttons);
    const step = 100 / data.grid;
    const part = (at) => `${Math.round(10 * at * step) / 10} to ${Math.round(10 * (at + 1) * step) / 10}%`;
    const rows = [];
    mapOf(layer, head).forEach((value, at) => {
      const [query, key] = [Math.floor(at / data.grid), at % data.grid];
      if (key > query && value === 0) return;
      rows.push({
        query, key, share: value / data.steps, queries: part(query), keys: part(key),
        query_start: query * step, query_end: (query + 1) * step, key_start: key * step, key_end: (key + 1) * step,
      });
    });
    const side = Math.max(220, Math.min(widthOf("map-chart") - 70, window.innerHeight - 330, 560));
    return draw("map-chart", "map", { map: rows }, {
      width: side, height: side, marks: "mark-rect", placeOf: (row) => [row.key, row.query],
      describe: `Attention map of layer ${layer}, ${head === null ? "mean over heads" : `head ${head}`}`,
    });
  }

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
})();
