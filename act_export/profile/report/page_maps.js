// Of the page: attention maps, small and enlarged.

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
