// The layers against random ones: alpha by depth, and the plane of effect against rank share, with verdicts as marks.

/** Each verdict's mark as a path around (0, 0), told apart without colours, too. */
const MARKS = {
  trained: "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0Z",
  random: "M-5,-3L-3,-5L0,-2L3,-5L5,-3L2,0L5,3L3,5L0,2L-3,5L-5,3L-2,0Z",
  collapsed: "M-5.5,-4.5H5.5L0,5.5Z",
  outliers: "M-5.5,4.5H5.5L0,-5.5Z",
  "no power law": "M-4.2,-4.2H4.2V4.2H-4.2Z",
  "low rank": "M0,-5.5L5.5,0L0,5.5L-5.5,0Z",
  "not measured": "M-5,-1.2H5V1.2H-5Z",
};
const UNKNOWN = "M-3.5,0a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0Z";
const verdictClass = (verdict) => (MARKS[verdict] ? `v-${verdict.replaceAll(" ", "-")}` : "v-none");
const markOf = (layer, attributes) => svg("path", { class: `mark ${verdictClass(layer.verdict)}`, d: MARKS[layer.verdict] || UNKNOWN, ...attributes });

/** A verdict as its mark and its word. */
function verdictLabel(verdict, ...more) {
  return [svg("svg", { class: "symbol", viewBox: "-7 -7 14 14", width: 12, height: 12, "aria-hidden": "true" }, markOf({ verdict })), verdict, ...more];
}

/** Alpha as it stands against the permutation null, and the rank share, in words. */
function describeVerdict(layer) {
  const lines = [layer.name];
  if (layer.verdict) lines.push(`${layer.verdict}: ${data.verdicts[layer.verdict]}`);
  lines.push(`alpha ${withError(layer.farms, layer.error)}`);
  if (known(layer.effect)) lines.push(`effect ${withError(layer.effect, layer.effect_error)}`);
  if (known(layer.rank_share)) lines.push(`rank share ${percent(layer.rank_share)}`);
  return lines.join("\n");
}

/** Draw marks, and let the mouse, a finger and the arrow keys go through them, from left to right. */
function drawMarks(root, points) {
  const sorted = [...points].sort((a, b) => a.x - b.x);
  for (const point of sorted) {
    point.mark = markOf(point.layer, { transform: `translate(${point.x.toFixed(1)} ${point.y.toFixed(1)})`, "data-layer": point.layer.index });
    root.append(point.mark);
  }
  let near = null;
  function show(event, point) {
    near = point;
    highlight(point && point.layer);
    tip(event, point && describeVerdict(point.layer));
  }
  const distance = (point, [px, py]) => Math.hypot(point.x - px, point.y - py);
  pointed(root, (event, at) => {
    const closest = at && sorted.reduce((best, point) => (distance(point, at) < distance(best, at) ? point : best));
    show(event, closest && distance(closest, at) < 25 ? closest : null);
  });
  root.addEventListener("click", () => { if (near) choose(near.layer); });
  root.setAttribute("tabindex", 0);
  root.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Enter: 0, Escape: null }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    if (step === null) { show(event, null); choose(null); return; }
    const point = sorted[near ? (sorted.indexOf(near) + step + sorted.length) % sorted.length : 0];
    const box = root.getBoundingClientRect();
    show({ clientX: box.left + point.x, clientY: box.top + point.y }, point);
    if (event.key === "Enter") choose(point.layer);
  });
  root.addEventListener("blur", (event) => show(event, null));
  highlight(null);
}

const VERDICT_CHART_HEIGHT = 320;

/** Draw the alpha of each layer by depth, over the band of its own entries in random order: mean ± two deviations. */
function depthChart(place) {
  const shown = layers.filter((layer) => known(layer.farms));
  const width = Math.max(280, place.clientWidth);
  const bottom = VERDICT_CHART_HEIGHT - MARGIN.bottom;
  const ends = (middle, half) => (known(middle) ? [middle - (half || 0), middle + (half || 0)] : []);
  const [low, high] = range(shown.flatMap((layer) => [...ends(layer.farms, layer.error), ...ends(layer.null_mean, 2 * layer.null_std)]));
  const pad = (high - low) * 0.05 || 0.1;
  const y = scale(low - pad, high + pad, bottom, MARGIN.top);
  const x = Object.assign(scale(0.4, layers.length + 0.6, MARGIN.left, width - MARGIN.right), { whole: true });
  const root = frame(width, VERDICT_CHART_HEIGHT, `alpha of ${layersInWords(shown.length)} by depth`);
  drawAxes(root, width, VERDICT_CHART_HEIGHT, x, y, "layer, from the input to the output", "alpha");
  const at = (layer) => x(layer.index + 1);
  const half = Math.min(12, (x(2) - x(1)) / 2);
  for (const layer of shown.filter((one) => known(one.null_mean))) {
    const [from, to] = ends(layer.null_mean, 2 * layer.null_std);
    root.append(svg("rect", { class: "band", x: at(layer) - half, width: 2 * half, y: y(to), height: y(from) - y(to) }));
  }
  for (const layer of shown.filter((one) => known(one.error))) {
    root.append(svg("path", { class: `error ${verdictClass(layer.verdict)}`, d: `M${at(layer)},${y(layer.farms - layer.error)}V${y(layer.farms + layer.error)}` }));
  }
  place.replaceChildren(root);
  drawMarks(root, shown.map((layer) => ({ layer, x: at(layer), y: y(layer.farms) })));
}

/** Draw how much a layer has learnt against how many of its directions count. */
function planeChart(place) {
  const shown = layers.filter((layer) => known(layer.effect) && known(layer.rank_share));
  const width = Math.max(280, place.clientWidth);
  const bottom = VERDICT_CHART_HEIGHT - MARGIN.bottom;
  const errors = (layer) => [layer.effect - (layer.effect_error || 0), layer.effect + (layer.effect_error || 0)];
  const [low, high] = range([0, ...shown.flatMap(errors)]);
  const pad = (high - low) * 0.06 || 0.1;
  const x = scale(low - pad, high + pad, MARGIN.left, width - MARGIN.right);
  const y = scale(0, 1.06, bottom, MARGIN.top);
  const root = frame(width, VERDICT_CHART_HEIGHT, `effect against rank share of ${layersInWords(shown.length)}`);
  drawAxes(root, width, VERDICT_CHART_HEIGHT, x, y, "effect: alpha minus that of shuffled entries", "rank share");
  root.append(svg("line", { class: "base", x1: x(0), x2: x(0), y1: MARGIN.top, y2: bottom }));
  for (const layer of shown) {
    const [from, to] = errors(layer);
    root.append(svg("path", { class: `error ${verdictClass(layer.verdict)}`, d: `M${x(from)},${y(layer.rank_share)}H${x(to)}` }));
  }
  place.replaceChildren(root);
  drawMarks(root, shown.map((layer) => ({ layer, x: x(layer.effect), y: y(layer.rank_share) })));
}

const HAS_NULLS = layers.some((layer) => known(layer.null_mean));
const HAS_EFFECTS = layers.some((layer) => known(layer.effect) && known(layer.rank_share));

function drawVerdicts() {
  byId("verdicts").hidden = !layers.some((layer) => known(layer.farms));
  if (byId("verdicts").hidden) return;
  byId("plane").parentElement.hidden = !HAS_EFFECTS;
  depthChart(byId("depths"));
  if (HAS_EFFECTS) planeChart(byId("plane"));
}

/** Name the marks that there are, with the number of layers of each, and the band. */
function explainVerdicts() {
  byId("verdicts-heading").textContent = HAS_NULLS ? "Layers against random weights" : "Layers by depth";
  const key = byId("verdict-key");
  for (const verdict of Object.keys(MARKS)) {
    const count = layers.filter((layer) => layer.verdict === verdict).length;
    if (count) key.append(explained(el("span", null, ...verdictLabel(verdict, ` (${count})`)), data.verdicts[verdict]));
  }
  if (HAS_NULLS) key.append(explained(el("span", null, el("i", { class: "band-key" }), "random weights"), "Alpha of the same weights in random order, mean ± two standard deviations: the permutation null."));
}
