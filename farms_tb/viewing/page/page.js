"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const { layers } = data;
const QUANTITIES = {
  alpha: { label: "alpha", title: "power-law exponent alpha" },
  effects: { label: "effect", title: "effect: alpha minus that of shuffled entries", base: 0 },
  rank_shares: { label: "rank share", title: "share of directions with 99 % of the energy" },
  ratio: { label: "ratio", title: "learning rate / scheduler's learning rate", base: 1 },
  lr: { label: "learning rate", title: "learning rate" },
};
const byId = (id) => document.getElementById(id);
const state = { quantity: "alpha", view: "curves", axis: data.by_step ? "step" : "epoch", chosen: null, sort: null, esd: data.esd };

// ---- elements ------------------------------------------------------------------------------------------------

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  // Strings become text nodes: a layer's name is never read as HTML.
  element.append(...children.filter((child) => child !== null));
  return element;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
/** A name as pieces between which a line may break: after a dot or a low line, not within a word. */
const breakable = (name) => name.split(/(?<=[._])/).flatMap((part, index) => (index ? [el("wbr"), part] : [part]));
const svg = (tag, attributes, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function choice(id, options, current, onchange) {
  const place = byId(id) || el("fieldset", { class: "switch", id });
  for (const [value, label] of options) {
    const input = el("input", { type: "radio", name: id, value, checked: value === current, onchange: () => onchange(value) });
    place.append(explained(el("label", null, input, label), data.words[value]));
  }
  place.hidden = options.length < 2;
  return place;
}

/** Let an element explain itself: when pointed at, when it has the keyboard's focus, and when touched. */
function explained(element, words) {
  if (!words) return element;
  element.dataset.words = words;
  element.setAttribute("aria-description", words);
  if (!["BUTTON", "LABEL"].includes(element.tagName)) element.tabIndex = 0;
  return element;
}

// ---- numbers and colours ---------------------------------------------------------------------------------------

const known = (value) => value !== null && value !== undefined;
function number(value, digits = 3) {
  if (!known(value)) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)) return value.toExponential(digits - 1);
  return String(Number(value.toPrecision(Math.max(digits, Math.trunc(Math.abs(value)).toString().length))));
}
/** Epochs or steps: whole numbers in full, so that those of long runs can be told apart. */
const time = (value) => (Number.isInteger(value) ? String(value) : number(value, 6));
const layersInWords = (count) => `${count} ${count === 1 ? "layer" : "layers"}`;
/** Fixed decimals; what rounds to zero has no minus sign. */
function decimal(value, decimals) {
  if (!known(value)) return "–";
  const text = value.toFixed(decimals);
  return Number(text) === 0 ? text.replace("-", "") : text;
}
/** The decimals with which a number has so many significant digits, at most `most`. */
const decimalsOf = (value, digits, most) => (known(value) && value !== 0
  ? Math.max(0, Math.min(most, digits - 1 - Math.floor(Math.log10(Math.abs(value))))) : most);
const percent = (value) => `${decimal(100 * value, value < 0.1 ? 1 : 0)} %`;
const fixed = (decimals) => (value) => decimal(value, decimals);
// An alpha is known to the second significant digit of its standard error.
const asKnown = (value, layer) => decimal(value, decimalsOf(layer.error, 2, 3));
// The unit of z, the standard deviation of a few shuffled layers, is itself uncertain by 10 to 30 %.
const twoDigits = (value) => decimal(value, decimalsOf(value, 2, 1));

const VIRIDIS = ["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"];
const DIVERGING = ["542788", "998ec3", "d8daeb", "f7f7f7", "fee0b6", "f1a340", "b35806"];
function colour(map, t) {
  const at = Math.min(1, Math.max(0, t)) * (map.length - 1);
  const [low, part] = [Math.floor(at), at % 1];
  const channel = (i, k) => parseInt(map[Math.min(i, map.length - 1)].slice(2 * k, 2 * k + 2), 16);
  return `rgb(${[0, 1, 2].map((k) => Math.round(channel(low, k) * (1 - part) + channel(low + 1, k) * part)).join(",")})`;
}
// Dark at the input on paper, and the end that would be lost on the ground left out, in either scheme.
const depth = (index) => index / Math.max(1, layers.length - 1);
const tint = (index) => `--light:${colour(VIRIDIS, 0.9 * depth(index))};--dark:${colour(VIRIDIS, 0.35 + 0.65 * depth(index))}`;
layers.forEach((layer, index) => Object.assign(layer, { index, tint: tint(index), shown: true }));
const gradient = (from, to) => `linear-gradient(to right, ${[0, 1, 2, 3, 4, 5].map((i) => colour(VIRIDIS, from + (to - from) * i / 5)).join(",")})`;

// ---- scales and axes -------------------------------------------------------------------------------------------

/** Both kinds of ticks are pairs of a value and its label. */
function niceTicks(low, high, wanted, whole) {
  const raw = Math.max((high - low) / wanted || 1, whole ? 1 : 0);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return ticks.map((tick) => [tick, Math.abs(high) < 1e-3 ? number(tick) : tick.toFixed(Math.min(digits, 8))]);
}
const SUPERSCRIPTS = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
function decadeTicks(low, high, wanted) {
  const [from, to] = [Math.ceil(Math.log10(low) - 1e-9), Math.floor(Math.log10(high) + 1e-9)];
  const step = Math.max(1, Math.ceil((to - from + 1) / wanted));
  const ticks = [];
  for (let p = from; p <= to; p += step) ticks.push([10 ** p, `10${[...String(p)].map((c) => SUPERSCRIPTS[c]).join("")}`]);
  if (ticks.length > 1) return ticks;
  // Of less than two decades: 1, 2 and 5 times their powers, or, where there is hardly a difference, equal steps.
  const between = [from - 1, from].flatMap((p) => [1, 2, 5].map((m) => m * 10 ** p)).filter((v) => low <= v && v <= high);
  return between.length > 1 ? between.map((v) => [v, number(v)]) : niceTicks(low, high, wanted + 2);
}
function scale(low, high, from, to, log = false) {
  const f = log ? Math.log10 : (x) => x;
  const span = f(high) - f(low) || 1;
  return Object.assign((x) => from + (f(x) - f(low)) / span * (to - from), { low, high, log });
}

const MARGIN = { left: 58, right: 14, top: 10, bottom: 36 };
function frame(width, height, label) {
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label });
}
function drawAxes(root, width, height, x, y, xTitle, yTitle) {
  const [right, bottom] = [width - MARGIN.right, height - MARGIN.bottom];
  const ticks = (s, wanted) => (s.log ? decadeTicks : niceTicks)(s.low, s.high, wanted, s.whole);
  for (const [tick, label] of ticks(y, Math.max(3, height / 50))) {
    root.append(svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y(tick), y2: y(tick) }),
      svg("text", { x: MARGIN.left - 7, y: y(tick) + 4, "text-anchor": "end" }, label));
  }
  for (const [tick, label] of ticks(x, Math.max(4, width / 100))) {
    root.append(svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: MARGIN.top, y2: bottom }),
      svg("text", { x: x(tick), y: bottom + 15, "text-anchor": "middle" }, label));
  }
  const middle = (MARGIN.top + bottom) / 2;
  root.append(svg("path", { class: "frame", d: `M${MARGIN.left},${MARGIN.top}V${bottom}H${right}` }),
    svg("text", { x: (MARGIN.left + right) / 2, y: height - 4, "text-anchor": "middle" }, xTitle),
    svg("text", { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` }, yTitle));
}

function tip(event, text) {
  const box = byId("tip");
  box.hidden = !text;
  if (!text) return;
  box.textContent = text;
  box.style.left = "0"; // else a box at the right edge is measured narrower than it can be
  const { width, height } = box.getBoundingClientRect();
  box.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
  box.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18}px`;
}
/** Show the words of an element below it. */
function tipBelow(element) {
  const box = element.getBoundingClientRect();
  tip({ clientX: box.left - 10, clientY: box.bottom - 12 }, element.dataset.words);
}
const hideTip = () => { byId("tip").hidden = true; };
function explainElements() {
  const explains = (event) => event.target.closest && event.target.closest("[data-words]");
  document.addEventListener("pointerover", (event) => { if (explains(event)) tipBelow(explains(event)); });
  // A finger that is lifted leaves the element, too: the words stay until something else is touched.
  document.addEventListener("pointerout", (event) => { if (explains(event) && event.pointerType === "mouse") hideTip(); });
  document.addEventListener("pointerdown", (event) => { if (!explains(event)) hideTip(); }, true);
  document.addEventListener("focusin", (event) => { if (explains(event) && event.target.matches(":focus-visible")) tipBelow(explains(event)); });
  document.addEventListener("focusout", (event) => { if (explains(event)) hideTip(); });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
  document.addEventListener("scroll", hideTip, true);
}
/** Call `show` with each event of a mouse or a finger on a chart, and with null for the place when it leaves. */
function pointed(root, show) {
  const move = (event) => show(event, local(root, event));
  root.addEventListener("pointermove", move);
  root.addEventListener("pointerdown", move);
  root.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") show(event, null); });
}
function local(root, event) {
  const box = root.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}

// ---- curves ----------------------------------------------------------------------------------------------------

const axisTitle = () => (state.axis === "step" ? "optimizer steps" : "completed epochs");
const when = (i) => `${state.axis === "step" ? "step" : "epoch"} ${time(data.when[state.axis][i])}`;
const describe = (layer, quantity, i) => `${layer.name}\n${when(i)}: ${QUANTITIES[quantity].label} ${number(layer[quantity][i], 4)}`;
const range = (values) => values.reduce(([low, high], v) => (known(v) ? [Math.min(low, v), Math.max(high, v)] : [low, high]), [Infinity, -Infinity]);

/** Draw layers' curves into a place; the main chart also highlights, and is walked through with the arrow keys. */
function curveChart(place, shown, quantity, height, main) {
  const { title, base } = QUANTITIES[quantity];
  const width = Math.max(280, place.clientWidth);
  const xs = data.when[state.axis];
  let [low, high] = range(shown.flatMap((layer) => layer[quantity]));
  if (known(base) && low <= high) [low, high] = [Math.min(low, base), Math.max(high, base)];
  place.replaceChildren();
  if (low > high) {
    place.append(el("p", { class: "quiet" }, shown.length ? `No ${QUANTITIES[quantity].label} was logged.` : "No layer is shown: tick some below."));
    return;
  }
  const pad = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
  const y = scale(low - pad, high + pad, height - MARGIN.bottom, MARGIN.top);
  let [first, last] = range(xs);
  if (first === last) [first, last] = [first - 0.5, last + 0.5];
  const x = Object.assign(scale(first, last, MARGIN.left, width - MARGIN.right), { whole: xs.every((v) => !known(v) || Number.isInteger(v)) });
  const root = frame(width, height, `${title} of ${layersInWords(shown.length)} over training`);
  // Hundreds of faint lines add up to a strong ground.
  root.style.setProperty("--dim", Math.max(0.03, Math.min(0.16, 4 / shown.length)));
  drawAxes(root, width, height, x, y, axisTitle(), main ? title : QUANTITIES[quantity].label);
  if (known(base)) root.append(svg("line", { class: "base", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(base), y2: y(base) }));
  const lines = shown.map((layer) => {
    const points = layer[quantity].map((v, i) => (known(v) ? [x(xs[i]), y(v), i] : null)).filter(Boolean);
    const style = layer.tint;
    const path = points.length === 1
      ? svg("circle", { class: "single", style, cx: points[0][0], cy: points[0][1], r: 3.5 })
      : svg("path", { class: "curve", style, d: points.map(([px, py], k) => `${k ? "L" : "M"}${px.toFixed(1)},${py.toFixed(1)}`).join("") });
    path.dataset.layer = layer.index;
    root.append(path);
    return { layer, points, path };
  });
  const dot = svg("circle", { class: "dot", r: 4.5, visibility: "hidden" });
  root.append(dot);
  place.append(root);

  let near = null;
  function mark(line, point, event) {
    if (near) near.path.classList.remove("near");
    near = line;
    if (line) {
      line.path.classList.add("near");
      line.path.after(dot);
      dot.setAttribute("style", line.layer.tint);
      dot.setAttribute("cx", point[0]);
      dot.setAttribute("cy", point[1]);
      root.insertBefore(line.path, dot);
    }
    dot.setAttribute("visibility", line ? "visible" : "hidden");
    place.classList.toggle("focus", main && Boolean(line || chosenLine()));
    tip(event, line && describe(line.layer, quantity, point[2]));
  }
  const chosenLine = () => lines.find(({ layer }) => layer === state.chosen && main);
  function nearest([mx, my]) {
    let best = null;
    for (const line of lines) {
      const { points } = line;
      if (!points.length) continue;
      let k = points.findIndex(([px]) => px >= mx);
      if (k < 0) k = points.length - 1;
      const [a, b] = [points[Math.max(0, k - 1)], points[k]];
      const part = b[0] > a[0] ? Math.min(1, Math.max(0, (mx - a[0]) / (b[0] - a[0]))) : 1;
      const distance = Math.abs(a[1] + (b[1] - a[1]) * part - my);
      if (!best || distance < best.distance) best = { line, point: part < 0.5 ? a : b, distance };
    }
    return best && best.distance < 30 ? best : null;
  }
  pointed(root, (event, at) => {
    const found = at && nearest(at);
    mark(found && found.line, found && found.point, event);
  });
  if (!main) return;
  root.addEventListener("click", (event) => {
    const found = nearest(local(root, event));
    if (found) choose(found.line.layer);
  });
  const chosen = chosenLine();
  if (chosen) {
    chosen.path.classList.add("chosen");
    root.insertBefore(chosen.path, dot);
    place.classList.add("focus");
  } else place.classList.remove("focus");
  root.setAttribute("tabindex", 0);
  let position = 0;
  root.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Enter: [0, 0], Escape: null }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    if (move === null) { mark(null, null, event); choose(null); return; }
    const drawn = lines.filter(({ points }) => points.length);
    const current = drawn.indexOf(near || chosenLine() || drawn[0]);
    const line = drawn[(current + move[0] + drawn.length) % drawn.length];
    position = Math.min(line.points.length - 1, Math.max(0, position + move[1]));
    const point = line.points[position];
    const box = root.getBoundingClientRect();
    mark(line, point, { clientX: box.left + point[0], clientY: box.top + point[1] });
    if (event.key === "Enter") { choose(line.layer); byId("curves").firstChild.focus(); }
  });
  root.addEventListener("blur", (event) => mark(null, null, event));
}

/** Draw a map: a row for each layer, a column for each measurement. For hundreds of layers, whose curves hide one another. */
function mapChart(place, shown, quantity) {
  const rows = shown.filter((layer) => layer[quantity].some(known));
  // The last measurement, of the final weights, has alphas and no ratios.
  const columns = data.when[state.axis].map((_, i) => i).filter((i) => rows.some((layer) => known(layer[quantity][i])));
  place.classList.remove("focus");
  place.replaceChildren();
  if (!rows.length) { place.append(el("p", { class: "quiet" }, `No ${QUANTITIES[quantity].label} to map.`)); return; }
  const { shade, ends } = mapColours(rows, quantity);
  const whole = Math.max(280, place.clientWidth);
  const widest = Math.floor(Math.min(190, whole * 0.33) / 6.2);
  const labels = shortLabels(rows.map((layer) => layer.name), widest);
  const left = Math.round(18 + 6.2 * range(labels.map((label) => label.length))[1]);
  const width = whole - left - MARGIN.right;
  const height = Math.min(640, Math.max(160, 14 * rows.length));
  const canvas = el("canvas", { width: columns.length, height: rows.length, role: "img", "aria-label": `${QUANTITIES[quantity].title} as a map` });
  // One pixel a cell, magnified: sharp at any size, and cheap for any number of layers.
  canvas.style.cssText = `position:absolute;left:${left}px;top:${MARGIN.top}px;width:${width}px;height:${height}px;image-rendering:pixelated`;
  const pen = canvas.getContext("2d");
  const none = getComputedStyle(document.body).getPropertyValue("--map-none");
  rows.forEach((layer, row) => columns.forEach((i, column) => {
    pen.fillStyle = known(layer[quantity][i]) ? shade(layer[quantity][i]) : none;
    pen.fillRect(column, row, 1, 1);
  }));
  const cell = ([px, py]) => {
    const [column, row] = [Math.floor(px / width * columns.length), Math.floor(py / height * rows.length)];
    return rows[row] && column in columns ? [rows[row], columns[column]] : null;
  };
  pointed(canvas, (event, place) => { const at = place && cell(place); tip(event, at && describe(at[0], quantity, at[1])); });
  canvas.addEventListener("click", (event) => { const at = cell(local(canvas, event)); if (at) choose(at[0]); });
  const root = frame(whole, height + MARGIN.top + MARGIN.bottom, `Axes of the map: ${layersInWords(rows.length)}, ${axisTitle()}`);
  for (const row of spread(rows.length, Math.floor(height / 13))) {
    root.append(svg("text", { class: "row", x: left - 6, y: MARGIN.top + (row + 0.5) * height / rows.length + 4, "text-anchor": "end" },
      labels[row]));
  }
  const bottom = MARGIN.top + height;
  for (const column of spread(columns.length, Math.floor(width / 70))) {
    const x = left + (column + 0.5) * width / columns.length;
    root.append(svg("line", { class: "frame", x1: x, x2: x, y1: bottom, y2: bottom + 4 }),
      svg("text", { class: "column", x, y: bottom + 16, "text-anchor": "middle" }, time(data.when[state.axis][columns[column]])));
  }
  root.append(svg("text", { x: left + width / 2, y: bottom + 32, "text-anchor": "middle" }, axisTitle()));
  place.append(root, canvas, el("p", { class: "ramp quiet" }, el("span", null, ends.low),
    el("i", { style: `background:linear-gradient(to right, ${ends.colours.join(",")})` }), el("span", null, ends.high), el("span", null, ends.words)));
}

/** The colour of a value on a map, and what the two ends of the colours stand for. */
function mapColours(rows, quantity) {
  const values = rows.flatMap((layer) => layer[quantity]);
  if (quantity === "ratio") {
    // A function takes no more than some 100,000 arguments, and a long run has more values.
    const widest = Math.max(1.05, range(values.filter((v) => v > 0).map((v) => Math.max(v, 1 / v)))[1]);
    return {
      shade: (v) => colour(DIVERGING, 0.5 + Math.log(Math.max(v, 1e-9)) / Math.log(widest) / 2),
      ends: { low: `1/${number(widest)}`, high: number(widest), colours: [0, 0.25, 0.5, 0.75, 1].map((t) => colour(DIVERGING, t)), words: "1, the scheduler's rate, in the middle" },
    };
  }
  const [low, high] = range(values);
  return {
    shade: (v) => colour(VIRIDIS, (v - low) / (high - low || 1)),
    ends: { low: number(low), high: number(high), colours: [0, 0.25, 0.5, 0.75, 1].map((t) => colour(VIRIDIS, t)), words: QUANTITIES[quantity].label },
  };
}

/** Indices of at most `most` of `count` things, evenly spread, first and last among them. */
function spread(count, most) {
  const kept = Math.max(1, Math.min(count, most));
  return [...new Set(Array.from({ length: kept }, (_, k) => Math.round(k * (count - 1) / Math.max(1, kept - 1))))];
}
/** Names of at most so many letters: without the parts that all have in common at both ends, then without their start. */
function shortLabels(names, most) {
  if (names.every((name) => name.length <= most)) return names;
  const parts = names.map((name) => name.split("."));
  const [shortest] = range(parts.map((part) => part.length));
  const common = (at) => parts.every((part) => part.at(at) === parts[0].at(at));
  let [start, end] = [0, 0];
  while (start < shortest - 1 && common(start)) start++;
  while (end < shortest - start - 1 && common(-end - 1)) end++;
  return parts.map((part) => {
    const label = `${start ? "…" : ""}${part.slice(start, part.length - end).join(".")}${end ? "…" : ""}`;
    return label.length <= most ? label : `…${label.slice(1 - most)}`;
  });
}

function drawHistory() {
  const shown = layers.filter((layer) => layer.shown);
  if (!data.when.epoch.length) {
    byId("curves").replaceChildren(el("p", { class: "quiet" }, "Nothing was logged yet."));
    return;
  }
  const curves = state.view === "curves";
  if (curves) curveChart(byId("curves"), shown.filter((layer) => layer[state.quantity].some(known)), state.quantity, 380, true);
  else mapChart(byId("curves"), shown, state.quantity);
  byId("depth").hidden = !curves;
}

// ---- spectrum --------------------------------------------------------------------------------------------------

/** Room below the bars of a spectrum for the marks of its spikes and traps. */
const STRIP = 26;

function spectrumChart(place, layer, esd) {
  const [width, height] = [Math.max(280, place.clientWidth), 290];
  const { edges: [from, to], density, tail, mean, aspect, edge } = esd;
  const [spikes, traps] = [esd.spikes || [], esd.traps || []];
  const edges = density.map((_, i) => 10 ** (from + (to - from) * i / density.length)).concat(10 ** to);
  const law = data.laws[aspect];
  const start = Math.max(edges[0], Math.min(edges.at(-1) * 1e-4, tail ? tail[0][0] / 3 : Infinity));
  const positive = density.filter((d, i) => d > 0 && edges[i + 1] > start);
  const [low, high] = [Math.min(...positive) / 3, Math.max(...positive) * 3];
  const largest = Math.max(edges.at(-1), edge || 0, ...spikes, ...traps);
  const x = scale(start, largest * 1.4, MARGIN.left, width - MARGIN.right, true);
  const bottom = height - MARGIN.bottom;
  const floor = bottom - (spikes.length || traps.length ? STRIP : 0);
  const y = scale(low, high, floor, MARGIN.top, true);
  const root = frame(width, height, `Spectrum of ${layer.name} with its fitted tail and the Marchenko-Pastur law`);
  const clip = svg("clipPath", { id: "inside" }, svg("rect", { x: MARGIN.left, y: MARGIN.top, width: width - MARGIN.left - MARGIN.right, height: floor - MARGIN.top }));
  root.append(clip);
  drawAxes(root, width, height, x, y, "eigenvalue", "density");
  const inside = svg("g", { "clip-path": "url(#inside)" });
  const bins = density.map((d, i) => (d > 0 ? `M${x(edges[i])},${floor}V${y(d)}H${x(edges[i + 1])}V${floor}Z` : "")).join("");
  inside.append(svg("path", { class: "bins", style: layer.tint, d: bins }));
  const line = (points) => points.map(([px, py], k) => `${k ? "L" : "M"}${x(px).toFixed(1)},${y(Math.max(py, low / 10)).toFixed(1)}`).join("");
  if (law && mean) inside.append(svg("path", { class: "law", d: line(law.x.map((v, i) => [v * mean, law.y[i] / mean])) }));
  if (tail) {
    inside.append(svg("line", { class: "start", x1: x(tail[0][0]), x2: x(tail[0][0]), y1: MARGIN.top, y2: bottom }),
      svg("path", { class: "tail", d: line(tail) }));
  }
  root.append(inside);
  if (edge) root.append(svg("line", { class: "edge", x1: x(edge), x2: x(edge), y1: MARGIN.top, y2: bottom }));
  root.append(svg("path", { class: "spikes", d: spikes.map((v) => `M${x(v).toFixed(1)},${floor + 3}v8`).join("") }),
    svg("path", { class: "traps", d: traps.map((v) => `M${(x(v) - 3).toFixed(1)},${floor + 15}l6,6m0,-6l-6,6`).join("") }));
  pointed(root, (event, at) => {
    const i = at ? density.findIndex((_, k) => at[0] >= x(edges[k]) && at[0] < x(edges[k + 1])) : -1;
    tip(event, i < 0 ? null : `eigenvalues ${number(edges[i])} to ${number(edges[i + 1])}\ndensity ${number(density[i])}`);
  });
  const key = (name, words, ...label) => explained(el("span", { class: `k-${name}`, style: layer.tint }, ...label), data.words[words]);
  place.replaceChildren(root, el("p", { class: "key" }, key("bins", null, "eigenvalues"),
    tail ? key("tail", "tail", "fitted tail") : null, law && mean ? key("law", "law", "random weights (Marchenko-Pastur)") : null,
    edge ? key("edge", "edge", "edge of random weights") : null,
    spikes.length ? key("spikes", "num_spikes", `spikes (${layer.num_spikes})`) : null,
    traps.length ? key("traps", "num_traps", `traps (${number(layer.num_traps, 2)} a shuffle)`) : null));
}

// ---- detail ----------------------------------------------------------------------------------------------------

function withError(value, error) {
  const decimals = decimalsOf(error, 2, 3);
  return known(value) && known(error) ? `${decimal(value, decimals)} ± ${decimal(error, decimals)}` : decimal(value, decimals);
}

function drawDetail() {
  const place = byId("detail");
  const layer = state.chosen;
  place.hidden = !layer;
  place.replaceChildren();
  if (!layer) return;
  const close = () => { choose(null); layer.button.focus(); };
  place.append(el("div", { class: "bar" }, el("h2", { id: "detail-heading" }, layer.name),
    el("button", { type: "button", class: "close", "aria-label": "Close", title: "Close", onclick: close }, "×")));
  if (layer.verdict) place.append(el("p", null, el("strong", { class: "verdict" }, ...verdictLabel(layer.verdict)), ` ${data.verdicts[layer.verdict]}`));
  const facts = [
    ["stack K × R × C", layer.shape.join(" × ") || "–", "shape"], ["weights", layer.kind || "–", "kind"], ["FARMS alpha", withError(layer.farms, layer.error), "farms"],
    ["full-matrix alpha", asKnown(layer.full, layer), "full"], ["bias", asKnown(layer.bias, layer), "bias"], ["KS distance", number(layer.ks), "ks"], ["stable rank", number(layer.stable_rank), "stable_rank"],
    ["largest eigenvalue", number(layer.spectral_norm), "spectral_norm"], ["eigenvalues", layer.count || "–", "count"], ["last ratio", fixed(3)(layer.last_ratio), "last_ratio"],
  ];
  if (known(layer.rank_share)) facts.push(["rank share", percent(layer.rank_share), "rank_share"]);
  if (known(layer.effect)) facts.push(["effect", withError(layer.effect, layer.effect_error), "effect"]);
  if (known(layer.z)) facts.push(["random weights' alpha", withError(layer.null_mean, layer.null_std), "null_mean"], ["z-score", twoDigits(layer.z), "z"]);
  if (known(layer.num_spikes)) facts.push(["spikes", String(layer.num_spikes), "num_spikes"]);
  if (known(layer.num_traps)) facts.push(["traps", number(layer.num_traps, 2), "num_traps"]);
  place.append(el("dl", null, ...facts.map(([name, value, key]) =>
    explained(el("div", null, el("dt", null, name), el("dd", null, String(value))), data.words[key]))));
  if (layer.note) place.append(el("p", { class: "quiet" }, `Not of one time: ${layer.note}.`));
  if (layer.status !== "ok") place.append(el("p", null, `${known(layer.farms) ? "Status" : "No alpha"}: ${layer.status}.`));
  const found = Object.entries({ farms: "FARMS windows", full: "whole matrix" }).filter(([esd]) => layer.esd[esd]);
  if (found.length) {
    const current = layer.esd[state.esd] ? state.esd : found[0][0];
    const chart = el("div", { class: "chart", id: "spectrum" });
    const picker = choice("esd", found, current, (esd) => { state.esd = esd; spectrumChart(chart, layer, layer.esd[esd]); });
    place.append(el("div", { class: "bar" }, el("h3", { style: "margin-right:auto" }, "Spectrum"), picker), chart);
    spectrumChart(chart, layer, layer.esd[current]);
  } else place.append(el("p", { class: "quiet" }, data.weights ? "The weights that were measured hold no spectrum of this layer." : "No spectrum: no checkpoint was found that could be measured."));
  for (const quantity of Object.keys(QUANTITIES)) {
    if (!layer[quantity].some(known)) continue;
    const chart = el("div", { class: "chart" });
    place.append(el("h3", null, `${QUANTITIES[quantity].label[0].toUpperCase()}${QUANTITIES[quantity].label.slice(1)} over training`), chart);
    curveChart(chart, [layer], quantity, 150, false);
  }
}

/** Show which curve and which marks are a layer's, without choosing it. */
function highlight(layer) {
  for (const path of document.querySelectorAll("#curves [data-layer], #verdicts [data-layer]")) {
    const index = Number(path.dataset.layer);
    path.classList.toggle("near", layer !== null && index === layer.index);
    if (path.closest("#verdicts")) path.classList.toggle("chosen", state.chosen !== null && index === state.chosen.index);
  }
  const place = byId("curves");
  place.classList.toggle("focus", Boolean(place.querySelector(".near, .chosen")));
}

function choose(layer) {
  state.chosen = layer;
  if (layer) layer.shown = true;
  for (const other of layers) {
    other.row.setAttribute("aria-selected", other === layer);
    other.box.checked = other.shown;
  }
  if (layer) layer.row.scrollIntoView({ block: "nearest" });
  drawHistory();
  drawDetail();
  highlight(null);
  // On a narrow page the detail stands below the table.
  if (layer && byId("detail").getBoundingClientRect().top > innerHeight - 100) byId("detail").scrollIntoView();
}

// ---- table -----------------------------------------------------------------------------------------------------

const COLUMNS = [
  ["alpha", "farms", asKnown],
  ["±", "error", asKnown],
  ["effect", "effect", (value, layer) => decimal(value, decimalsOf(layer.effect_error, 2, 3))],
  ["full", "full", asKnown],
  ["bias", "bias", asKnown],
  ["KS", "ks", fixed(3)],
  ["st. rank", "stable_rank", fixed(1)],
  ["z", "z", twoDigits],
  ["ratio", "last_ratio", fixed(3)],
].filter(([, key]) => layers.some((layer) => known(layer[key])));
// Which columns go where there is no room for all: those marked "third" first, then "second", "last" and "phone".
const ROOM = { index: "last", error: "phone", effect: "second", full: "second", bias: "second", z: "third", status: "second", ks: "third", stable_rank: "third" };
const HAS_VERDICT = layers.some((layer) => layer.verdict && known(layer.farms));
const HAS_STATUS = layers.some((layer) => layer.status !== "ok");
const body = el("tbody");

function buildTable() {
  const heads = [["#", "index"], ["layer", "name", "text"]];
  if (HAS_VERDICT) heads.push(["verdict", "verdict", "text"]);
  heads.push(...COLUMNS);
  if (HAS_STATUS) heads.push(["status", "status", "text"]);
  const all = el("input", { type: "checkbox", checked: true, "aria-label": "Show all listed layers in the chart", onchange: () => {
    for (const layer of layers) if (!layer.row.hidden) layer.box.checked = layer.shown = all.checked;
    drawHistory();
  } });
  const row = el("tr", null, el("th", { class: "text" }, all), ...heads.map(([label, key, look]) =>
    el("th", { scope: "col", class: `${look === "text" ? look : ""} ${ROOM[key] || ""}`, "data-key": key },
      explained(el("button", { type: "button", onclick: () => sortBy(key) }, label), `${data.words[key]} Click to sort.`))));
  for (const layer of layers) {
    layer.box = el("input", { type: "checkbox", checked: true, "aria-label": `Show ${layer.name} in the chart`, onclick: (event) => event.stopPropagation(),
      onchange: () => { layer.shown = layer.box.checked; drawHistory(); } });
    layer.button = el("button", { type: "button" }, el("span", { class: "swatch", style: layer.tint }), ...breakable(layer.name));
    layer.row = el("tr", { "aria-selected": "false", onclick: () => choose(layer), onpointerenter: () => highlight(layer), onpointerleave: () => highlight(null) },
      el("td", { class: "text" }, layer.box), el("td", { class: ROOM.index }, String(layer.index + 1)),
      el("td", { class: "text name" }, layer.button, layer.note ? el("small", { class: "quiet" }, layer.note) : null),
      HAS_VERDICT ? el("td", { class: "text verdict" }, ...(layer.verdict ? verdictLabel(layer.verdict) : [])) : null,
      ...COLUMNS.map(([, key, format]) => el("td", { class: ROOM[key] || null }, format(layer[key], layer))),
      HAS_STATUS ? el("td", { class: "text second status", title: layer.status }, layer.status === "ok" ? "" : layer.status) : null);
    body.append(layer.row);
  }
  byId("table").classList.toggle("with-verdicts", HAS_VERDICT);
  byId("table").append(el("thead", null, row), body);
  body.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || event.target.tagName !== "BUTTON") return;
    event.preventDefault();
    const rows = [...body.rows].filter((r) => !r.hidden);
    const next = rows[rows.indexOf(event.target.closest("tr")) + step];
    if (next) next.querySelector("button").focus();
  });
  byId("filter").addEventListener("input", filterRows);
}

function sortBy(key) {
  const down = state.sort && state.sort.key === key && !state.sort.down;
  state.sort = { key, down };
  const text = ["name", "status", "verdict"].includes(key);
  const compare = (a, b) => {
    const [p, q] = [a[key], b[key]];
    if (!known(p) || !known(q)) return known(q) - known(p); // without a value: last, either way round
    const order = text ? p.localeCompare(q, undefined, { numeric: true }) : p - q;
    return (down ? -order : order) || a.index - b.index;
  };
  body.append(...[...layers].sort(compare).map((layer) => layer.row));
  for (const head of document.querySelectorAll("th[data-key]")) {
    if (head.dataset.key === key) head.setAttribute("aria-sort", down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  }
}

function filterRows() {
  const words = byId("filter").value.toLowerCase().split(/\s+/);
  let listed = 0;
  for (const layer of layers) {
    layer.row.hidden = !words.every((word) => layer.name.toLowerCase().includes(word));
    listed += !layer.row.hidden;
  }
  byId("count").textContent = listed === layers.length ? layersInWords(listed) : `${listed} of ${layersInWords(layers.length)}`;
}

// ---- settings ----------------------------------------------------------------------------------------------------

function drawSettings() {
  const place = byId("settings");
  const list = (values) => el("dl", null, ...Object.entries(values).map(([name, value]) =>
    el("div", null, el("dt", null, name), el("dd", null, value || "–"))));
  place.append(el("h2", { id: "settings-heading" }, "Settings"));
  if (Object.keys(data.options).length) place.append(list(data.options));
  if (data.settings) place.append(el("details", null, el("summary", null, "All settings of the run"), el("pre", { tabindex: 0 }, data.settings)));
  else place.append(el("p", { class: "quiet" }, "The run folder holds no config.yaml or hparams.yaml."));
}
