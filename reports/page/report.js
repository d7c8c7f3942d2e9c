"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const filters = [...document.querySelectorAll("[data-filter]")];
const dark = matchMedia("(prefers-color-scheme: dark)");

function colours() {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim();
  const rule = style.getPropertyValue("--rule").trim();
  return { ink, rule };
}

function draw(chart) {
  const figure = figures[chart.dataset.model][Number(chart.dataset.figure)];
  const { ink, rule } = colours();
  const axis = { gridcolor: rule, zeroline: false, linecolor: rule };
  const layout = {
    ...figure.layout,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: ink, family: "system-ui, sans-serif", size: 12 },
    margin: { l: 60, r: 15, t: 40, b: 80 },
    legend: { orientation: "h", y: -0.22 },
    hovermode: "closest",
    xaxis: { ...axis, ...figure.layout.xaxis },
    yaxis: { ...axis, ...figure.layout.yaxis },
  };
  Plotly.react(chart, figure.data, layout, { displaylogo: false, responsive: true, displayModeBar: false });
}

function matches(element, wanted) {
  return Object.entries(wanted).every(([name, value]) => !value || element.dataset[name] === value);
}

function filter() {
  const wanted = Object.fromEntries(filters.map((select) => [select.dataset.filter, select.value]));
  for (const row of document.querySelectorAll("tr[data-row], article[data-row], li[data-row]")) row.hidden = !matches(row, wanted);
  for (const cell of document.querySelectorAll("td[data-row]")) cell.classList.toggle("faded", !matches(cell, wanted));
  for (const line of document.querySelectorAll(".matrix tr[data-model], section.model")) {
    line.hidden = Boolean(wanted.model) && line.dataset.model !== wanted.model;
  }
  for (const line of document.querySelectorAll(".upright tr[data-law]")) {
    line.hidden = Boolean(wanted.law) && line.dataset.law !== wanted.law;
  }
  for (const group of document.querySelectorAll(".laws tbody")) {
    group.hidden = !group.querySelector("tr[data-row]:not([hidden])");
  }
  for (const section of document.querySelectorAll("section.model")) {
    section.hidden = section.hidden || !section.querySelector("tr[data-row]:not([hidden])");
  }
  const rows = [...document.querySelectorAll("tr[data-row]")];
  document.querySelector(".shown").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} verdicts`;
}

const visible = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) {
      visible.unobserve(entry.target);
      draw(entry.target);
    }
  }
}, { rootMargin: "400px" });

for (const chart of document.querySelectorAll(".chart")) visible.observe(chart);
for (const select of filters) select.addEventListener("change", filter);
dark.addEventListener("change", () => document.querySelectorAll(".chart.js-plotly-plot").forEach(draw));
filter();
