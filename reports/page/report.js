"use strict";
// The filter, which lives in the address, and what it leaves.

const FIELDS = ["q", "model", "law", "kind", "outcome"];

const address = (wanted) => `#${new URLSearchParams(Object.entries(wanted).filter(([, value]) => value))}`;
const wantedNow = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));

function choice(name, values, words = {}) {
  const options = values.map((value) => h("option", { value }, words[value] ?? value));
  return h("label", {}, name, h("select", { "data-filter": name }, h("option", { value: "" }, "all"), options));
}

function filters(data) {
  const of = (name) => [...new Set(data.columns[name])].map((n) => data.texts[n]).sort();
  const outcomes = Object.keys(data.counts).filter((name) => data.counts[name]);
  const words = { ...data.constants.words, changed: "changed since the last run" };
  if (data.columns.changed.some(Boolean)) outcomes.push("changed");
  const search = h("label", {}, "search", h("input", { type: "search", "data-filter": "q", placeholder: "model or law" }));
  const form = h("form", { class: "filters", role: "search", "aria-label": "Filter" }, search,
    choice("model", data.models.map((model) => model.name)), choice("law", of("law")), choice("kind", of("kind")),
    choice("outcome", outcomes, words), h("span", { class: "shown", role: "status" }));
  form.addEventListener("submit", (event) => event.preventDefault());
  return form;
}

// 1 for each row that is wanted.
function fitting(data, wanted) {
  const { columns, texts, count } = data;
  const asked = ["model", "law", "kind", "outcome"].filter((name) => wanted[name] && wanted[name] !== "changed").map((name) => [columns[name], texts.indexOf(wanted[name])]);
  const text = wanted.q?.toLowerCase();
  const known = new Map();
  const says = (n) => {
    if (!known.has(n)) known.set(n, texts[n].toLowerCase().includes(text));
    return known.get(n);
  };
  const shown = new Uint8Array(count);
  for (let row = 0; row < count; row++) {
    const fits = asked.every(([column, n]) => column[row] === n) && (wanted.outcome !== "changed" || columns.changed[row]);
    shown[row] = fits && (!text || says(columns.model[row]) || says(columns.law[row])) ? 1 : 0;
  }
  return shown;
}

function rowsByModel(data) {
  const found = new Map(data.models.map((model) => [model.name, []]));
  for (let row = 0; row < data.count; row++) found.get(data.text("model", row)).push(row);
  return found;
}

async function start() {
  const data = await readRows();
  const figuresOf = await readFigures();
  const rows = rowsByModel(data);
  const matrix = data.models.length > 1 ? new Matrix(data) : null;
  const form = filters(data);
  document.querySelector("header").after(form);
  const place = document.getElementById("found");
  const across = document.getElementById("across");

  function sections(wanted, shown) {
    const chosen = data.models.filter((model) => (wanted.model ? model.name === wanted.model : data.models.length <= data.constants.few));
    const made = chosen.map((model) => [model, rows.get(model.name).filter((row) => shown[row])]).filter(([, own]) => own.length);
    if (!wanted.model && data.models.length > data.constants.few) return [h("p", { class: "claim" }, "Choose a model, or a cell of the table, for its laws and charts.")];
    return made.map(([model, own]) => modelSection(data, model, rows.get(model.name), own, figuresOf));
  }

  function show() {
    const wanted = wantedNow();
    for (const field of form.querySelectorAll("[data-filter]")) {
      if (document.activeElement !== field || field.tagName === "SELECT") field.value = wanted[field.dataset.filter] ?? "";
    }
    const shown = fitting(data, wanted);
    const some = [];
    for (let row = 0; row < data.count; row++) if (shown[row]) some.push(row);
    form.querySelector(".shown").textContent = `${some.length.toLocaleString("en")} of ${data.count.toLocaleString("en")} verdicts`;
    const nothing = some.length ? null : h("p", { class: "nothing" }, "Nothing fits this filter. ", h("a", { href: "#" }, "Show everything"));
    place.replaceChildren(...[nothing, troubles(data, some), unusual(data, some), matrix && tableSection(matrix, data)].filter(Boolean));
    matrix?.update(shown);
    document.querySelectorAll("#models .js-plotly-plot").forEach((chart) => Plotly.purge(chart));
    document.getElementById("models").replaceChildren(...sections(wanted, shown));
  }

  form.addEventListener("input", () => {
    const wanted = Object.fromEntries(FIELDS.map((name) => [name, form.querySelector(`[data-filter=${name}]`).value]));
    history.replaceState(null, "", address(wanted));
    show();
  });
  addEventListener("hashchange", () => {
    show();
    if (wantedNow().model) document.getElementById("models").scrollIntoView();
  });
  for (const event of ["beforeprint", "afterprint"]) {
    addEventListener(event, () => {
      if (matrix) {
        matrix.printed = event === "beforeprint";
        matrix.draw();
      }
      if (event === "beforeprint") drawAll();
    });
  }
  addEventListener("resize", () => matrix?.draw());
  if (data.across.length) {
    across.append(h("h2", {}, "Across models"), h("div", { class: "figures" }, data.across.map((figure) => figureOf(data, figure, []))));
    watchCharts(across);
  }
  show();
  document.documentElement.dataset.ready = "";
}

function tableSection(matrix, data) {
  const key = Object.entries(data.constants.signs).map(([outcome, sign]) => h("span", { class: outcome }, `${sign} ${data.constants.words[outcome]} `));
  return h("section", {}, h("h2", { id: "table" }, "Models and laws"), matrix.box, h("p", { class: "key" }, key));
}

start().catch((error) => {
  document.getElementById("found").replaceChildren(h("p", { class: "nothing" }, `This page could not draw itself (${error.message}); summary.md beside it says what failed.`));
});
