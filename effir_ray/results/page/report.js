"use strict";
// Draws plots and tables from the JSON in #data. No state outside `view`; every change redraws what shows it.

const DATA = JSON.parse(document.getElementById("data").textContent);
const COLUMNS = DATA.columns; // column -> {label, better: "max"|"min", kind}
const QUALITY = ["ndcg_at_10", "recall_at_100", "mrr_at_10", "map_at_100"];
const PAGE = 50; // rows of the table of what is not on the front
const MARKS = ["#0a58ca", "#b35900", "#1a7f37", "#8250df", "#cf222e", "#0f766e", "#9a6700", "#bf3989"];
const element = (id) => document.getElementById(id);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
const view = { group: null, split: null, x: "parameters", y: "ndcg_at_10", by: "front", only: "", published: false,
  sort: ["ndcg_at_10", "descending"], page: 0, chosen: null, theme: dark ? "dark" : "light" };

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
const name = (row) => row.schedule + (row.recovered && !/\+(el|ft)/.test(row.schedule) ? " trained" : "");
const distinct = (values) => [...new Set(values)];
const trialOf = (row) => `${row.study}/${row.trial_id}/${row.group}`;
const likeFull = (row, seed) => `${row.study}/${row.backbone}/${row.split}/${row.group}/${seed}`;
const measuredOn = (row) => `${row.study}/${row.trial_id}/${row.dataset}`;

// -- which rows -------------------------------------------------------------------------------------------

// Scores over other queries or documents are no comparison: a group is a data set, a version and a sample of it.
const GROUPS = new Map(), TESTS = new Map(), FULL = new Map();
for (const row of DATA.rows) {
  row.group = row.dataset;
  const key = JSON.stringify([row.dataset, row.split]);
  GROUPS.set(key, (GROUPS.get(key) ?? new Set()).add(row.sample));
}
for (const row of DATA.rows) {
  const samples = [...GROUPS.get(JSON.stringify([row.dataset, row.split]))];
  row.group = samples.length > 1 ? `${row.dataset}, ${row.sample}` : row.dataset;
}
for (const row of DATA.rows) {
  if (row.split === "test") TESTS.set(measuredOn(row), row);
  if (row.schedule === "full" && !row.recovered) for (const seed of [row.seed, "any"]) FULL.set(likeFull(row, seed), row);
}
const fullOf = (row) => FULL.get(likeFull(row, row.seed)) ?? FULL.get(likeFull(row, "any"));
const testOf = (row) => (row.split === "test" ? null : TESTS.get(measuredOn(row)) ?? null);
const rowsOf = (split) => DATA.rows.filter((r) => r.group === view.group && r.split === split);
const measured = (row) => row[view.x] !== null && row[view.y] !== null;
function matches(row) {
  const text = `${name(row)} ${row.study} ${row.trial_id} ${row.backbone}`.toLowerCase();
  return view.only.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

function sortedBy(points, better) {
  const [x, y] = [view.x, view.y];
  const sign = (column) => (COLUMNS[column].better === "max" ? -1 : 1);
  return [...points].sort((a, b) => sign(better ? y : x) * (a[better ? y : x] - b[better ? y : x]) ||
    sign(better ? x : y) * (a[better ? x : y] - b[better ? x : y]));
}

// Why there is no front of these points, as for the command line; empty where there is one.
function incomparable(points) {
  const axes = [COLUMNS[view.x], COLUMNS[view.y]];
  const backbones = distinct(points.map((r) => r.backbone)), machines = distinct(points.map((r) => r.hardware).filter(Boolean));
  const relative = axes.find((c) => c.relative), timed = axes.find((c) => c.timed);
  if (relative && backbones.length > 1)
    return ` No front: ${relative.label.toLowerCase()} compares a model with its own full one, and these are of ${backbones.join(", ")}; filter by one.`;
  if (timed && machines.length > 1)
    return ` No front: ${timed.label.toLowerCase()} was measured on ${machines.join("; ")}, which is no comparison.`;
  return "";
}

// From the best in x on, what is better in y than all before it; equal points stay together.
function frontOf(points) {
  if (incomparable(points)) return [];
  const sign = COLUMNS[view.y].better === "max" ? 1 : -1;
  let best = -Infinity, last = null;
  return sortedBy(points).filter((row) => {
    const value = sign * row[view.y];
    const same = last !== null && row[view.x] === last[view.x] && row[view.y] === last[view.y];
    if (value <= best && !same) return false;
    best = value;
    last = row;
    return true;
  }).sort((a, b) => a[view.x] - b[view.x]);
}

// Models are chosen on dev queries: what test scores are shown of stays what was chosen.
function shown() {
  const points = rowsOf(view.split).filter((row) => measured(row) && matches(row));
  const dev = view.split === "test" ? DATA.rows.filter((r) => r.split === "dev" && r.dataset === points[0]?.dataset) : [];
  if (!dev.length) return { points, front: frontOf(points) };
  const groups = Map.groupBy ? Map.groupBy(dev, (row) => row.group) : new Map([[null, dev]]);
  const chosen = new Set([...groups.values()].flatMap((rows) =>
    frontOf(rows.filter((row) => measured(row) && matches(row))).map((row) => `${row.study}/${row.trial_id}`)));
  return { points, front: points.filter((row) => chosen.has(`${row.study}/${row.trial_id}`)).sort((a, b) => a[view.x] - b[view.x]) };
}

// -- the plot ---------------------------------------------------------------------------------------------

function hover(row) {
  const test = testOf(row);
  const lines = [`<b>${escape(name(row))}</b>  ${escape(row.backbone)}`,
    ...[view.y, view.x].map((c) => `${COLUMNS[c].label}: ${show(c, row[c])}`)];
  if (test) lines.push(`on test queries: ${show(view.y, test[view.y])}`);
  if (row.parameter_ratio && view.x !== "parameter_ratio")
    lines.push(`${show("parameter_ratio", row.parameter_ratio)} of the full model's parameters`);
  return lines.join("<br>");
}

function intervals(points, ink) {
  if (view.y !== "ndcg_at_10" || points.length > 200 || points.some((r) => r.ndcg_at_10_low === null)) return {};
  return { error_y: { type: "data", symmetric: false, array: points.map((r) => r.ndcg_at_10_high - r.ndcg_at_10),
    arrayminus: points.map((r) => r.ndcg_at_10 - r.ndcg_at_10_low), thickness: 1, width: 3, color: ink } };
}

function markers(points, label, style, bars = false) {
  return { type: "scatter", mode: "markers", name: label, x: points.map((r) => r[view.x]), y: points.map((r) => r[view.y]),
    customdata: points.map((r) => r.key), text: points.map(hover), hovertemplate: "%{text}<extra></extra>",
    ...(bars ? intervals(points, style.color) : {}),
    marker: { size: points.length > 500 ? 7 : 11, line: { width: points.length > 500 ? 0 : 1.5, color: color("--paper") }, ...style } };
}

// Labels go to the free side of the staircase; one that would touch an earlier label is left out.
function labels(named, everything) {
  const span = (c) => {
    const values = everything.map((r) => r[c]);
    return values.reduce((a, b) => Math.max(a, b)) - values.reduce((a, b) => Math.min(a, b)) || 1;
  };
  const [wide, high] = [span(view.x), span(view.y)];
  const rightward = COLUMNS[view.x].better === "max";
  const placed = [];
  return [...named].sort((a, b) => b[view.y] - a[view.y]).flatMap((row) => {
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
  const mine = rowsOf("test")[0]?.dataset;
  return DATA.published.filter((r) => r.ours === mine && r[view.x] != null && r[view.y] != null);
}

const MARKED = 1500; // SVG markers a browser draws in well under a second

// Beyond that a cloud hides its own points: the front, the full models, the chosen one, and an even part of the rest.
function marked(points, front) {
  if (points.length <= MARKED) return points;
  const always = new Set([...front.map((r) => r.key), view.chosen]);
  const every = Math.ceil(points.length / MARKED);
  return points.filter((r, number) => number % every === 0 || always.has(r.key) || r === fullOf(r));
}

function traces(points, front) {
  const onFront = new Set(front.map((r) => r.key));
  const drawn = [{ type: "scatter", mode: "lines", name: "Pareto front", x: front.map((r) => r[view.x]),
    y: front.map((r) => r[view.y]), hoverinfo: "skip",
    line: { shape: COLUMNS[view.x].better === "min" ? "hv" : "vh", color: color("--front"), width: 2 } }];
  const kinds = view.by === "front" ? [null] : distinct(points.map((r) => r[view.by])).sort();
  for (const [trained, symbol, label] of [[false, "circle", "as compressed"], [true, "diamond", "trained after"]]) {
    kinds.forEach((kind, number) => {
      const group = points.filter((r) => Boolean(r.recovered) === trained && (kind === null || r[view.by] === kind));
      const best = group.filter((r) => onFront.has(r.key)), rest = group.filter((r) => !onFront.has(r.key));
      const ink = kind === null ? color("--front") : MARKS[number % MARKS.length];
      const called = kind === null ? label : `${kind}, ${label}`;
      if (rest.length) drawn.push(markers(rest, escape(called), { symbol: `${symbol}-open`, opacity: 0.8,
        color: kind === null ? color("--other") : ink, line: { width: 1.5, color: kind === null ? color("--other") : ink } }));
      if (best.length) drawn.push(markers(best, `${escape(called)}, on the front`, { symbol, color: ink }, true));
    });
  }
  const chosen = points.filter((r) => r.key === view.chosen);
  if (chosen.length) drawn.push({ ...markers(chosen, "chosen", { symbol: "circle-open", size: 22, color: color("--ink"),
    line: { width: 2.5, color: color("--ink") } }), showlegend: false, hoverinfo: "skip", hovertemplate: null });
  if (view.published && published().length) {
    const theirs = published().map((r) => ({ ...r, key: null, recovered: false }));
    drawn.push({ ...markers(theirs, "EffiR paper, other backbones", { symbol: "triangle-up-open", color: color("--reference") }),
      text: theirs.map((r) => [`<b>${escape(r.backbone)} ${escape(r.variant)}</b>  arXiv 2512.20612`,
        ...[view.y, view.x].map((c) => `${COLUMNS[c].label}: ${show(c, r[c])}`)].join("<br>")) });
  }
  return drawn;
}

function axis(column, scale = {}) {
  return { title: { text: COLUMNS[column].label, standoff: 12 }, automargin: true, ...scale, gridcolor: color("--line"),
    linecolor: color("--line"), zeroline: false, ...AXIS[COLUMNS[column].kind] };
}

function layout(more) {
  return { paper_bgcolor: color("--paper"), plot_bgcolor: color("--paper"), margin: { t: 32, r: 20, b: 40 },
    font: { color: color("--ink"), family: "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif", size: 14 },
    hoverlabel: { bgcolor: color("--shade"), bordercolor: color("--line"), font: { color: color("--ink") }, align: "left" },
    legend: { orientation: "h", y: -0.16, yanchor: "top", x: 0 }, hovermode: "closest", ...more };
}

const config = (file) => ({ responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "sendDataToCloud", "sendChartToCloud"],
  toImageButtonOptions: { format: "svg", filename: file } });

function bm25(points) {
  const scores = distinct(points.map((r) => r.bm25_ndcg_at_10).filter((score) => score !== null));
  if (view.y !== "ndcg_at_10" || scores.length !== 1) return {};
  const line = { color: color("--quiet"), width: 1.5, dash: "dot" };
  return { shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: scores[0], y1: scores[0], line }],
    note: { xref: "paper", x: 0, xanchor: "left", y: scores[0], yshift: 9, showarrow: false, text: "BM25",
      font: { color: color("--quiet"), size: 12 } } };
}

function drawPlot({ points, front }) {
  element("published-label").hidden = published().length === 0;
  const everything = view.published ? [...points, ...published()] : points;
  const across = everything.map((r) => r[view.x]);
  const low = across.reduce((a, b) => Math.min(a, b), Infinity), high = across.reduce((a, b) => Math.max(a, b), -Infinity);
  const wide = low > 0 && high / low > 20;
  const { shapes, note } = bm25(points);
  const named = distinct([...front, ...points.filter((r) => r === fullOf(r))]);
  const annotations = everything.length ? [] : [{ text: "Nothing was measured for these axes", showarrow: false }];
  if (!wide && everything.length) annotations.push(...labels(named, everything));
  if (note) annotations.push(note);
  const drawn = marked(points, front);
  Plotly.react("plot", traces(drawn, front), layout({ annotations, shapes: shapes ?? [],
    xaxis: axis(view.x, wide ? { type: "log", dtick: "D2" } : { type: "linear" }), yaxis: axis(view.y) }), config("pareto"));
  element("plot").setAttribute("role", "group");
  element("plot").setAttribute("aria-label", `${COLUMNS[view.y].label} against ${COLUMNS[view.x].label}: ${points.length} ` +
    `models, ${front.length} on the front. The tables below have all figures.`);
  element("summary").textContent = `${points.length} models, ${front.length} on the front of ` +
    `${COLUMNS[view.y].label} and ${COLUMNS[view.x].label.toLowerCase()}.` + incomparable(points) +
    (view.split === "test" && DATA.rows.some((r) => r.split === "dev")
      ? " The front was chosen on dev queries; test scores exist for what was chosen." : "") +
    (drawn.length < points.length ? ` The plot marks ${drawn.length} of them; a search or a filter shows all of what it leaves.` : "") +
    (DATA.total > DATA.rows.length + DATA.failed.length
      ? ` The page has ${DATA.rows.length} of ${DATA.total} rows: every front of nDCG@10, full and tested models, an even part of the rest.` : "");
}

// -- the tables -------------------------------------------------------------------------------------------

const TABLE = ["schedule", "backbone", "recovered", "ndcg_at_10", "test_ndcg_at_10", "of_full", "recall_at_100", "mrr_at_10",
  "parameters", "parameter_ratio", "block_parameters", "flops_per_document", "document_ms", "document_speedup",
  "query_speedup", "seed", "study", "trial_id"];
const HEAD = { schedule: "Schedule", backbone: "Backbone", recovered: "Trained", test_ndcg_at_10: "nDCG@10, test", of_full: "nDCG@10 of full",
  seed: "Seed", study: "Study", trial_id: "Trial" };
const TEXT = new Set(["schedule", "backbone", "recovered", "study", "trial_id"]);
const LIKE = { test_ndcg_at_10: "ndcg_at_10", of_full: "parameter_ratio" }; // column -> one that is written alike

function tableRows(rows) {
  return rows.map((row) => ({ ...row, schedule: name(row), recovered: row.recovered ? "yes" : "",
    test_ndcg_at_10: testOf(row)?.ndcg_at_10 ?? null,
    of_full: fullOf(row) ? row.ndcg_at_10 / fullOf(row).ndcg_at_10 : null }));
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
  } else cellOf.textContent = show(LIKE[column] ?? column, row[column]);
  return cellOf;
}

function head(id, columns) {
  const [by, direction] = view.sort;
  return columns.map((column) => {
    const th = document.createElement("th"), button = document.createElement("button");
    th.scope = "col";
    if (TEXT.has(column)) th.className = "text";
    if (column === by) th.setAttribute("aria-sort", direction);
    button.type = "button";
    button.id = `${id}-by-${column}`;
    button.textContent = HEAD[column] ?? COLUMNS[column].label;
    button.onclick = () => {
      view.sort = [column, column === by && direction === "descending" ? "ascending" : "descending"];
      drawTables(shown());
      element(button.id)?.focus(); // the button that was pressed is a new one now
    };
    th.append(button);
    return th;
  });
}

function fillTable(id, columns, rows) {
  const tr = document.createElement("tr");
  tr.append(...head(id, columns));
  element(id).tHead.replaceChildren(tr);
  element(id).tBodies[0].replaceChildren(...rows.map((row) => {
    const line = document.createElement("tr");
    if (row.key === view.chosen) line.className = "chosen";
    line.append(...columns.map((column) => cell(column, row)));
    return line;
  }));
}

function drawTables({ points, front }) {
  const onFront = new Set(front.map((r) => r.key));
  const all = tableRows(rowsOf(view.split).filter(matches));
  const columns = TABLE.filter((c) => all.some((r) => r[c] !== null && r[c] !== ""))
    .filter((c) => !["backbone", "seed", "study"].includes(c) || distinct(all.map((r) => r[c])).length > 1)
    .filter((c) => c !== "test_ndcg_at_10" || view.split !== "test");
  const [by, direction] = view.sort;
  const sign = direction === "ascending" ? 1 : -1;
  all.sort((a, b) => (a[by] === null) - (b[by] === null) || sign * (a[by] > b[by] ? 1 : a[by] < b[by] ? -1 : 0));
  const rest = all.filter((row) => !onFront.has(row.key));
  const pages = Math.max(1, Math.ceil(rest.length / PAGE));
  view.page = Math.max(0, Math.min(view.page, pages - 1));
  fillTable("front", columns, all.filter((row) => onFront.has(row.key)));
  fillTable("trials", columns, rest.slice(PAGE * view.page, PAGE * (view.page + 1)));
  element("others").hidden = rest.length === 0;
  element("pages").hidden = pages === 1;
  element("page").textContent = `${view.page + 1} of ${pages}`;
  element("back").disabled = view.page === 0;
  element("forth").disabled = view.page === pages - 1;
}

function saveCsv() {
  const rows = tableRows(shown().points), columns = ["study", "trial_id", "schedule", "backbone", "dataset", "split", "sample",
    "seed", ...Object.keys(COLUMNS), "ndcg_at_10_low", "ndcg_at_10_high", "test_ndcg_at_10", "bm25_ndcg_at_10"];
  save(csvOf([columns, ...rows.map((row) => columns.map((c) => row[c]))]), "models.csv", "text/csv");
}

// -- one model --------------------------------------------------------------------------------------------

function definitions(pairs) {
  return `<dl>${pairs.map(([term, text]) => `<dt>${escape(term)}</dt><dd>${escape(text)}</dd>`).join("")}</dl>`;
}

// What stays of every block, input at the left: attention above, MLP below, as high as it is wide.
function picture(row) {
  if (!row.layers || row.layers.length === 0) return "";
  const size = 100 / row.layers.length, parts = [];
  row.layers.forEach(([attention, width], index) => {
    const x = (index * size).toFixed(2), wide = (0.86 * size).toFixed(2), high = (16 * width).toFixed(2), y = (36 - 16 * width).toFixed(2);
    parts.push(`<rect x="${x}" y="1" width="${wide}" height="16" fill="none" stroke="currentColor" stroke-width=".2" opacity=".5"/>`,
      `<rect x="${x}" y="20" width="${wide}" height="16" fill="none" stroke="currentColor" stroke-width=".2" opacity=".5"/>`);
    if (attention) parts.push(`<rect x="${x}" y="1" width="${wide}" height="16" fill="var(--front)"/>`);
    if (width > 0) parts.push(`<rect x="${x}" y="${y}" width="${wide}" height="${high}" fill="var(--reference)"/>`);
  });
  const stays = `${row.layers.filter(([attention]) => attention).length} attention and ` +
    `${row.layers.filter(([, width]) => width > 0).length} MLP sublayers of ${row.layers.length} blocks stay`;
  return `<svg id="model" viewBox="0 0 100 38" role="img" aria-label="${escape(stays)}">${parts.join("")}</svg>` +
    `<p>${escape(stays)} (blue: attention, orange: MLP, as high as it is wide; first block at the left).</p>`;
}

const settings = (row) => Object.entries(row.settings ?? {}).filter(([, value]) => value !== null)
  .map(([term, value]) => [last(term), typeof value === "string" ? value : JSON.stringify(value)]);

function against(row) {
  const found = DATA.against_full[measuredOn(row)];
  if (!found) return [];
  return [["against the full model", `${(100 * found.difference).toFixed(1)} points of nDCG@10 on ${found.split} (95 % interval ` +
    `${(100 * found.low).toFixed(1)} to ${(100 * found.high).toFixed(1)}, p ${found.p.toPrecision(2)} after Holm)`]];
}

function drawDetail() {
  const row = DATA.rows.find((r) => r.key === view.chosen);
  element("detail").hidden = !row;
  if (!row) return;
  const figures = Object.keys(COLUMNS).filter((c) => row[c] !== null).map((c) => [COLUMNS[c].label, show(c, row[c])]);
  const interval = row.ndcg_at_10_low === null ? [] : [["95 % interval of nDCG@10",
    `${show("ndcg_at_10", row.ndcg_at_10_low)} to ${show("ndcg_at_10", row.ndcg_at_10_high)}, ${row.n_queries} queries`]];
  const speed = row.document_speedup_low === null ? [] : [["95 % interval of the speed-up",
    `${show("document_speedup", row.document_speedup_low)} to ${show("document_speedup", row.document_speedup_high)}`]];
  const doubt = row.doubtful ? [["speed", "more than the saved FLOPs explain: measure it again on a quiet machine"]] : [];
  const bm25 = row.bm25_ndcg_at_10 === null ? [] : [["BM25, same queries", show("ndcg_at_10", row.bm25_ndcg_at_10)]];
  element("detail").innerHTML = `<h2>${escape(name(row))}</h2>` + picture(row) + definitions([["backbone", row.backbone],
    ...against(row), ...settings(row), ...figures, ...interval, ...speed, ...doubt, ...bm25, ["measured on", `${row.dataset}, ${row.sample}`],
    ["when, where", `${row.created_at}, ${row.hardware}`],
    ...(row.device_seconds === null ? [] : [["cost", `${Number((row.device_seconds / 60).toPrecision(2))} minutes of a device`]]),
    ...(row.model ? [["model", `${row.model}, in the study's folder`]] : []),
    ["take it with you", `effir-ray export DIR --trial ${row.trial_id} --out NEW`],
    ["run it again", `effir-ray repeat DIR --trial ${row.trial_id} --out NEW`],
    ["look into it", "effir-ray analyze --backbone NEW --out FIGURES, of what was exported: queries and documents block by block"]]);
  offerRivals(row);
}

function drawFailed() {
  const mine = new Set(rowsOf(view.split).map((r) => r.dataset));
  const lost = DATA.failed.filter((r) => mine.has(r.dataset));
  element("failed").hidden = !lost.length;
  element("failed").querySelector("summary").textContent = `${lost.length} failed trial${lost.length === 1 ? "" : "s"}`;
  element("failed").querySelector("ul").innerHTML =
    lost.slice(0, 500).map((r) => `<li><b>${escape(r.schedule)}</b> (${escape(r.split)}): ${escape(r.reason)}</li>`).join("");
}

// -- everything together ----------------------------------------------------------------------------------

// What is looked at is a trial: beside other queries its row of those is shown, or nothing where there is none.
function follow() {
  const row = DATA.rows.find((r) => r.key === view.chosen);
  if (!row || (row.split === view.split && row.group === view.group)) return;
  const same = rowsOf(view.split).find((r) => r.study === row.study && r.trial_id === row.trial_id);
  view.chosen = same ? same.key : null;
}

function draw() {
  document.documentElement.dataset.theme = view.theme;
  follow();
  const found = shown();
  drawDetail(); // first: the plot makes room for it
  drawPlot(found);
  Plotly.Plots.resize("plot");
  drawTables(found);
  drawFigures(found);
  drawFailed();
}

function choose(key) {
  view.chosen = view.chosen === key ? null : key;
  const found = shown();
  drawDetail(); // first: the plot makes room for it
  drawPlot(found);
  Plotly.Plots.resize("plot");
  drawTables(found);
  drawFigures(found, ["axes", "curves"]);
}

function fill(id, options, chosen) {
  element(id).replaceChildren(...options.map(([value, label]) => new Option(label, value, false, value === chosen)));
  element(id).onchange = () => { view[id] = element(id).value; view.page = 0; if (id === "group") offer(); draw(); };
}

// What can be chosen depends on the data: splits it has, columns that were measured.
function offer() {
  const mine = DATA.rows.filter((r) => r.group === view.group);
  const splits = distinct(mine.map((r) => r.split)).sort((a, b) => (b === "dev") - (a === "dev"));
  view.split = splits.includes(view.split) ? view.split : splits[0];
  fill("split", splits.map((s) => [s, s]), view.split);
  const named = (names) => names.filter((c) => mine.some((r) => r[c] !== null)).map((c) => [c, COLUMNS[c].label]);
  const costs = named(Object.keys(COLUMNS).filter((c) => !QUALITY.includes(c)));
  view.x = costs.some(([c]) => c === view.x) ? view.x : costs[0]?.[0] ?? view.x;
  fill("y", named(QUALITY), view.y);
  fill("x", costs, view.x);
  const kinds = [["study", "by study"], ["backbone", "by backbone"], ["seed", "by seed"]]
    .filter(([column]) => distinct(mine.map((r) => r[column])).length > 1);
  fill("by", [["front", "the front"], ...kinds], view.by);
  element("by").parentElement.hidden = kinds.length === 0;
  element("subtitle").textContent = `${distinct(mine.map((r) => r.backbone)).join(", ")} on ${view.group}`;
}

view.group = DATA.rows[0]?.group;
fill("group", distinct(DATA.rows.map((r) => r.group)).map((d) => [d, d]), view.group);
offer();
element("published").onchange = () => { view.published = element("published").checked; draw(); };
element("only").oninput = () => { view.only = element("only").value; view.page = 0; draw(); };
element("csv").onclick = saveCsv;
element("back").onclick = () => { view.page -= 1; drawTables(shown()); };
element("forth").onclick = () => { view.page += 1; drawTables(shown()); };
const relabel = () => { element("theme").textContent = view.theme === "dark" ? "Light" : "Dark";
  element("theme").setAttribute("aria-pressed", String(view.theme === "dark")); };
// Paper is white: what is drawn in the dark is drawn again for it.
let before = null;
window.addEventListener("beforeprint", () => { before = view.theme; view.theme = "light"; draw(); });
window.addEventListener("afterprint", () => { view.theme = before ?? view.theme; draw(); });
element("theme").onclick = () => { view.theme = view.theme === "dark" ? "light" : "dark"; relabel(); draw(); };
relabel();
for (const [id, part] of Object.entries(FIGURES)) element(`${id}-of`).ontoggle = () => {
  if (!element(`${id}-of`).open) return;
  drawFigures(shown(), [id]);
  if (id === "axes" && !element(id).dataset.heard) {
    element(id).on("plotly_click", (event) => choose(event.points[0].customdata));
    element(id).dataset.heard = "yes";
  }
};
for (const id of ["plot", ...Object.keys(FIGURES)]) offerFiles(id);
element("provenance").innerHTML = definitions(DATA.provenance);
draw();
element("plot").on("plotly_click", (event) => { const key = event.points[0]?.customdata; if (key) choose(key); });
