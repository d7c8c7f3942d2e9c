"use strict";
// Models and laws: a table of which only what is in sight is drawn.

const ROW = 28; // pixels that a row is high
const BESIDE = 10; // rows that are drawn beyond what is in sight

class Matrix {
  constructor(data, show) {
    this.data = data;
    this.few = data.models.length <= data.constants.few;
    this.show = show;
    this.sort = { by: null, down: true };
    this.laws = [...new Set(data.columns.law)].map((n) => data.texts[n]).sort();
    this.names = data.models.map((model) => model.name);
    this.cells = this.placed();
    this.box = h("div", { class: "scroll matrix-box", tabindex: "0", role: "region", "aria-label": "Models and laws" });
    this.box.addEventListener("scroll", () => requestAnimationFrame(() => this.draw()));
  }

  // The row of each model and law, by their places.
  placed() {
    const { columns, texts, count } = this.data;
    const model = new Map(this.names.map((name, n) => [name, n]));
    const law = new Map(this.laws.map((name, n) => [name, n]));
    const cells = new Int32Array(this.names.length * this.laws.length).fill(-1);
    for (let row = 0; row < count; row++) {
      cells[model.get(texts[columns.model[row]]) * this.laws.length + law.get(texts[columns.law[row]])] = row;
    }
    return cells;
  }

  cell(model, law) {
    return this.cells[model * this.laws.length + law];
  }

  // Which rows of the table, and which columns, hold something that is shown.
  update(shown) {
    this.shown = shown;
    const models = this.names.map((_, n) => n).filter((n) => this.laws.some((_, l) => this.has(n, l)));
    const laws = this.laws.map((_, l) => l).filter((l) => models.some((n) => this.has(n, l)));
    [this.across, this.down] = this.few ? [models, laws] : [laws, models];
    this.ordered();
    const [top, left] = [this.box.scrollTop, this.box.scrollLeft];
    const focused = document.activeElement?.closest?.(".matrix thead button")?.title;
    this.box.replaceChildren(this.frame());
    this.body = this.box.querySelector("tbody");
    this.draw(top);
    this.box.scrollTo(left, top);
    if (focused) [...this.box.querySelectorAll("thead button")].find((button) => button.title === focused)?.focus();
  }

  has(model, law) {
    const row = this.cell(model, law);
    return row >= 0 && this.shown[row] === 1;
  }

  at(line, column) {
    const row = this.few ? this.cell(column, line) : this.cell(line, column);
    return row >= 0 && this.shown[row] === 1 ? row : -1;
  }

  ordered() {
    if (this.sort.by === null) return;
    const { columns } = this.data;
    const by = (line) => {
      if (this.sort.by === "name") return (this.few ? this.laws : this.names)[line];
      const row = this.at(line, this.sort.by);
      return row < 0 || columns.value[row] === null ? -Infinity : columns.value[row];
    };
    const sign = this.sort.down ? -1 : 1;
    this.down = this.down.map((line) => [by(line), line]).sort(([a], [b]) => (a < b ? -sign : a > b ? sign : 0)).map(([, line]) => line);
  }

  frame() {
    const [lines, columns] = this.few ? ["law", this.names] : ["model", this.laws];
    const head = (by, label) => {
      const sorted = this.sort.by === by ? (this.sort.down ? "descending" : "ascending") : "none";
      const turn = () => {
        this.sort = { by, down: this.sort.by === by ? !this.sort.down : true };
        this.box.scrollTop = 0;
        this.update(this.shown);
      };
      const title = `${label}: sort by its values`;
      return h("th", { scope: "col", "aria-sort": sorted }, h("button", { type: "button", title, onclick: turn }, h("span", {}, label)));
    };
    const top = h("tr", {}, head("name", lines), this.across.map((column) => head(column, columns[column])));
    const kind = this.few ? "matrix upright" : "matrix";
    return h("table", { class: kind, "aria-rowcount": String(this.down.length + 1) }, h("thead", {}, top), h("tbody"));
  }

  draw(top = this.box.scrollTop) {
    const whole = this.few || this.printed;
    const first = whole ? 0 : Math.max(0, Math.min(Math.floor(top / ROW), this.down.length) - BESIDE);
    const last = whole ? this.down.length : Math.min(this.down.length, first + Math.ceil(innerHeight / ROW) + 2 * BESIDE);
    const room = (lines) => h("tr", { class: "room", "aria-hidden": "true" }, h("td", { style: `height:${lines * ROW}px` }));
    const lines = this.down.slice(first, last).map((line, n) => this.line(line, first + n));
    const drawn = document.activeElement?.getAttribute("href");
    this.body.replaceChildren(...(first ? [room(first)] : []), ...lines, ...(last < this.down.length ? [room(this.down.length - last)] : []));
    if (drawn && document.activeElement === document.body) this.body.querySelector(`a[href="${CSS.escape(drawn)}"]`)?.focus({ preventScroll: true });
  }

  line(line, place) {
    const name = (this.few ? this.laws : this.names)[line];
    const href = address(this.few ? { law: name } : { model: name });
    const label = h("th", { scope: "row" }, h("a", { href, title: name }, name));
    return h("tr", { "aria-rowindex": String(place + 2) }, label, this.across.map((column) => this.drawn(line, column)));
  }

  drawn(line, column) {
    const row = this.at(line, column);
    if (row < 0) return h("td");
    const { data } = this;
    const outcome = data.text("outcome", row);
    const value = data.columns.value[row];
    const [model, law] = [data.text("model", row), data.text("law", row)];
    const says = data.text("reason", row) ?? `${data.text("what", row) ?? ""} ${number(value)} ${data.text("unit", row) ?? ""}`.trim();
    const sign = data.constants.signs[outcome];
    const with_value = this.few && value !== null;
    const shown = with_value ? [outcome === "not_applicable" ? "" : `${sign} `, h("span", { class: "value" }, number(value))] : [sign];
    const label = `${law} on ${model}: ${data.constants.words[outcome]}. ${says}`;
    return h("td", { class: outcome }, h("a", { href: address({ model, law }), title: says, "aria-label": label }, shown));
  }
}
