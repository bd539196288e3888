// Puts the page together.

byId("title").textContent = data.title;
byId("facts").textContent = data.facts.join(" · ");
if (data.missing.length) {
  byId("missing").hidden = false;
  byId("missing").append(el("strong", null, "Not everything is here"), el("ul", null, ...data.missing.map((sentence) => el("li", null, sentence))));
}
if (data.diagnosis.length) {
  byId("diagnosis").hidden = false;
  byId("diagnosis").append(el("ul", null, ...data.diagnosis.map((sentence) => el("li", null, sentence))));
}
byId("depth").querySelector("i").style.cssText = `--light:${gradient(0, 0.9)};--dark:${gradient(0.35, 1)}`;
const logged = Object.entries(QUANTITIES).filter(([key]) => layers.some((layer) => layer[key].some(known)));
byId("hint").hidden = byId("depth").hidden = !logged.length;
byId("hint").textContent = "A smaller alpha means a heavier tail: more structure in the weights, or, where the verdict says so, a collapse to few directions. Point at a curve or touch it for its values, click it, or a row of the table, for the layer's spectrum; with the keyboard, use the arrow keys and Enter.";
if (logged.length) state.quantity = logged[0][0];
choice("quantity", logged.map(([key, { label }]) => [key, label]), state.quantity, (key) => { state.quantity = key; drawHistory(); });
choice("view", logged.length ? [["curves", "curves"], ["map", "map"]] : [], state.view, (key) => { state.view = key; drawHistory(); });
choice("axis", logged.length ? [["epoch", "epochs"], ["step", "steps"]] : [], state.axis, (key) => { state.axis = key; drawHistory(); drawDetail(); });
explainElements();
buildTable();
explainVerdicts();
drawVerdicts();
filterRows();
drawSettings();
drawHistory();
drawDetail();
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawVerdicts(); drawHistory(); drawDetail(); } });
