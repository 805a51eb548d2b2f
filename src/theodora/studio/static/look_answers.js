// Before and after: what the base answers to held-out rows, and what the adapter does; sorted by what changed most.
import { get, post } from "./api.js";
import { copied, el, figure, place, put, say } from "./dom.js";
import { field, KnownRuns, problems, typed } from "./look_parts.js";

const EVERY = 1200, SHOWN = 100;
const WORDS = { running: "at work", finished: "finished", stopped: "stopped", failed: "failed" };
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
    Object.assign(this, { home: about.home, known: new KnownRuns("answers-runs", about), comparisons: [], order: "moved", kind: "all", shown: SHOWN, visible: false });
    this.model = typed("answers-model", { placeholder: "runs/first", list: "answers-runs" });
    this.data = typed("answers-data", { placeholder: "the rows that the run held out" });
    this.base = typed("answers-base", { placeholder: "the adapter switched off" });
    this.limit = typed("answers-limit", { value: "200", inputmode: "numeric" });
    this.tokens = typed("answers-tokens", { value: "64", inputmode: "numeric" });
    this.losses = el("input", { type: "checkbox", id: "answers-losses" });
    this.button = el("button", { class: "main", type: "submit" }, "Compare");
    this.wrong = el("div", { class: "note bad", role: "alert", hidden: true });
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
      this.wrong, this.known.element);
    this.earlier = el("div", { class: "row look-earlier", role: "group", "aria-label": "Comparisons" });
    this.result = el("div", { class: "look-result" });
    put(root, el("p", { class: "quiet look-told" }, "What the model answered before, and what it answers now, row by row, with the same prompts. A comparison goes on when this page is closed."), form, this.earlier, this.result);
    setInterval(() => { if (this.visible && !document.hidden && (this.busy || this.waiting)) this.look(); }, EVERY);
  }

  show(id) {
    this.visible = true;
    if (id) this.open = id;
    this.known.look().catch(() => {});
    this.look();
  }

  hide() { this.visible = false; }

  fill({ model, data }) {
    this.model.value = model ?? "";
    this.data.value = data ?? "";
    this.base.value = "";
  }

  get busy() { return this.comparisons.some(({ state }) => state === "running"); }

  async start() {
    this.wrong.hidden = true;
    problems(this.boxes, {});
    this.button.disabled = true;
    try {
      const { id } = await post("/api/look/answers", {
        model: this.model.value, data: this.data.value, base: this.base.value,
        limit: this.limit.value, max_new_tokens: this.tokens.value, answers: !this.losses.checked,
      });
      location.hash = `look/answers/${id}`;
      this.open = id;
      await this.look();
    } catch (error) {
      if (error.answer?.problems) problems(this.boxes, error.answer.problems);
      else this.failed(error.message);
    } finally {
      this.button.disabled = this.busy;
    }
  }

  failed(text) {
    say(this.wrong, text);
    this.wrong.hidden = false;
  }

  async look() {
    if (this.looking) return;
    this.looking = true;
    try {
      this.comparisons = (await get("/api/look/answers")).comparisons;
      this.button.disabled = this.busy;
      if (!this.comparisons.some(({ id }) => id === this.open)) this.open = this.comparisons[0]?.id;
      put(this.earlier, ...(this.comparisons.length > 1 || !this.open ? this.comparisons.slice(0, 12).map((each) => this.chip(each)) : []));
      const chosen = this.comparisons.find(({ id }) => id === this.open);
      if (!chosen) return put(this.result);
      const stamp = `${chosen.id} ${chosen.state}`;
      this.waiting = false;
      if (chosen.state === "running") this.atWork(chosen, stamp !== this.stamp);
      else if (stamp !== this.stamp) this.tell(await get(`/api/look/answers/${chosen.id}`));
      this.stamp = stamp;
    } catch {
      this.waiting = true; // the banner says it
    } finally {
      this.looking = false;
    }
  }

  chip(each) {
    const name = each.model.split("/").at(-1);
    const button = el("button", { type: "button", class: "chip", "aria-pressed": String(each.id === this.open), title: `${each.model}, ${each.data}`, onclick: () => { location.hash = `look/answers/${each.id}`; } },
      `${name} · ${new Date(each.at * 1000).toLocaleString([], { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" })}`);
    if (each.state !== "finished") button.append(el("span", { class: `badge ${each.state === "failed" ? "bad" : each.state === "running" ? "training" : ""}` }, WORDS[each.state] ?? each.state));
    return button;
  }

  atWork({ id, model, progress, command }, anew) {
    if (anew) {
      this.bar = el("progress", { max: 1 });
      this.doing = el("span", { class: "quiet" });
      put(this.result, el("div", { class: "card stack" },
        el("div", { class: "row spread" }, el("h2", {}, place(model, this.home)), el("button", { type: "button", class: "danger", onclick: () => this.act(id, "stop") }, "Stop")),
        this.bar, el("div", { role: "status" }, el("span", { class: "spin" }), this.doing), el("pre", {}, command)));
    }
    this.bar.value = progress.share;
    say(this.doing, `${PASSES[progress.what] ?? progress.what}${progress.share ? ` · ${Math.round(100 * progress.share)} %` : ""}`);
  }

  async act(id, what) {
    try {
      await post(`/api/look/answers/${id}/${what}`);
    } catch (error) {
      this.failed(error.message);
    }
    this.stamp = null;
    await this.look();
  }

  tell({ state, rows, log }) {
    const { command } = state;
    this.rows = rows.filter((row) => row.base);
    this.shown = SHOWN;
    const again = el("button", { type: "button", class: "plain", onclick: () => this.act(state.id, "forget") }, "Delete");
    const head = el("div", { class: "row spread" },
      el("div", {}, el("div", { class: "row" }, el("h2", {}, place(state.model, this.home)), state.state === "finished" ? null : el("span", { class: `badge ${state.state}` }, WORDS[state.state])),
        el("div", { class: "quiet mono" }, place(state.data, this.home))), again);
    const shell = el("pre", {}, command);
    const more = [el("details", {}, el("summary", {}, "In a terminal"), el("div", { class: "copy" }, shell, copied(() => command))),
      log && el("details", {}, el("summary", {}, "Log"), el("pre", { class: "log", tabindex: "0" }, log))];
    if (state.state !== "finished") {
      const told = state.state === "failed" ? el("div", { class: "note bad", role: "alert" }, lastWords(log) || "It ended without a word.") : null;
      return put(this.result, el("div", { class: "card stack" }, head, told, ...more.filter(Boolean)));
    }
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
    put(this.result, el("div", { class: "card stack" }, head, el("div", { class: "figures" }, ...this.facts()), ...more.filter(Boolean)),
      el("div", { class: "row spread look-bar" }, this.kinds, el("div", { class: "row" }, el("label", { for: "answers-order", class: "quiet small" }, "Sorted by"), this.orders)),
      el("div", { class: "card look-table" }, el("table", { class: this.answered ? "pairs" : "pairs short" }, el("thead", {}, this.headRow), this.body)), el("div", { class: "row look-more" }, this.more));
    this.draw();
  }

  facts() {
    const mean = (of) => {
      const counted = this.rows.filter((row) => row.tokens);
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

function lastWords(log) {
  const lines = log.trimEnd().split("\n");
  const start = lines.findLastIndex((line) => /^((base|model): .* \d+\/\d+|\s*)$/.test(line));
  return lines.slice(start + 1).slice(-12).join("\n");
}
