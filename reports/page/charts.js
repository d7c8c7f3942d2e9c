"use strict";
// Charts are drawn when they come into sight, and saved as they are or as numbers.

const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down"];
const dark = matchMedia("(prefers-color-scheme: dark)");

// Decades and what lies between them.
const LOGARITHMIC = { dtick: "D2", exponentformat: "power", minor: { dtick: "D1", showgrid: true } };

function layoutOf(figure) {
  const style = getComputedStyle(document.documentElement);
  const [ink, rule] = ["--ink", "--rule"].map((name) => style.getPropertyValue(name).trim());
  const axis = (own) => ({ gridcolor: rule, zeroline: false, linecolor: rule, ...(own?.type === "log" ? LOGARITHMIC : {}), ...own });
  return {
    ...figure.layout,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: ink, family: "system-ui, sans-serif", size: 12 },
    margin: { l: 60, r: 15, t: 40, b: 80 },
    legend: { orientation: "h", y: -0.22 },
    hovermode: "closest",
    xaxis: axis(figure.layout.xaxis),
    yaxis: axis(figure.layout.yaxis),
  };
}

// Lines are told apart by their marks as well as by their colours.
const marked = (traces) => traces.map((trace, n) => {
  const has = trace.mode?.includes("markers") && !trace.marker?.symbol;
  return has ? { ...trace, marker: { ...trace.marker, symbol: SYMBOLS[n % SYMBOLS.length] } } : trace;
});

async function draw(chart) {
  await loadPlotly();
  await Plotly.react(chart, marked(chart.figure.data), layoutOf(chart.figure), { displaylogo: false, responsive: true, displayModeBar: false });
}

const inSight = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((one) => one.isIntersecting)) {
    inSight.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "400px" });

function watchCharts(inside) {
  for (const chart of inside.querySelectorAll(".chart")) inSight.observe(chart);
}

const drawAll = () => Promise.all([...document.querySelectorAll(".chart")].map(draw));
dark.addEventListener("change", () => document.querySelectorAll(".chart.js-plotly-plot").forEach(draw));

function save(name, content, type) {
  const link = h("a", { href: URL.createObjectURL(new Blob([content], { type })), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}

const fileName = (chart, ending) => `${chart.figure.layout.title.text.toLowerCase().replace(/[^a-z0-9]+/g, "-")}.${ending}`;

async function saveSvg(chart) {
  await draw(chart);
  const address = await Plotly.toImage(chart, { format: "svg", width: 900, height: 560 });
  save(fileName(chart, "svg"), decodeURIComponent(address.slice(address.indexOf(",") + 1)), "image/svg+xml");
}

// One line a point: the series, where it is, and its value.
function saveCsv(chart) {
  const quoted = (value) => `"${String(value ?? "").replaceAll('"', '""')}"`;
  const lines = chart.figure.data.flatMap((trace) => (trace.x ?? []).map((x, n) => [quoted(trace.name), quoted(x), trace.y?.[n] ?? ""].join(",")));
  const heads = ["series", figureTitle(chart, "xaxis"), figureTitle(chart, "yaxis")].map(quoted).join(",");
  save(fileName(chart, "csv"), [heads, ...lines].join("\n") + "\n", "text/csv");
}

const figureTitle = (chart, axis) => chart.figure.layout[axis]?.title?.text ?? axis;
