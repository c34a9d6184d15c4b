"use strict";
// Draws the plot and the table from the JSON in #data. No state outside `view`; every change redraws both.

const DATA = JSON.parse(document.getElementById("data").textContent);
const COLUMNS = DATA.columns; // column -> {label, better: "max"|"min", kind}
const QUALITY = ["ndcg_at_10", "recall_at_100", "mrr_at_10", "map_at_100"];
const element = (id) => document.getElementById(id);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
const view = { dataset: null, split: null, x: "parameters", y: "ndcg_at_10", published: false,
  sort: ["ndcg_at_10", "descending"], chosen: null, theme: dark ? "dark" : "light" };

const SI = [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]];
function si(value) {
  const [factor, unit] = SI.find(([size]) => Math.abs(value) >= size) ?? [1, " "];
  return `${Number((value / factor).toPrecision(4))}${unit}`;
}
const SHOW = {
  score: (v) => v.toFixed(4), count: (v) => si(v).trim(), bytes: (v) => `${si(v)}B`, flops: (v) => `${si(v)}FLOP`,
  ratio: (v) => `${(100 * v).toFixed(1)} %`, ms: (v) => `${Number(v.toPrecision(3))} ms`,
  speedup: (v) => `${v.toFixed(2)}×`, text: (v) => String(v),
};
const AXIS = { score: { tickformat: ".2f" }, count: { tickformat: "~s" }, bytes: { tickformat: "~s", ticksuffix: "B" },
  flops: { tickformat: "~s", ticksuffix: "FLOP" }, ratio: { tickformat: ".0%" }, ms: { ticksuffix: " ms" },
  speedup: { ticksuffix: "×" } };
const show = (column, value) => (value === null || value === undefined ? "" : SHOW[COLUMNS[column]?.kind ?? "text"](value));
const escape = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
const name = (row) => row.schedule + (row.recovered && !row.schedule.endsWith("+ft") ? " trained" : "");
const distinct = (values) => [...new Set(values)];
const rowsOf = (split) => DATA.rows.filter((r) => r.dataset === view.dataset && r.split === split);
const rows = () => rowsOf(view.split).filter((r) => r[view.x] !== null && r[view.y] !== null);

function better(column, a, b) { return COLUMNS[column].better === "max" ? a > b : a < b; }
function dominates(a, b) {
  const [x, y] = [view.x, view.y];
  return !better(x, b[x], a[x]) && !better(y, b[y], a[y]) && (better(x, a[x], b[x]) || better(y, a[y], b[y]));
}
function frontOf(points) {
  return points.filter((p) => !points.some((q) => dominates(q, p))).sort((a, b) => a[view.x] - b[view.x]);
}

function hover(row) {
  const test = rowsOf("test").find((r) => r.study === row.study && r.trial_id === row.trial_id);
  const lines = [`<b>${escape(name(row))}</b>  ${escape(row.backbone)}`,
    ...[view.y, view.x].map((c) => `${COLUMNS[c].label}: ${show(c, row[c])}`)];
  if (test && row.split !== "test") lines.push(`on test queries: ${show(view.y, test[view.y])}`);
  if (row.parameter_ratio && view.x !== "parameter_ratio")
    lines.push(`${show("parameter_ratio", row.parameter_ratio)} of the full model's parameters`);
  return lines.join("<br>");
}

function markers(points, label, style) {
  return { type: "scatter", mode: "markers", name: label, x: points.map((r) => r[view.x]), y: points.map((r) => r[view.y]),
    customdata: points.map((r) => r.key), text: points.map(hover), hovertemplate: "%{text}<extra></extra>",
    marker: { size: 11, line: { width: 1.5, color: color("--paper") }, ...style } };
}

// Labels go to the free side of the staircase; one that would touch an earlier label is left out.
function labels(named, everything) {
  const span = (c) => Math.max(...everything.map((r) => r[c])) - Math.min(...everything.map((r) => r[c])) || 1;
  const [wide, high] = [span(view.x), span(view.y)];
  const rightward = COLUMNS[view.x].better === "max";
  const placed = [];
  return named.sort((a, b) => b[view.y] - a[view.y]).flatMap((row) => {
    const place = { x: row[view.x] / wide, y: row[view.y] / high };
    if (placed.some((p) => Math.abs(p.x - place.x) < 0.1 && Math.abs(p.y - place.y) < 0.045)) return [];
    placed.push(place);
    return [{ x: row[view.x], y: row[view.y], text: escape(name(row)), showarrow: false, yshift: 13,
      xshift: rightward ? 6 : -6, xanchor: rightward ? "left" : "right", font: { color: color("--ink"), size: 13 } }];
  });
}

// The paper reports test scores; beside dev scores they would mislead.
function published() {
  if (view.split !== "test") return [];
  return DATA.published.filter((r) => r.ours === view.dataset && r[view.x] != null && r[view.y] != null);
}

function traces(points, front) {
  const onFront = new Set(front.map((r) => r.key));
  const untrained = points.filter((r) => !r.recovered), trained = points.filter((r) => r.recovered);
  const split = (group) => [group.filter((r) => onFront.has(r.key)), group.filter((r) => !onFront.has(r.key))];
  const line = { type: "scatter", mode: "lines", name: "Pareto front", x: front.map((r) => r[view.x]),
    y: front.map((r) => r[view.y]), hoverinfo: "skip",
    line: { shape: COLUMNS[view.x].better === "min" ? "hv" : "vh", color: color("--front"), width: 2 } };
  const drawn = [line];
  for (const [group, symbol, label] of [[untrained, "circle", "as compressed"], [trained, "diamond", "trained after"]]) {
    const [best, rest] = split(group);
    if (best.length) drawn.push(markers(best, `${label}, on the front`, { symbol, color: color("--front") }));
    if (rest.length) drawn.push(markers(rest, label, { symbol, color: color("--other"), opacity: 0.75 }));
  }
  const chosen = points.filter((r) => r.key === view.chosen);
  if (chosen.length) drawn.push({ ...markers(chosen, "chosen", { symbol: "circle-open", size: 22, color: color("--ink"),
    line: { width: 2.5, color: color("--ink") } }), showlegend: false, hoverinfo: "skip", hovertemplate: null });
  if (view.published && published().length) {
    const theirs = published().map((r) => ({ ...r, key: null, recovered: false }));
    drawn.push({ ...markers(theirs, "EffiR paper", { symbol: "triangle-up-open", color: color("--reference") }),
      text: theirs.map((r) => [`<b>${escape(r.backbone)} ${escape(r.variant)}</b>  arXiv 2512.20612`,
        ...[view.y, view.x].map((c) => `${COLUMNS[c].label}: ${show(c, r[c])}`)].join("<br>")) });
  }
  return drawn;
}

function axis(column, scale = {}) {
  return { title: { text: COLUMNS[column].label, standoff: 12 }, automargin: true, ...scale, gridcolor: color("--line"), linecolor: color("--line"), zeroline: false, ...AXIS[COLUMNS[column].kind] };
}

function drawPlot() {
  element("published-label").hidden = published().length === 0;
  const points = rows(), front = frontOf(points);
  const everything = view.published ? [...points, ...published()] : points;
  const across = everything.map((r) => r[view.x]);
  const wide = Math.min(...across) > 0 && Math.max(...across) / Math.min(...across) > 20;
  const layout = { paper_bgcolor: color("--paper"), plot_bgcolor: color("--paper"), margin: { t: 32, r: 20, b: 40 },
    font: { color: color("--ink"), family: "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif", size: 14 },
    hoverlabel: { bgcolor: color("--shade"), bordercolor: color("--line"), font: { color: color("--ink") }, align: "left" },
    legend: { orientation: "h", y: -0.16, yanchor: "top", x: 0 }, hovermode: "closest",
    xaxis: axis(view.x, wide ? { type: "log", dtick: "D2" } : { type: "linear" }), yaxis: axis(view.y),
    annotations: everything.length ? [] : [{ text: "Nothing was measured for these axes", showarrow: false }] };
  const named = distinct([...front, ...points.filter((r) => r.schedule === "full" && !r.recovered)]);
  if (!wide) layout.annotations.push(...labels(named, everything));
  Plotly.react("plot", traces(points, front), layout, { responsive: true, displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    toImageButtonOptions: { format: "svg", filename: "pareto" } });
  element("plot").setAttribute("role", "img");
  element("plot").setAttribute("aria-label", `${COLUMNS[view.y].label} against ${COLUMNS[view.x].label}: ${points.length} ` +
    `models, ${front.length} on the front. The table below has all figures.`);
  element("summary").textContent = `${points.length} models, ${front.length} on the front of ` +
    `${COLUMNS[view.y].label} and ${COLUMNS[view.x].label.toLowerCase()}.` +
    (view.split === "test" && rowsOf("dev").length ? " Models are chosen on dev queries; test scores exist for those chosen." : "");
  return new Set(front.map((r) => r.key));
}

const TABLE = ["on_front", "schedule", "recovered", "ndcg_at_10", "test_ndcg_at_10", "of_full", "recall_at_100", "mrr_at_10",
  "parameters", "parameter_ratio", "flops_per_document", "document_ms", "document_speedup", "query_speedup", "seed", "trial_id"];
const HEAD = { on_front: "Front", schedule: "Schedule", recovered: "Trained", test_ndcg_at_10: "nDCG@10, test",
  of_full: "nDCG@10 of full", seed: "Seed", trial_id: "Trial" };
const TEXT = new Set(["on_front", "schedule", "recovered", "trial_id"]);

function tableRows(onFront) {
  const all = rowsOf(view.split);
  const tests = new Map(rowsOf("test").map((r) => [`${r.study}/${r.trial_id}`, r.ndcg_at_10]));
  return all.map((row) => {
    const full = all.find((r) => r.schedule === "full" && !r.recovered && r.study === row.study);
    return { ...row, on_front: onFront.has(row.key) ? "●" : "", schedule: name(row), recovered: row.recovered ? "yes" : "",
      test_ndcg_at_10: tests.get(`${row.study}/${row.trial_id}`) ?? null, of_full: full ? row.ndcg_at_10 / full.ndcg_at_10 : null };
  });
}

function cell(column, row) {
  const cellOf = document.createElement("td");
  if (TEXT.has(column)) cellOf.className = "text";
  if (column === "schedule") {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = row.schedule;
    button.onclick = () => choose(row.key);
    cellOf.append(button);
  } else if (column === "test_ndcg_at_10") cellOf.textContent = show("ndcg_at_10", row[column]);
  else if (column === "of_full") cellOf.textContent = show("parameter_ratio", row[column]);
  else cellOf.textContent = show(column, row[column]);
  return cellOf;
}

function drawTable(onFront) {
  const all = tableRows(onFront);
  const shown = TABLE.filter((c) => all.some((r) => r[c] !== null && r[c] !== ""))
    .filter((c) => c !== "seed" || distinct(all.map((r) => r.seed)).length > 1)
    .filter((c) => c !== "test_ndcg_at_10" || view.split !== "test");
  const [by, direction] = view.sort;
  const sign = direction === "ascending" ? 1 : -1;
  all.sort((a, b) => (a[by] === null) - (b[by] === null) || sign * (a[by] > b[by] ? 1 : a[by] < b[by] ? -1 : 0));
  const head = document.createElement("tr");
  for (const column of shown) {
    const th = document.createElement("th"), button = document.createElement("button");
    th.scope = "col";
    if (TEXT.has(column)) th.className = "text";
    if (column === by) th.setAttribute("aria-sort", direction);
    button.type = "button";
    button.textContent = HEAD[column] ?? COLUMNS[column].label;
    button.onclick = () => {
      view.sort = [column, column === by && direction === "descending" ? "ascending" : "descending"];
      draw();
    };
    th.append(button);
    head.append(th);
  }
  element("trials").tHead.replaceChildren(head);
  element("trials").tBodies[0].replaceChildren(...all.map((row) => {
    const tr = document.createElement("tr");
    tr.className = `${row.on_front ? "front" : ""} ${row.key === view.chosen ? "chosen" : ""}`;
    tr.append(...shown.map((column) => cell(column, row)));
    return tr;
  }));
}

function definitions(pairs) {
  return `<dl>${pairs.map(([term, text]) => `<dt>${escape(term)}</dt><dd>${escape(text)}</dd>`).join("")}</dl>`;
}

function drawDetail() {
  const row = DATA.rows.find((r) => r.key === view.chosen);
  element("detail").hidden = !row;
  if (!row) return;
  const figures = Object.keys(COLUMNS).filter((c) => row[c] !== null).map((c) => [COLUMNS[c].label, show(c, row[c])]);
  element("detail").innerHTML = `<h2>${escape(name(row))}</h2>` + definitions([["backbone", row.backbone], ...figures,
    ["changed layers", row.plan === "{}" ? "none" : row.plan],
    ["measured", `${row.created_at}, ${row.hardware}`],
    ["run it again", `effir-ray repeat DIR --trial ${row.trial_id} --out NEW`]]);
}

function drawFailed() {
  const lost = DATA.failed.filter((r) => r.dataset === view.dataset);
  element("failed").hidden = !lost.length;
  element("failed").querySelector("summary").textContent = `${lost.length} failed trial${lost.length === 1 ? "" : "s"}`;
  element("failed").querySelector("ul").innerHTML =
    lost.map((r) => `<li><b>${escape(r.schedule)}</b> (${escape(r.split)}): ${escape(r.reason)}</li>`).join("");
}

function draw() {
  document.documentElement.dataset.theme = view.theme;
  drawTable(drawPlot());
  drawDetail();
  drawFailed();
}

function choose(key) {
  view.chosen = view.chosen === key ? null : key;
  draw();
  document.querySelector("tr.chosen")?.scrollIntoView({ block: "nearest" });
}

function fill(id, options, chosen) {
  element(id).replaceChildren(...options.map(([value, label]) => new Option(label, value, false, value === chosen)));
  element(id).onchange = () => { view[id] = element(id).value; if (id === "dataset") offer(); draw(); };
}

// What can be chosen depends on the data set: splits it has, columns that were measured.
function offer() {
  const mine = DATA.rows.filter((r) => r.dataset === view.dataset);
  const splits = distinct(mine.map((r) => r.split)).sort((a, b) => (b === "dev") - (a === "dev"));
  view.split = splits.includes(view.split) ? view.split : splits[0];
  fill("split", splits.map((s) => [s, s]), view.split);
  const measured = (names) => names.filter((c) => mine.some((r) => r[c] !== null)).map((c) => [c, COLUMNS[c].label]);
  const costs = measured(Object.keys(COLUMNS).filter((c) => !QUALITY.includes(c)));
  view.x = costs.some(([c]) => c === view.x) ? view.x : costs[0]?.[0] ?? view.x;
  fill("y", measured(QUALITY), view.y);
  fill("x", costs, view.x);
  element("subtitle").textContent = `${distinct(mine.map((r) => r.backbone)).join(", ")} on ${view.dataset}`;
}

view.dataset = DATA.rows[0]?.dataset;
fill("dataset", distinct(DATA.rows.map((r) => r.dataset)).map((d) => [d, d]), view.dataset);
offer();
element("published").onchange = () => { view.published = element("published").checked; draw(); };
const relabel = () => { element("theme").textContent = view.theme === "dark" ? "Light" : "Dark";
  element("theme").setAttribute("aria-pressed", String(view.theme === "dark")); };
element("theme").onclick = () => { view.theme = view.theme === "dark" ? "light" : "dark"; relabel(); draw(); };
relabel();
element("provenance").innerHTML = definitions(DATA.provenance);
draw();
element("plot").on("plotly_click", (event) => { const key = event.points[0]?.customdata; if (key) choose(key); });
