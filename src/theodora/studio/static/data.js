// Data: a file, how it is read, and its first rows as the model will see them.
import { post, upload } from "./api.js";
import { bars } from "./chart.js";
import { el, figure, put, quoted } from "./dom.js";

export class DataScreen {
  constructor(root, { about, train }) {
    this.train = train;
    const objective = about.form[0].fields.find(({ name }) => name === "objective");
    this.path = el("input", { id: "data-path", placeholder: "train.jsonl", autocomplete: "off", spellcheck: "false" });
    this.model = el("input", { id: "data-model", placeholder: "HuggingFaceTB/SmolLM2-135M-Instruct", autocomplete: "off", spellcheck: "false" });
    this.heldOut = el("input", { id: "data-eval", placeholder: "a part of the rows", autocomplete: "off", spellcheck: "false" });
    this.objective = el("select", { id: "data-objective" }, ...objective.choices.map((name) => el("option", { value: name }, name)));
    this.length = el("input", { id: "data-length", value: "1024", inputmode: "numeric" });
    this.button = el("button", { class: "main", type: "submit" }, "Look at it");
    this.file = el("input", { type: "file", id: "data-file", hidden: true, accept: ".jsonl,.json,.csv,.tsv,.parquet,.gz" });
    const pick = el("button", { class: "plain", type: "button", onclick: () => this.file.click() }, "choose one");
    this.drop = el("div", { class: "drop" }, "Drop a file here, or ", pick);
    this.result = el("div", { class: "result", "aria-live": "polite" });
    const form = el("form", { class: "card", onsubmit: (event) => { event.preventDefault(); this.look(); } },
      el("div", { class: "fields look" },
        field("A file, a folder, or a data set's name on the hub", this.path, "path", "A .jsonl, .json, .csv or .parquet file; its format is recognised."),
        el("div", { class: "field drops" }, this.drop, this.file),
        field("Model", this.model, "", "Its tokenizer and chat template say what the model will see. Without it rows are shown as text."),
        field("Held-out rows", this.heldOut, "", "A file of their own (eval_data). Empty: those that a run would hold out."),
        field("Objective", this.objective, "", objective.help),
        field("Cut rows after", this.length, "", "tokens: max_length"),
        el("div", { class: "field end" }, this.button)));
    put(root, el("div", { class: "head" }, el("h1", {}, "Data"),
      el("p", {}, "See what the model will see before it learns from it: learned tokens in colour, the others grey, what is cut off struck through.")), form, this.result);
    this.file.addEventListener("change", () => this.file.files[0] && this.keep(this.file.files[0]));
    for (const kind of ["dragover", "dragleave", "drop"])
      root.addEventListener(kind, (event) => {
        event.preventDefault();
        this.drop.classList.toggle("over", kind === "dragover");
        if (kind === "drop" && event.dataTransfer.files[0]) this.keep(event.dataTransfer.files[0]);
      });
    this.drop.title = `Files are kept in ${about.uploads}`;
  }

  show() { post("/api/wake").catch(() => {}); }

  fill({ data, eval_data, model, from_adapter, objective, max_length }) {
    model ||= from_adapter;
    if (data) {
      this.path.value = data;
      this.heldOut.value = eval_data ?? "";
    }
    if (model) this.model.value = model;
    if (objective) this.objective.value = objective;
    if (max_length) this.length.value = max_length;
    if (data) this.look();
  }

  async keep(file) {
    this.waiting(`Taking ${file.name} over …`);
    try {
      this.path.value = (await upload(file)).path;
    } catch (error) {
      return this.failed(error);
    }
    await this.look();
  }

  waiting(text) { put(this.result, el("div", { class: "card quiet" }, el("span", { class: "spin" }), text)); this.spaced(); }

  failed(error) { put(this.result, el("div", { class: "note bad", role: "alert" }, error.message)); this.spaced(); }

  spaced() { this.result.style.marginTop = "1.1rem"; }

  async look() {
    const asked = { path: this.path.value.trim(), model: this.model.value.trim(), objective: this.objective.value, eval_data: this.heldOut.value.trim() };
    const length = Number(this.length.value);
    if (length >= 2) asked.max_length = length;
    this.button.disabled = true;
    this.waiting("Reading … (the first time the libraries take some seconds to load)");
    try {
      this.shown(await post("/api/data", asked), asked);
    } catch (error) {
      this.failed(error);
    } finally {
      this.button.disabled = false;
    }
  }

  shown(found, asked) {
    const { lengths } = found;
    const share = lengths ? `${Math.round((100 * lengths.learned) / lengths.tokens)} %` : null;
    const facts = [
      [figure(found.rows), found.rows === 1 ? "row" : "rows"], [found.format, "format"],
      [figure(found.copies), "copies of an earlier row"],
      ...(found.near ? [[figure(found.near.count), "held-out rows nearly in training"]] : []),
      ...(lengths ? [[figure(lengths.median), "tokens, median"], [figure(lengths.longest), "tokens, longest"], [figure(lengths.cut), lengths.cut === 1 ? "row is cut" : "rows are cut"], [share, "of the tokens are learned"]] : []),
    ];
    const notes = [found.description, ...(found.note && lengths.of < found.rows ? [`Of ${figure(lengths.of)} rows: ${found.note}`] : found.note ? [found.note] : [])];
    put(this.result,
      el("div", { class: "card stack" },
        el("div", { class: "row spread" }, el("h2", {}, "What is in it"),
          el("button", { type: "button", class: "main", onclick: () => this.train({ data: asked.path, eval_data: asked.eval_data, model: asked.model, objective: asked.objective === "sft" ? "" : asked.objective, max_length: asked.max_length === 1024 ? "" : String(asked.max_length ?? "") }) }, "Train on it")),
        el("div", { class: "figures" }, ...facts.map(([value, told]) => el("div", { class: "figure" }, el("b", {}, value), el("span", {}, told)))),
        lengths && el("div", {}, el("h3", {}, `Lengths, from 1 to ${figure(lengths.longest)} tokens`), bars(lengths.bins, "How many rows have which length")),
        ...found.left_out.map((told) => el("div", { class: "note warn" }, `Left out: ${told}`)),
        found.near?.count ? near(found.near, asked.eval_data) : null,
        ...notes.filter(Boolean).map((told) => el("p", { class: "quiet small" }, told)),
        el("pre", {}, command(asked))),
      el("div", { class: "row spread" }, el("h2", {}, found.shown.length === 1 ? "The first row" : `The first ${found.shown.length} rows`), asked.model ? legend() : null),
      el("div", { class: "rows" }, ...found.shown.map((row, index) => sample(row, index))));
    this.result.children[1].style.marginTop = "1.6rem";
    this.spaced();
  }
}

// Held-out rows beside the training rows that they are nearly: what they share is no proof of anything learned.
function near({ count, held_out, training, totals, pairs }, file) {
  const of = (seen, total) => (seen < total ? `${figure(seen)} of ${figure(total)}` : figure(total));
  const side = (name, parts) => el("div", {}, el("h3", {}, name), ...parts.flatMap((part) => [el("div", { class: "part" }, part.name), el("div", { class: "tokens" }, part.pieces.map(({ text }) => text).join(""))]));
  return el("details", { class: "note warn near" },
    el("summary", {}, `${figure(count)} of ${of(held_out, totals[0])} held-out rows ${count === 1 ? "is" : "are"} nearly in what is trained on (${of(training, totals[1])} rows): their loss would be too good.`),
    ...pairs.map((pair) => el("article", { class: "sample" },
      el("header", {}, el("b", {}, `${Math.round(100 * pair.share)} %`), `row ${figure(pair.row)}${file ? ` of ${file}` : ""} is row ${figure(pair.of)}`),
      el("div", { class: "pair" }, side("Held out", pair.sides[0]), side("Trained on", pair.sides[1])))),
    count > pairs.length ? el("p", { class: "small" }, `… and ${figure(count - pairs.length)} more`) : null);
}

function command({ path, model, max_length, eval_data }) {
  return `theodora train --model ${quoted(model || "MODEL")} --data ${quoted(path)}${eval_data ? ` --eval-data ${quoted(eval_data)}` : ""}${max_length && max_length !== 1024 ? ` --max-length ${max_length}` : ""} --output runs/first`;
}

function field(label, input, kind = "", help = "") {
  return el("div", { class: `field ${kind}` }, el("label", { for: input.id }, label), input, help && el("span", { class: "help" }, help));
}

function legend() {
  return el("div", { class: "legend" },
    ...[["learned", "learned"], ["seen", "seen, not learned"], ["cut", "cut off"]].map(([kind, told]) => el("span", { class: `t ${kind}` }, told)));
}

function sample(row, index) {
  const head = el("header", {}, el("b", {}, String(index + 1)));
  const tokens = row.parts.reduce((sum, part) => sum + (part.tokens ?? 0), 0);
  const learned = row.parts.reduce((sum, part) => sum + (part.learned ?? 0), 0);
  if (tokens) head.append(`${figure(tokens)} tokens, ${figure(learned)} learned`);
  if (row.problem) head.append(el("span", { class: "badge warn" }, row.problem.split("\n")[0].slice(0, 160)));
  const parts = row.parts.flatMap((part) => [
    part.name && el("div", { class: "part" }, part.name),
    el("div", { class: "tokens", tabindex: "0" }, ...part.pieces.map(({ text, kind }) => el("span", { class: `t ${kind}` }, text)),
      part.more ? el("span", { class: "quiet" }, ` … and ${figure(part.more)} more tokens`) : ""),
  ]).filter(Boolean);
  return el("article", { class: "sample" }, head, ...parts);
}
