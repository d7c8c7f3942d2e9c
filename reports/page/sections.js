"use strict";
// What is said of rows: failures by their cause, what is unusual, and each model's laws and charts.

const OTHERS = 50; // rows of one cause that are listed
const CAUSES = 6; // causes that stand open before the others
const UNUSUAL = 12; // values that do

// A reason without what differs from model to model.
const cause = (reason, model) => (reason ?? "").replaceAll(model, "").replace(/[-+]?\d[\d.,e+-]*/g, "#");

// Theorems before regressions, the verdict on a baseline before its parts, findings last.
const KINDS = ["theorem", "regression", "reference", "phenomenon"];
const rank = (data, row) => 2 * ((KINDS.indexOf(data.text("kind", row)) + KINDS.length + 1) % (KINDS.length + 1)) + (data.text("law", row) !== "regression/verdict");

const causes = new Map(); // by row

function byCause(data, rows) {
  const groups = new Map();
  for (const row of rows) {
    const [outcome, law] = [data.text("outcome", row), data.text("law", row)];
    const own = outcome === "error" ? "" : law; // one cause keeps many laws from being measured
    if (!causes.has(row)) causes.set(row, `${outcome}|${own}|${cause(data.text("reason", row), data.text("model", row))}`);
    const key = causes.get(row);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(row);
  }
  return [...groups.values()].sort((a, b) => b.length - a.length || rank(data, a[0]) - rank(data, b[0]));
}

const several = (count, word) => (count === 1 ? `1 ${word}` : `${count.toLocaleString("en")} ${word}s`);

function title(data, group) {
  const laws = new Set(group.map((row) => data.columns.law[row]));
  const models = new Set(group.map((row) => data.columns.model[row]));
  const what = laws.size === 1 ? data.text("law", group[0]) : `${laws.size} laws`;
  const where = models.size === 1 ? data.text("model", group[0]) : several(models.size, "model");
  return `${what} ${data.text("outcome", group[0]) === "fail" ? "fails" : "could not be measured"} on ${where}`;
}

function trouble(data, group) {
  const [row] = group;
  const details = data.columns.details[row].map((n) => data.texts[n]);
  const link = (one) => h("a", { href: address({ model: data.text("model", one), law: data.text("law", one) }) }, `${data.text("law", one)} on ${data.text("model", one)}`);
  const others = group.slice(1, OTHERS + 1).map((one) => h("li", {}, link(one), `: ${data.text("reason", one)}`));
  const more = group.length - 1 - others.length;
  return h("article", { class: `trouble ${data.text("outcome", row)}` },
    h("h3", {}, title(data, group)),
    h("p", {}, data.text("reason", row)),
    h("p", { class: "claim" }, data.text("claim", row)),
    details.length > 3 ? h("details", {}, h("summary", {}, `all ${details.length} that are listed`), h("ul", {}, details.map((line) => h("li", {}, line)))) : null,
    others.length ? h("details", {}, h("summary", {}, `${several(group.length - 1, "other")} of the same cause`),
      h("ul", {}, others, more ? h("li", {}, `and ${more.toLocaleString("en")} more, which the table shows`) : null)) : null,
    data.text("source", row) ? h("p", { class: "source" }, `Source: ${data.text("source", row)}`) : null,
    h("p", {}, "Reproduce with:"), h("pre", { tabindex: "0" }, data.text("reproduce", row)));
}

function troubles(data, shown) {
  const groups = byCause(data, shown.filter((row) => ["fail", "error"].includes(data.text("outcome", row))));
  const open = groups.slice(0, CAUSES).map((group) => trouble(data, group));
  const rest = groups.slice(CAUSES);
  return h("section", { "aria-labelledby": "failures" }, h("h2", { id: "failures" }, "Failures first"),
    open.length ? open : h("p", {}, "Nothing failed."),
    rest.length ? lazily(`${several(rest.length, "more cause")}`, () => rest.map((group) => trouble(data, group))) : null);
}

// What is made when it is opened.
function lazily(summary, made) {
  const details = h("details", {}, h("summary", {}, summary));
  details.addEventListener("toggle", () => details.append(...made()), { once: true });
  return details;
}

function unusual(data, shown) {
  const rows = shown.filter((row) => data.text("outcome", row) === "unusual");
  if (!rows.length) return null;
  const item = (row) => h("li", {}, h("b", {}, data.text("law", row)), ` on ${data.text("model", row)}: ${data.text("reason", row)}`);
  const rest = rows.slice(UNUSUAL);
  return h("section", { "aria-labelledby": "unusual" }, h("h2", { id: "unusual" }, "Unusual"),
    h("p", { class: "claim" }, "Values outside the range of real models: no failure, but worth a look."),
    h("ul", {}, rows.slice(0, UNUSUAL).map(item)),
    rest.length ? lazily(`${several(rest.length, "more")}`, () => [h("ul", {}, rest.slice(0, 10 * OTHERS).map(item))]) : null);
}

function bandOf(band) {
  if (!band) return "";
  const [low, high] = band.map(number);
  return band[0] === null ? `below ${high}` : band[1] === null ? `above ${low}` : `${low} to ${high}`;
}

// The band, or where real models lie, with the value's mark.
function strip(data, row) {
  const place = data.columns.strip[row];
  if (!place) return null;
  const [mark, low, high, isBand] = place;
  const picture = (tag, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
    return element;
  };
  const says = `${number(data.columns.value[row])}; ${isBand ? `band ${bandOf(data.columns.band[row])}` : beside(data, row)}`;
  const svg = picture("svg", { class: `strip ${data.text("outcome", row)}`, viewBox: "0 0 100 14", preserveAspectRatio: "none", role: "img", "aria-label": says });
  const told = picture("title", {});
  told.textContent = says;
  svg.append(told, picture("line", { x1: 0, y1: 7, x2: 100, y2: 7 }),
    picture("rect", { class: isBand ? "band" : "range", x: low, y: 3, width: Math.max(high - low, 0.5), height: 8 }),
    picture("rect", { class: "mark", x: mark - 0.8, y: 0, width: 1.6, height: 14 }));
  return svg;
}

function beside(data, row) {
  const [models, low, high] = data.columns.real[row];
  return `${models} real models: ${number(low)} to ${number(high)}`;
}

function whyOf(data, row) {
  const [outcome, reason, what, of] = ["outcome", "reason", "what", "of"].map((name) => data.text(name, row));
  const said = [reason && `${reason}${what && outcome === "not_applicable" ? "; " : ""}`];
  const listed = data.columns.values[row];
  const count = data.columns.count[row];
  if (["pass", "not_applicable"].includes(outcome) && listed.length) {
    said.push(...listed.map(([name, value, unit, over]) => h("div", {}, `${`${data.texts[name]} ${number(value)} ${data.texts[unit]}`.trim()}; ${data.texts[over]}`)));
  } else if (["pass", "not_applicable"].includes(outcome) && count) {
    said.push(`${what}; ${of}${count > 1 ? `; the least margin of ${count} values, which are in rows.jsonl` : ""}`);
  }
  return said.filter((one) => one !== null);
}

function lawLine(data, row) {
  const [law, kind, outcome, source] = ["law", "kind", "outcome", "source"].map((name) => data.text(name, row));
  const { value, band, layers, real } = data.columns;
  const known = real[row] && (outcome === "unusual" || !band[row]) ? beside(data, row) : "";
  const window = layers[row] ? `layers ${layers[row][0]}–${layers[row][1]}` : "";
  const bounds = (outcome === "unusual" ? "" : bandOf(band[row])) + known;
  return h("tr", { "data-row": String(row) },
    h("td", {}, h("b", {}, law), " ", h("span", { class: "source" }, kind), h("div", { class: "claim" }, data.text("claim", row))),
    h("td", { class: outcome }, `${data.constants.signs[outcome]} ${data.constants.words[outcome]}`),
    h("td", { class: "value" }, value[row] === null ? "" : `${number(value[row])} ${data.text("unit", row) ?? ""}`),
    h("td", {}, strip(data, row), h("div", { class: "source" }, [bounds, window].filter(Boolean).join("; "))),
    h("td", {}, whyOf(data, row), source ? h("div", { class: "source" }, source) : null));
}

function grouped(data, rows) {
  const groups = data.constants.groups.map((title) => ({ title, rows: [] }));
  const place = (row) => {
    const at = ["fail", "unusual", "known_failure", "pass"].indexOf(data.text("outcome", row).replace("error", "fail"));
    return at >= 0 ? at : data.columns.value[row] !== null ? 4 : 5;
  };
  const sorted = [...rows].sort((a, b) => (data.text("law", a) < data.text("law", b) ? -1 : 1));
  for (const row of sorted) groups[place(row)].rows.push(row);
  return groups.filter((group) => group.rows.length);
}

function lawTable(data, model, rows) {
  const heads = ["law", "verdict", "value", "band, or where real models lie", "why, or over what; source"];
  const bodies = grouped(data, rows).map((group) => h("tbody", {},
    h("tr", { class: "group" }, h("th", { colspan: "5", scope: "rowgroup" }, `${group.title} `, h("span", { class: "source" }, String(group.rows.length)))),
    group.rows.map((row) => lawLine(data, row))));
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Laws on ${model}` },
    h("table", { class: "laws" }, h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))), bodies));
}

function costOf(cost) {
  if (!cost) return null;
  const read = cost.read === null ? "" : `, ${(cost.read / 1e9).toFixed(2)} GB read from storage`;
  const parts = cost.parts.map(([part, seconds]) => h("li", {}, `${part} `, h("span", { class: "value" }, `${seconds.toFixed(2)} s`)));
  return h("details", { class: "cost" },
    h("summary", {}, `measured in ${Number(cost.seconds.toPrecision(3))} s, at most ${(cost.peak / 1e9).toFixed(2)} GB of memory of its own${read}`),
    h("ul", {}, parts));
}

function answersOf(data, rows) {
  const found = data.constants.answers.map((law) => rows.find((row) => data.text("law", row) === law)).filter((row) => row !== undefined);
  if (!found.some((row) => data.columns.value[row] !== null)) return null;
  const item = (row) => {
    const [value, layers] = [data.columns.value[row], data.columns.layers[row]];
    if (value === null) return h("li", {}, h("b", {}, "–"), ` ${data.text("law", row)}: ${data.text("reason", row)}`);
    const window = layers ? `, layers ${layers[0]} to ${layers[1]}` : "";
    return h("li", {}, h("b", {}, number(value)), ` ${data.text("what", row)}${window} (${data.text("of", row)})`);
  };
  return [h("h3", {}, "Is the growth in the weights?"), h("ul", { class: "answers" }, found.map(item))];
}

function captionOf(data, figure, rows) {
  const own = figure.laws.map((law) => rows.find((row) => data.text("law", row) === law)).filter((row) => row !== undefined);
  const chips = own.map((row) => {
    const [outcome, value] = [data.text("outcome", row), data.columns.value[row]];
    const title = `${data.text("claim", row)} ${data.text("reason", row) ?? ""}`;
    return h("span", { class: outcome, title }, `${data.constants.signs[outcome]} ${data.text("law", row)}${value === null ? "" : ` ${number(value)}`} `);
  });
  return h("figcaption", {}, figure.read, h("span", { class: "verdicts" }, chips));
}

function figureOf(data, figure, rows) {
  const chart = h("div", { class: "chart", role: "img", "aria-label": figure.layout.title.text });
  chart.figure = figure;
  const save = (word, made) => h("button", { type: "button", onclick: () => made(chart) }, word);
  return h("figure", {}, chart, captionOf(data, figure, rows), h("p", { class: "saves" }, save("SVG", saveSvg), " ", save("CSV", saveCsv)));
}

function modelSection(data, model, all, shown, figuresOf) {
  const charts = h("div", { class: "figures", tabindex: "-1" });
  const curves = h("button", { type: "button", onclick: () => { charts.scrollIntoView(); charts.focus({ preventScroll: true }); } }, "Its curves ↓");
  figuresOf(model.name).then((figures) => {
    if (figures === null) {
      charts.replaceChildren(h("p", {}, "A page of so many models holds no charts of this one; make a page of its own with python -m streamgauge report."));
      return;
    }
    charts.replaceChildren(...(figures.length ? figures.map((figure) => figureOf(data, figure, all)) : [h("p", {}, "No record, so nothing to draw.")]));
    watchCharts(charts);
  });
  return h("section", { class: "model" }, h("h2", {}, h("a", { href: address({ model: model.name }) }, model.name)),
    h("p", { class: "facts" }, model.facts, " ", curves), costOf(model.cost), answersOf(data, all) ?? [], lawTable(data, model.name, shown), charts);
}
