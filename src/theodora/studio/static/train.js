// Train: the options of a run with their help, checked as the command checks them, beside the YAML that says the same.
import { post } from "./api.js";
import { copied, el, later, put, say } from "./dom.js";

const KEPT = "theodora-form";
const LABELS = {
  model: "Model", data: "Data", output: "Output folder", objective: "Objective", method: "Method", rank: "Rank",
  learning_rate: "Learning rate", num_train_epochs: "Epochs", per_device_train_batch_size: "Rows in a pass", max_length: "Longest row",
};
const EXAMPLES = { model: "HuggingFaceTB/SmolLM2-135M-Instruct", data: "train.jsonl", output: "runs/first", learning_rate: "0.0005", trainer: "optim: adafactor\nneftune_noise_alpha: 5" };

export class TrainScreen {
  constructor(root, { about, started, look }) {
    Object.assign(this, { started, inputs: {}, boxes: {}, number: 0 });
    const [first, ...folded] = about.form;
    const groups = folded.map((group) => {
      const told = el("span", { class: "quiet small" }, group.fields.map((each) => each.name).slice(0, 5).join(", ") + (group.fields.length > 5 ? " …" : ""));
      const box = el("details", {}, el("summary", {}, group.heading, told), el("div", { class: "fields" }, ...group.fields.map((each) => this.field(each))));
      for (const each of group.fields) this.boxes[each.name].group = box;
      return box;
    });
    this.yaml = el("pre", {}, "");
    this.command = el("pre", { hidden: true }, "");
    this.tabs = ["YAML", "Command"].map((name, index) =>
      el("button", { type: "button", role: "tab", "aria-selected": String(!index), onclick: () => this.tab(index) }, name));
    this.verdict = el("div", { "aria-live": "polite" });
    this.others = el("div", { "aria-live": "polite" });
    this.atOnce = el("input", { type: "checkbox", id: "at-once" });
    this.button = el("button", { class: "main", type: "submit" }, "Start training");
    this.fits = el("button", { type: "button", onclick: () => this.plan() }, "Does it fit?");
    const form = el("form", { class: "two", onsubmit: (event) => { event.preventDefault(); this.start(); } },
      el("div", { class: "card" }, el("div", { class: "fields" }, ...first.fields.map((each) => this.field(each))), el("div", { class: "groups" }, ...groups)),
      el("div", { class: "sticky stack" },
        el("div", { class: "card stack" },
          el("div", { class: "row" }, this.button, this.fits,
            el("button", { type: "button", class: "plain", onclick: () => look(this.typed()) }, "Look at the data")),
          el("label", { class: "check", for: "at-once" }, this.atOnce, "at once, beside what is at work"),
          this.others, this.verdict),
        el("div", { class: "card" }, el("div", { class: "tabbed", role: "tablist" }, ...this.tabs),
          el("div", { class: "copy" }, this.yaml, this.command, copied(() => (this.yaml.hidden ? this.command : this.yaml).textContent)))));
    put(root, el("div", { class: "head" }, el("h1", {}, "Train"), el("p", {}, "Model, data and an output folder are enough; what is left empty has the default that its help names. A run goes on when this page is closed.")), form);
    this.check = later(() => this.checkNow(), 250);
    form.addEventListener("input", () => { this.keep(); this.check(); });
    try {
      this.fill(JSON.parse(sessionStorage.getItem(KEPT) ?? "{}"));
    } catch { /* kept by another version */ }
  }

  field({ name, help, kind, choices, default: given }) {
    const id = `field-${name}`;
    let input;
    if (kind === "choice" || kind === "truth") {
      const words = kind === "truth" ? ["yes", "no"] : choices;
      input = el("select", { id }, el("option", { value: "" }, given ? `${given} (default)` : "default"), ...words.filter((word) => word !== given).map((word) => el("option", { value: word }, word)));
    } else if (kind === "yaml") input = el("textarea", { id, placeholder: EXAMPLES[name] ?? "", spellcheck: "false" });
    else input = el("input", { id, placeholder: EXAMPLES[name] ?? given, autocomplete: "off", spellcheck: "false", inputmode: kind === "number" ? "decimal" : undefined });
    const problem = el("span", { class: "problem", id: `${id}-problem`, role: "alert" });
    input.setAttribute("aria-describedby", `${id}-help ${id}-problem`);
    this.inputs[name] = input;
    const box = el("div", { class: ["model", "data", "output", "trainer"].includes(name) ? "field wide" : "field" },
      el("label", { for: id }, LABELS[name] ?? name.replaceAll("_", " ")), input, problem, el("span", { class: "help", id: `${id}-help` }, help));
    box.title = name;
    this.boxes[name] = { box, problem };
    return box;
  }

  tab(index) {
    this.tabs.forEach((button, each) => button.setAttribute("aria-selected", String(each === index)));
    this.yaml.hidden = index !== 0;
    this.command.hidden = index !== 1;
  }

  show() {
    post("/api/wake").catch(() => {});
    this.check();
  }

  typed() {
    return Object.fromEntries(Object.entries(this.inputs).map(([name, input]) => [name, input.value]).filter(([, value]) => value.trim()));
  }

  fill(values, anew = false) {
    if (anew) for (const input of Object.values(this.inputs)) input.value = "";
    for (const [name, value] of Object.entries(values)) if (this.inputs[name] && (value || anew)) this.inputs[name].value = value ?? "";
    this.keep();
    this.check();
  }

  keep() {
    sessionStorage.setItem(KEPT, JSON.stringify(this.typed()));
    put(this.verdict);
    put(this.others);
  }

  async checkNow() {
    const number = ++this.number;
    try {
      const found = await post("/api/check", this.typed());
      if (number !== this.number) return; // typed on meanwhile
      say(this.yaml, found.yaml || "model: …\ndata: …\noutput: …\n");
      say(this.command, found.command);
      this.problems(found.problems, false);
    } catch { /* the banner says it */ }
  }

  // What is only missing is said when somebody wants to start, not while the form is being filled.
  problems(problems, all) {
    const shown = Object.entries(problems).map(([name, texts]) => [name, all ? texts : texts.filter((text) => !/ is (missing|empty)$/.test(text))]).filter(([, texts]) => texts.length);
    const wrong = Object.fromEntries(shown);
    for (const [name, { box, problem }] of Object.entries(this.boxes)) {
      say(problem, wrong[name]?.join("; ") ?? "");
      box.classList.toggle("wrong", name in wrong);
      this.inputs[name].setAttribute("aria-invalid", String(name in wrong));
    }
    const rest = shown.filter(([name]) => !(name in this.boxes)).flatMap(([, texts]) => texts);
    put(this.others, rest.length ? el("div", { class: "note bad" }, rest.join("\n")) : null);
    const first = shown.map(([name]) => name).find((name) => name in this.boxes);
    if (all && first) {
      if (this.boxes[first].group) this.boxes[first].group.open = true;
      this.inputs[first].focus();
    }
  }

  async plan() {
    put(this.verdict, el("div", { class: "note" }, el("span", { class: "spin" }), "Counting …"));
    this.fits.disabled = true;
    try {
      const found = await post("/api/plan", this.typed());
      const size = found.taken ? `about ${found.taken} of ${found.memory}` : `with twice the room to spare, ${found.memory} being there`;
      const where = found.device === "cuda" ? "on the GPU" : "in main memory";
      put(this.verdict, found.fits
        ? el("div", { class: "note good" }, `It fits ${where}: ${size}.`)
        : el("div", { class: found.splits ? "note warn" : "note bad" }, found.message));
    } catch (error) {
      put(this.verdict, el("div", { class: "note bad", role: "alert" }, error.message));
    } finally {
      this.fits.disabled = false;
    }
  }

  async start() {
    this.button.disabled = true;
    put(this.others);
    try {
      const { id } = await post("/api/runs", { options: this.typed(), at_once: this.atOnce.checked });
      this.started(id);
    } catch (error) {
      if (error.answer?.problems) this.problems(error.answer.problems, true);
      else if (error.message.startsWith("output: ")) this.problems({ output: [error.message.slice(8)] }, true);
      else put(this.others, el("div", { class: "note bad", role: "alert" }, error.message));
    } finally {
      this.button.disabled = false;
    }
  }
}
