// Before and after: what the base answers to held-out rows, and what the adapter does; sorted by what changed most.
import { el, figure, place, put } from "./dom.js";
import { field, KnownRuns, typed } from "./look_parts.js";
import { WorksView } from "./look_works.js";

const SHOWN = 100;
const PASSES = { loading: "Loading …", loss: "Losses", answers: "Answers" };
const loss = ({ loss }) => loss ?? NaN;
const moved = (row) => loss(row) - loss(row.base);
const last = (number) => (Number.isNaN(number) ? -Infinity : number);
// Name -> label, and by what rows are sorted, the largest first.
const ORDERS = {
  moved: ["What changed most", (row) => last(Math.abs(moved(row)))],
  better: ["What became likelier", (row) => last(-moved(row))],
  worse: ["What became less likely", (row) => last(moved(row))],
  before: ["Loss before", (row) => last(loss(row.base))],
  after: ["Loss after", (row) => last(loss(row))],
  row: ["As in the file", (row) => -row.row],
};
const KINDS = {
  all: ["All", () => true],
  gained: ["Now right", (row) => row.right && !row.base.right],
  lost: ["Now wrong", (row) => !row.right && row.base.right],
  wrong: ["Wrong after", (row) => row.right === false],
  changed: ["Another answer", (row) => row.answer !== row.base.answer],
};

export class AnswersTab {
  constructor(root, { about }) {
    Object.assign(this, { home: about.home, known: new KnownRuns("answers-runs", about), order: "moved", kind: "all", shown: SHOWN });
    this.model = typed("answers-model", { placeholder: "runs/first", list: "answers-runs" });
    this.data = typed("answers-data", { placeholder: "the rows that the run held out" });
    this.base = typed("answers-base", { placeholder: "the adapter switched off" });
    this.limit = typed("answers-limit", { value: "200", inputmode: "numeric" });
    this.tokens = typed("answers-tokens", { value: "64", inputmode: "numeric" });
    this.losses = el("input", { type: "checkbox", id: "answers-losses" });
    this.button = el("button", { class: "main", type: "submit" }, "Compare");
    this.boxes = {
      model: field("A run, an adapter, or a merged model", this.model, { kind: "half" }),
      data: field("Rows", this.data, { kind: "half", help: "A file, a folder, or a data set's name on the hub. Empty: what the run held out." }),
      base: field("Before", this.base, { kind: "half", help: "The model to compare with. A merged model needs it; an adapter can be switched off." }),
      limit: field("Rows at most", this.limit, { help: "The first ones." }),
      max_new_tokens: field("Longest answer", this.tokens, { help: "tokens" }),
    };
    this.known.element.hidden = true;
    const form = el("form", { class: "card stack", onsubmit: (event) => { event.preventDefault(); this.start(); } },
      el("div", { class: "fields look-form" }, ...Object.values(this.boxes)),
      el("div", { class: "row" }, this.button, el("label", { class: "check", for: "answers-losses" }, this.losses, "losses alone, which is quicker")),
      this.known.element);
    this.works = new WorksView("answers", "answers", {
      boxes: this.boxes, button: this.button, alone: true,
      name: ({ model, at }) => `${model.split("/").at(-1)} · ${new Date(at * 1000).toLocaleString([], { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" })}`,
      told: ({ model, data }) => `${model}, ${data}`,
      title: ({ model }) => place(model, this.home),
      under: ({ data }) => el("div", { class: "quiet mono" }, place(data, this.home)),
      forget: "Delete",
      progress: ({ progress: { what, share } }) => ({ doing: `${PASSES[what] ?? what}${share ? ` · ${Math.round(100 * share)} %` : ""}`, share }),
      tell: (...found) => this.tell(...found),
    });
    put(root, el("p", { class: "quiet look-told" }, "What the model answered before, and what it answers now, row by row, with the same prompts. A comparison goes on when this page is closed."), form, this.works.element);
  }

  show(id) {
    this.known.look().catch(() => {});
    this.works.show(id);
  }

  hide() { this.works.hide(); }

  fill({ model, data }) {
    this.model.value = model ?? "";
    this.data.value = data ?? "";
    this.base.value = "";
  }

  start() {
    this.works.start({
      model: this.model.value, data: this.data.value, base: this.base.value,
      limit: this.limit.value, max_new_tokens: this.tokens.value, answers: !this.losses.checked,
    });
  }

  tell({ rows }, head, words) {
    this.rows = rows.filter((row) => row.base);
    this.shown = SHOWN;
    this.body = el("tbody", {});
    this.answered = this.rows.some((row) => row.answer !== null);
    this.hasExpected = this.rows.some((row) => row.expected !== null);
    this.orders = el("select", { id: "answers-order", "aria-label": "Order", onchange: () => { this.order = this.orders.value; this.draw(); } },
      ...Object.entries(ORDERS).map(([name, [label]]) => el("option", { value: name, selected: name === this.order }, label)));
    const kinds = Object.entries(KINDS).filter(([name]) => name === "all" || this.answered).map(([name, [label, of]]) => {
      const button = el("button", { type: "button", class: "chip", "data-kind": name, onclick: () => { this.kind = name; this.shown = SHOWN; this.draw(); } }, `${label} `, el("b", {}, figure(this.rows.filter(of).length)));
      return button;
    });
    if (!this.answered) this.kind = "all";
    this.kinds = el("div", { class: "row look-kinds", role: "group", "aria-label": "Which rows" }, ...kinds);
    this.more = el("button", { type: "button", onclick: () => { this.shown += SHOWN; this.draw(); } }, "Show more");
    this.heads = this.answered ? [["row", "#"], [null, "Prompt"], [null, "Expected"], [null, "Before"], [null, "After"], ["before", "Loss before"], ["after", "after"], ["moved", "change"]]
      : [["row", "#"], [null, "Prompt"], [null, "Expected"], ["before", "Loss before"], ["after", "after"], ["moved", "change"]];
    if (!this.hasExpected) this.heads = this.heads.filter(([, label]) => label !== "Expected");
    this.headRow = el("tr", {}, ...this.heads.map(([order, label]) => el("th", { scope: "col", class: order ? "number" : undefined, "data-order": order },
      order ? el("button", { type: "button", class: "sort", onclick: () => { this.order = this.orders.value = order; this.draw(); } }, label) : label)));
    this.draw();
    return [el("div", { class: "card stack" }, head, el("div", { class: "figures" }, ...this.facts()), ...words),
      el("div", { class: "row spread look-bar" }, this.kinds, el("div", { class: "row" }, el("label", { for: "answers-order", class: "quiet small" }, "Sorted by"), this.orders)),
      el("div", { class: "card look-table" }, el("table", { class: this.answered ? "pairs" : "pairs short" }, el("thead", {}, this.headRow), this.body)), el("div", { class: "row look-more" }, this.more)];
  }

  facts() {
    const mean = (of) => {
      const counted = this.rows.filter((row) => row.tokens && !Number.isNaN(moved(row)));
      return counted.reduce((sum, row) => sum + of(row) * row.tokens, 0) / counted.reduce((sum, row) => sum + row.tokens, 0);
    };
    const right = (of) => this.rows.filter(of).length;
    const facts = [[figure(this.rows.length), "rows"], [change(figure(mean((row) => row.base.loss)), figure(mean((row) => row.loss))), "loss per token"]];
    if (this.answered && this.hasExpected) facts.push([change(figure(right((row) => row.base.right)), figure(right((row) => row.right))), "answered exactly"]);
    return facts.map(([value, told]) => el("div", { class: "figure" }, el("b", {}, value), el("span", {}, told)));
  }

  draw() {
    const [, size] = ORDERS[this.order];
    const rows = this.rows.filter(KINDS[this.kind][1]).sort((a, b) => size(b) - size(a) || a.row - b.row);
    for (const button of this.kinds.children) button.setAttribute("aria-pressed", String(button.dataset.kind === this.kind));
    for (const head of this.headRow.children) {
      if (head.dataset.order === this.order) head.setAttribute("aria-sort", this.order === "row" ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    }
    put(this.body, ...(rows.length ? rows.slice(0, this.shown).map((row) => this.line(row)) : [el("tr", {}, el("td", { colSpan: this.heads.length, class: "quiet" }, "No row is of that kind."))]));
    this.more.hidden = rows.length <= this.shown;
  }

  line(row) {
    const open = el("button", { type: "button", class: "sort", "aria-expanded": "false", "aria-label": `Row ${row.row}, whole`, onclick: () => toggle() }, figure(row.row));
    const by = moved(row);
    const cells = [el("td", { class: "number" }, open), el("td", { "data-label": "Prompt" }, el("div", { class: "clip" }, ...prompt(row.prompt)))];
    if (this.hasExpected) cells.push(el("td", { "data-label": "Expected" }, el("div", { class: "clip" }, row.expected ?? "")));
    if (this.answered) cells.push(answer(row.base, "Before"), answer(row, "After"));
    cells.push(el("td", { class: "number", "data-label": "Loss before" }, figure(row.base.loss)), el("td", { class: "number", "data-label": "Loss after" }, figure(row.loss)),
      el("td", { class: `number ${by < 0 ? "down" : by > 0 ? "up" : ""}`, "data-label": "Change" }, Number.isNaN(by) ? "–" : `${by > 0 ? "+" : by < 0 ? "−" : ""}${Math.abs(by).toFixed(3)}`));
    const line = el("tr", { onclick: (event) => { if (!event.target.closest("button") && !String(getSelection())) toggle(); } }, ...cells);
    const toggle = () => open.setAttribute("aria-expanded", String(line.classList.toggle("open")));
    return line;
  }
}

const change = (before, after) => (before === after ? before : `${before} → ${after}`);

function answer({ answer: text, right }, label) {
  const badge = right === null ? null : el("span", { class: `badge ${right ? "good" : "bad"}` }, right ? "✓ right" : "✗ wrong");
  return el("td", { "data-label": label }, badge, el("div", { class: "clip" }, text === "" ? el("i", { class: "quiet" }, "nothing") : text ?? "–"));
}

// The last message is what is asked; those before it are seen when the row is opened.
function prompt(given) {
  if (!Array.isArray(given)) return [String(given ?? "")];
  return given.map(({ role, content, ...more }, index) => {
    const text = typeof content === "string" ? content : content === undefined ? JSON.stringify(more) : JSON.stringify(content);
    return el("div", { class: index === given.length - 1 ? "turn" : "turn before" }, given.length > 1 ? el("span", { class: "role" }, `${role} `) : null, text);
  });
}
