"use strict";
// Figures of a study beside its front, each drawn when its part of the page is opened; and files of every figure.

const sizeOf = (row) => row.parameters ?? 0;
const nothing = (text) => ({ traces: [], layout: { annotations: [{ text, showarrow: false }], xaxis: { visible: false },
  yaxis: { visible: false }, height: 120 } });
const shades = () => [[0, color("--paper")], [1, color("--front")]];
const labelled = (row) => `${escape(name(row))} ${escape(row.trial_id.slice(0, 4))}`;
const plain = (title, more = {}) => ({ title: { text: title, standoff: 12 }, automargin: true, gridcolor: color("--line"),
  linecolor: color("--line"), zeroline: false, ...more });

// The share of the rectangle between worst and best that a front leaves behind, after each model.
function volumes(points) {
  const better = (column, row) => (COLUMNS[column].better === "max" ? row[column] : -row[column]);
  const at = points.map((row) => [better(view.x, row), better(view.y, row)]);
  const ends = [0, 1].map((i) => [at.reduce((a, p) => Math.min(a, p[i]), Infinity), at.reduce((a, p) => Math.max(a, p[i]), -Infinity)]);
  const scaled = at.map((p) => p.map((v, i) => (v - ends[i][0]) / (ends[i][1] - ends[i][0] || 1)));
  let stairs = []; // best in x first, and so rising in y
  return scaled.map(([x, y]) => {
    if (!stairs.some(([a, b]) => a >= x && b >= y)) {
      stairs = [...stairs.filter(([a, b]) => a > x || b > y), [x, y]].sort((p, q) => q[0] - p[0]);
    }
    return stairs.reduce(([sum, below], [a, b]) => [sum + a * (b - below), b], [0, 0])[0];
  });
}

function volumeFigure({ points }) {
  const byTime = [...points].sort((a, b) => a.created_at.localeCompare(b.created_at));
  if (byTime.length < 3) return nothing("Fewer than three models");
  return { traces: [{ type: "scatter", mode: "lines", name: "hypervolume", line: { shape: "hv", color: color("--front"), width: 2 },
    x: byTime.map((_, index) => index + 1), y: volumes(byTime), text: byTime.map((r) => escape(name(r))),
    hovertemplate: "%{text}: %{y:.3f}<extra></extra>" }], layout: { showlegend: false, height: 300,
    xaxis: plain("trials", { tickformat: "d" }), yaxis: plain("hypervolume", { tickformat: ".2f" }) } };
}

function heat(z, y, across, more) {
  return { type: "heatmap", z, y, x: z[0].map((_, index) => index), colorscale: shades(), xgap: 2, ygap: 2, showscale: false,
    ...across, ...more };
}

function keptFigure({ front }) {
  const rows = front.filter((r) => r.layers?.length).sort((a, b) => sizeOf(a) - sizeOf(b)).slice(0, 60);
  if (!rows.length) return nothing("These rows do not say what stays of every block");
  const longest = rows.reduce((most, r) => Math.max(most, r.layers.length), 0);
  const cells = (part) => rows.map((r) => Array.from({ length: longest }, (_, i) => (r.layers[i] ? Number(r.layers[i][part]) : null)));
  const style = { zmin: 0, zmax: 1, hovertemplate: "%{y}, block %{x}: %{z:.2f}<extra></extra>" };
  return { traces: [heat(cells(0), rows.map(labelled), { xaxis: "x", yaxis: "y" }, { ...style, name: "attention" }),
    heat(cells(1), rows.map(labelled), { xaxis: "x2", yaxis: "y" }, { ...style, name: "MLP" })],
  layout: { showlegend: false, height: 140 + 26 * rows.length, hovermode: "closest",
    xaxis: plain("attention of block", { domain: [0, 0.485], dtick: Math.ceil(longest / 16) }),
    xaxis2: plain("MLP of block", { domain: [0.515, 1], dtick: Math.ceil(longest / 16) }), yaxis: plain("", { type: "category" }) } };
}

const rank = (scores) => {
  const order = scores.map((_, i) => i).sort((a, b) => scores[a] - scores[b]), ranks = [];
  order.forEach((layer, place) => { ranks[layer] = place + 1; });
  return ranks;
};

function importanceFigure() {
  const found = DATA.importance;
  if (!found.length) return nothing("No importance was measured, or its stages are not beside these rows");
  const lines = found.flatMap(({ study, criterion, units }) => Object.entries(units).map(([unit, scores]) =>
    ({ label: `${unit}, ${criterion}${found.length > 1 ? `, ${study}` : ""}`, scores, ranks: rank(scores) }))).reverse();
  const longest = lines.reduce((most, line) => Math.max(most, line.ranks.length), 0);
  const fill = (values) => Array.from({ length: longest }, (_, i) => values[i] ?? null);
  return { traces: [heat(lines.map((line) => fill(line.ranks)), lines.map((line) => escape(line.label)), {}, { reversescale: true,
    name: "order", text: lines.map((line) => fill(line.ranks).map((value) => value ?? "")), texttemplate: longest > 16 ? "" : "%{text}",
    customdata: lines.map((line) => fill(line.scores)),
    hovertemplate: "%{y}, block %{x}: goes as number %{z}, importance %{customdata:.3g}<extra></extra>" })],
  layout: { height: 120 + 36 * lines.length, xaxis: plain("block", { dtick: Math.ceil(longest / 16) }), yaxis: plain("", { type: "category" }) } };
}

const last = (text) => text.split(".").at(-1);

// One axis: every model's place on it from 0 to 1, what stands there, and the words at both ends.
function along(label, values, kind = "text") {
  const text = (v) => (v === null || v === undefined ? "none" : typeof v === "number" ? SHOW[kind](v) : typeof v === "string" ? v : JSON.stringify(v));
  const numeric = values.every((v) => typeof v === "number");
  const known = numeric ? null : distinct(values.map(text)).sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));
  const numbers = numeric ? values : values.map((v) => known.indexOf(text(v)));
  const low = numbers.reduce((a, b) => Math.min(a, b)), high = numbers.reduce((a, b) => Math.max(a, b));
  return { label, texts: values.map(text), at: numbers.map((v) => (v - low) / (high - low || 1)),
    ends: numeric ? [text(low), text(high)] : [known[0], known.at(-1)] };
}

// Parallel coordinates of lines: plotly's own build code from text, which the page's policy forbids.
function axesFigure({ points }) {
  const rows = sortedBy(points, true).filter((r) => Object.keys(r.settings).length).slice(0, 300).reverse();
  if (rows.length < 2) return nothing("Fewer than two models of these settings");
  const names = distinct(rows.flatMap((r) => Object.keys(r.settings))).filter((s) => distinct(rows.map((r) => JSON.stringify(r.settings[s]))).length > 1);
  const figures = distinct([view.x, "document_speedup", view.y]).filter((c) => COLUMNS[c] && rows.every((r) => r[c] !== null));
  const axes = [...names.slice(0, 8).map((s) => along(last(s), rows.map((r) => r.settings[s]))),
    ...figures.map((c) => along(COLUMNS[c].label, rows.map((r) => r[c]), COLUMNS[c].kind))];
  const traces = rows.map((row, model) => ({ type: "scatter", mode: "lines+markers", showlegend: false, name: labelled(row), customdata: axes.map(() => row.key),
    x: axes.map((_, i) => i), y: axes.map((axis) => axis.at[model]), text: axes.map((axis) => escape(`${axis.label}: ${axis.texts[model]}`)),
    hovertemplate: `${labelled(row)}<br>%{text}<extra></extra>`, marker: { size: 5 },
    line: { width: row.key === view.chosen ? 4 : 1.5 }, opacity: row.key === view.chosen ? 1 : 0.25 + (0.75 * model) / rows.length,
    ...(row.key === view.chosen ? { marker: { size: 8, color: color("--reference") } } : { marker: { size: 5, color: color("--front") } }) }));
  const ends = axes.flatMap((axis, i) => [[-0.07, axis.ends[0]], [1.07, axis.ends[1]]].map(([y, text]) =>
    ({ x: i, y, text: escape(text.slice(0, 16)), showarrow: false, font: { size: 11, color: color("--quiet") } })));
  const lines = axes.map((_, i) => ({ type: "line", x0: i, x1: i, y0: 0, y1: 1, line: { color: color("--line"), width: 1 }, layer: "below" }));
  return { traces, layout: { height: 420, annotations: ends, shapes: lines, xaxis: plain("", { tickvals: axes.map((_, i) => i),
    ticktext: axes.map((axis) => escape(axis.label)), showgrid: false }), yaxis: { visible: false, range: [-0.14, 1.14] } } };
}

function effectsFigure() {
  const dataset = rowsOf(view.split)[0]?.dataset;
  const found = DATA.effects.filter((e) => e.dataset === dataset);
  const traces = found.flatMap(({ study, shares }) => Object.entries(shares).filter(([, share]) => Object.keys(share).length).map(([objective, share]) => {
    const settings = Object.keys(share).sort((a, b) => share[a] - share[b]);
    return { type: "bar", orientation: "h", name: escape(COLUMNS[objective].label + (found.length > 1 ? `, ${study}` : "")), y: settings.map(escape),
      x: settings.map((s) => share[s]), hovertemplate: "%{y}: %{x:.0%}<extra></extra>" };
  }));
  if (!traces.length) return nothing("Ten trials or more, which differ in two settings or more, say which of them matter");
  const settings = distinct(traces.flatMap((t) => t.y));
  traces.forEach((trace, number) => { trace.marker = { color: MARKS[number % MARKS.length] }; });
  return { traces, layout: { barmode: "group", height: 140 + 20 * settings.length * traces.length, xaxis: plain("share", { tickformat: ".0%", range: [0, 1] }),
    yaxis: plain("", { type: "category" }), legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 } } };
}

function curvesFigure({ points }) {
  const rows = points.filter(curveOf).slice(0, 40);
  if (!rows.length) return nothing("No training of these models is beside these rows");
  const chosen = (row) => row.key === view.chosen;
  return { traces: rows.map((row, number) => {
    const { steps, loss } = curveOf(row);
    return { type: "scatter", mode: steps.length > 1 ? "lines" : "markers", name: labelled(row), x: steps, y: loss,
      opacity: view.chosen && !chosen(row) ? 0.35 : 1, line: { width: chosen(row) ? 4 : 1.5, color: MARKS[number % MARKS.length] },
      hovertemplate: `${labelled(row)}, step %{x}: %{y:.4f}<extra></extra>` };
  }), layout: { height: 380, xaxis: plain("step"), yaxis: plain("loss"), legend: { orientation: "v" } } };
}

const curveOf = (row) => (row.recovered && row.model ? DATA.curves[row.model] : undefined);

function drawDatasets() {
  const single = DATA.rows.filter((r) => r.split === view.split && !r.averaged);
  const groups = distinct(single.map((r) => r.group));
  const models = new Map();
  for (const row of single.filter(matches)) {
    const key = JSON.stringify([row.study, row.backbone, name(row), row.settings]); // seeds are no setting: their mean
    const model = models.get(key) ?? { row, scores: new Map() };
    model.scores.set(row.group, [...(model.scores.get(row.group) ?? []), row[view.y]]);
    models.set(key, model);
  }
  const mean = (values) => (values?.length && values.every((v) => v !== null) ? values.reduce((a, b) => a + b) / values.length : null);
  const lines = [...models.values()].map((model) => ({ row: model.row, scores: groups.map((g) => mean(model.scores.get(g))) }));
  lines.forEach((line) => { line.mean = line.scores.includes(null) ? null : mean(line.scores); });
  lines.sort((a, b) => (b.mean ?? -1) - (a.mean ?? -1) || (b.scores[0] ?? -1) - (a.scores[0] ?? -1));
  const cells = (kind, texts) => texts.map((text, i) => `<${kind}${i < 2 ? ' class="text"' : ""}${kind === "th" ? ' scope="col"' : ""}>${escape(text)}</${kind}>`).join("");
  element("datasets").tHead.innerHTML = `<tr>${cells("th", ["Schedule", "Backbone", ...(groups.length > 1 ? ["Mean"] : []), ...groups])}</tr>`;
  element("datasets").tBodies[0].innerHTML = lines.slice(0, 200).map(({ row, scores, mean: all }) => `<tr>${cells("td", [name(row), row.backbone,
    ...(groups.length > 1 ? [show(view.y, all)] : []), ...scores.map((s) => show(view.y, s))])}</tr>`).join("");
}

const FIGURES = { volume: volumeFigure, kept: keptFigure, importance: importanceFigure, axes: axesFigure, effects: effectsFigure,
  curves: curvesFigure, datasets: null };

// Those that are open, or are just being opened.
function drawFigures(found, only = Object.keys(FIGURES)) {
  for (const id of only.filter((each) => element(`${each}-of`).open)) {
    if (id === "datasets") { drawDatasets(); continue; }
    const { traces, layout: more } = FIGURES[id](found);
    element(id).style.height = `${more.height}px`;
    Plotly.react(id, traces, layout({ margin: { t: 20, r: 20, b: 40 }, ...more }), config(id));
    element(id).setAttribute("role", "group");
    element(id).setAttribute("aria-label", element(`${id}-of`).querySelector("figcaption").textContent.replace(/\s+/g, " "));
  }
}

// -- files of figures -------------------------------------------------------------------------------------

function save(text, file, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = file;
  link.click();
  URL.revokeObjectURL(link.href);
}

const quoted = (value) => (/[",\n]/.test(String(value ?? "")) ? `"${String(value).replaceAll('"', '""')}"` : String(value ?? ""));
const csvOf = (lines) => `${lines.map((cells) => cells.map(quoted).join(",")).join("\n")}\n`;
const unescaped = (text) => String(text ?? "").replace(/&#(\d+);/g, (_, code) => String.fromCharCode(code));

// What a figure draws, a line a point: of what, x, y, value.
function pointsOf(id) {
  const lines = [["series", "x", "y", "value"]];
  for (const trace of element(id).data ?? []) {
    const series = unescaped(trace.name ?? "");
    if (trace.type === "heatmap") trace.z.forEach((line, row) => line.forEach((value, column) =>
      lines.push([series, trace.x[column], unescaped(trace.y[row]), value])));
    else Array.from(trace.x ?? []).forEach((x, i) => lines.push([series, x, unescaped(trace.y[i]), id === "axes" ? unescaped(trace.text[i]) : ""]));
  }
  return lines;
}

function offerFiles(id) {
  if (id === "datasets") return;
  const line = document.createElement("p");
  line.className = "files";
  line.append("Save as");
  for (const kind of ["SVG", "PNG", "CSV"]) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = kind;
    button.setAttribute("aria-label", `Save this figure as ${kind}`);
    button.onclick = () => (kind === "CSV" ? save(csvOf(pointsOf(id)), `${id === "plot" ? "pareto" : id}.csv`, "text/csv")
      : Plotly.downloadImage(id, { format: kind.toLowerCase(), filename: id === "plot" ? "pareto" : id, ...(kind === "PNG" ? { scale: 2 } : {}) }));
    line.append(button);
  }
  element(id).after(line);
}

// -- two models -------------------------------------------------------------------------------------------

function random(seed) { // mulberry32
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

// Paired bootstrap over queries: mean of `differences` and its 95 % interval; `effir-ray compare` draws more often.
function bootstrap(differences) {
  const draw = random(1), n = differences.length, means = [];
  for (let i = 0; i < 2000; i += 1) {
    let sum = 0;
    for (let j = 0; j < n; j += 1) sum += differences[Math.floor(draw() * n)];
    means.push(sum / n);
  }
  means.sort((a, b) => a - b);
  return { mean: differences.reduce((a, b) => a + b, 0) / n, low: means[50], high: means[1949] };
}

function comparison(row, rival) {
  const [mine, theirs] = [DATA.query_scores[row.key], DATA.query_scores[rival.key]];
  const queries = Object.keys(mine).filter((query) => query in theirs);
  const { mean, low, high } = bootstrap(queries.map((query) => mine[query] - theirs[query]));
  const points = (value) => `${value >= 0 ? "+" : ""}${(100 * value).toFixed(1)}`;
  const said = low > 0 || high < 0 ? "more than chance over queries" : "within chance over queries";
  return `${points(mean)} points of nDCG@10 to ${name(rival)} (95 % interval ${points(low)} to ${points(high)}, ` +
    `${queries.length} queries): ${said}.`;
}

// Beside which models the chosen one can be put: those of the same queries whose scores are on the page.
function offerRivals(row) {
  if (row.averaged) {
    const hint = document.createElement("p");
    hint.textContent = "Query by query, models are compared on one data set: choose it above under Data.";
    element("detail").append(hint);
    return;
  }
  if (!DATA.query_scores[row.key]) return;
  const rivals = rowsOf(row.split).filter((r) => r.key !== row.key && r.group === row.group && DATA.query_scores[r.key]);
  if (!rivals.length) return;
  const label = document.createElement("label"), select = document.createElement("select"), said = document.createElement("p");
  label.id = "rivals";
  label.textContent = "Compare with ";
  select.id = "rival";
  select.append(new Option("choose a model", ""), ...rivals.map((r) => new Option(`${name(r)} (${r.trial_id.slice(0, 4)})`, r.key)));
  select.onchange = () => { said.textContent = select.value ? comparison(row, rivals.find((r) => r.key === select.value)) : ""; };
  said.id = "compared";
  label.append(select);
  element("detail").append(label, said);
}
