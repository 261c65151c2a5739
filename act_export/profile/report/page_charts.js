// Of the page: its charts, and the tables behind them.

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
      "Prompts with an initial sink": (row) => percent(row.initial_rate), "Entropy": (row) => row.entropy.toFixed(2),
    },
  }),
  relative: () => rateTable("relative"),
  absolute: () => rateTable("absolute"),
  effects: () => source().effects && ({
    caption: "Effects, and mass by the absolute threshold", rows: headRows("absolute").sort((one, other) => other.effect - one.effect),
    columns: {
      Layer: (row) => row.layer, Head: (row) => row.head, Beta: (row) => row.beta || dash,
      "Effect on log-likelihood": (row) => row.effect.toFixed(5), "Later-sink mass": (row) => percent(row.mass, 2),
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
