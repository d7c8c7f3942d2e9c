"use strict";
// What the page carries, deflated and in base64: see reports/packed.py.

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let n = 0; n < text.length; n++) bytes[n] = text.charCodeAt(n);
  return bytes;
}

async function inflated(base64) {
  const stream = new Blob([bytesOf(base64)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).text();
}

const carried = (id) => document.getElementById(id).textContent.trim();

// A row is its number; columns say what it holds.
async function readRows() {
  const { texts, columns, models, counts, across, constants } = JSON.parse(await inflated(carried("rows")));
  const text = (name, row) => (columns[name][row] < 0 ? null : texts[columns[name][row]]);
  const count = columns.model.length;
  return { texts, columns, models, counts, across, constants, text, count };
}

async function readFigures() {
  const { frames, models } = JSON.parse(await inflated(carried("figures")));
  const parsed = frames.map((frame) => JSON.parse(frame));
  return async (model) => {
    if (models[model] === null) return null;
    const [numbers, series] = models[model];
    const given = JSON.parse(await inflated(series))[Symbol.iterator]();
    return numbers.map((number) => filled(parsed[number], given));
  };
}

// A frame with its lists of numbers put in again, in the order in which they were taken out.
function filled(value, series) {
  if (Array.isArray(value)) return value.map((one) => filled(one, series));
  if (value === null || typeof value !== "object") return value;
  if ("$" in value) return series.next().value;
  return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, filled(one, series)]));
}

let plotly = null;
// The charting library is unpacked when the first chart is looked at.
function loadPlotly() {
  plotly ??= inflated(carried("plotly")).then((source) => {
    const script = document.createElement("script");
    script.textContent = source;
    document.head.append(script);
  });
  return plotly;
}

// An element with its attributes and children; text is never read as HTML.
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") element.addEventListener("click", value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== ""));
  return element;
}

const number = (value) => (value === null ? "" : String(Number(value.toPrecision(4))));
