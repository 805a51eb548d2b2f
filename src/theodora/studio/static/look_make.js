// Make: an adapter merged or exported, and two forms of one model compared; each an ordinary command.
import { copied, el, put } from "./dom.js";
import { field, KnownRuns, problems, typed } from "./look_parts.js";
import { jobsView } from "./look_works.js";

// What is made -> label, help, the kind of command, its fields, and what a name for it ends in.
const KINDS = {
  hf: ["A plain model", "The adapter merged in; any engine loads it. Compared with the adapter before it gets its name.", "export", ["dtype"], "-merged"],
  gguf: ["GGUF", "One file of the merged model, for llama.cpp.", "export", ["dtype"], ".gguf"],
  "gguf-lora": ["GGUF LoRA", "For llama.cpp's --lora. It has no DoRA: a plain LoRA is made first, and its error told.", "export", ["lora_rank"], "-lora.gguf"],
  mlx: ["MLX", "An adapter folder for mlx-lm.", "export", ["lora_rank"], "-mlx"],
  peft: ["PEFT", "PEFT's adapter folder.", "export", ["lora_rank"], "-peft"],
  served: ["For engines", "g in place of m, for engines that should compute nothing at loading.", "export", [], "-served"],
  merge: ["Merged onto …", "For a base that was quantised in training: onto its original weights, those that training multiplied by, or these quantised again.", "merge", ["onto", "dtype"], "-merged"],
  combine: ["Combined", "One adapter out of several of the same base. linear adds what each changes, exactly; the others approximate.", "combine", ["adapters", "weights", "method", "rank", "density"], ""],
  verify: ["Compare two forms", "Do they predict the same? Model and adapter folders, and .gguf files.", "verify", ["a", "b"], ""],
};
const options = (values) => values.map((value) => el("option", { value }, value));

export class MakeTab {
  constructor(root, { about }) {
    this.known = new KnownRuns("make-runs", about);
    this.dtypes = about.make.dtype;
    this.known.element.hidden = true;
    this.inputs = {
      adapter: typed("make-adapter", { placeholder: "runs/first", list: "make-runs" }),
      a: typed("make-a", { placeholder: "runs/first", list: "make-runs" }),
      b: typed("make-b", { placeholder: "merged", list: "make-runs" }),
      adapters: el("textarea", { id: "make-adapters", placeholder: "runs/maths\nruns/style", spellcheck: "false", rows: 3 }),
      weights: typed("make-weights", { placeholder: "1 for each" }),
      method: el("select", { id: "make-method" }, ...options(about.make.method)),
      rank: typed("make-rank-of", { inputmode: "numeric", placeholder: "as the method wants" }),
      density: typed("make-density", { inputmode: "decimal", placeholder: "all" }),
      output: typed("make-output", { placeholder: "runs/first-merged" }),
      dtype: el("select", { id: "make-dtype" }),
      onto: el("select", { id: "make-onto" }, ...options(about.make.onto)),
      lora_rank: typed("make-rank", { inputmode: "numeric", placeholder: "as it is" }),
      base_model: typed("make-base", { placeholder: "the one that the adapter names" }),
    };
    this.boxes = {
      adapter: field("A run, or an adapter", this.inputs.adapter),
      a: field("The form to trust", this.inputs.a),
      b: field("The form to check", this.inputs.b),
      adapters: field("Runs, or adapters", this.inputs.adapters, { kind: "wide", help: "One a line." }),
      weights: field("Weights", this.inputs.weights, { help: "One for each, such as 0.7 0.3; below 0 takes a change away." }),
      method: field("Method", this.inputs.method),
      rank: field("Of rank", this.inputs.rank),
      density: field("Share that ties and dare keep", this.inputs.density),
      output: field("Into", this.inputs.output, { help: "A name that is free: nothing is replaced." }),
      dtype: field("Weights in", this.inputs.dtype),
      onto: field("Onto", this.inputs.onto),
      lora_rank: field("As plain LoRA of rank", this.inputs.lora_rank),
      base_model: field("Base model", this.inputs.base_model),
    };
    this.kinds = el("div", { class: "row look-kinds", role: "group", "aria-label": "What to make" },
      ...Object.entries(KINDS).map(([name, [label]]) => el("button", { type: "button", class: "chip", "data-kind": name, onclick: () => this.choose(name) }, label)));
    this.help = el("p", { class: "quiet small" });
    this.button = el("button", { class: "main", type: "submit" });
    this.jobs = jobsView("make", ["export", "merge", "combine", "verify"], { boxes: this.boxes, button: this.button, tell: (...found) => this.tell(...found) });
    put(root, el("p", { class: "quiet look-told" }, "An adapter in the form that another program wants. Every export is compared with the adapter on its base, and gets its name only if it predicts the same."),
      el("form", { class: "card stack", onsubmit: (event) => { event.preventDefault(); this.start(); } },
        this.kinds, this.help, el("div", { class: "fields" }, ...Object.values(this.boxes)), el("div", { class: "row" }, this.button), this.known.element), this.jobs.element);
    this.inputs.adapter.addEventListener("change", () => this.name());
    this.inputs.output.addEventListener("input", () => { this.named = Boolean(this.inputs.output.value); });
    this.choose("hf");
  }

  show(id) {
    this.known.look().catch(() => {});
    this.jobs.show(id);
  }

  hide() { this.jobs.hide(); }

  fill({ adapter }) {
    this.inputs.adapter.value = adapter ?? "";
    this.named = false;
    this.name();
  }

  choose(kind) {
    this.kind = kind;
    const [, help, command, own] = KINDS[kind];
    for (const button of this.kinds.children) button.setAttribute("aria-pressed", String(button.dataset.kind === kind));
    const shown = [...own, "base_model", ...(command === "verify" ? [] : command === "combine" ? ["output"] : ["adapter", "output"])];
    for (const [name, box] of Object.entries(this.boxes)) box.hidden = !shown.includes(name);
    put(this.inputs.dtype, el("option", { value: "" }, kind === "gguf" ? "fp16 (default)" : "as in the base"), ...options(this.dtypes[kind] ?? []));
    put(this.help, help);
    put(this.button, command === "verify" ? "Compare" : { merge: "Merge", combine: "Combine" }[command] ?? "Export");
    problems(this.boxes, {});
    this.name();
  }

  // A name for the result, as long as nobody has typed one.
  name() {
    const adapter = this.inputs.adapter.value.trim().replace(/\/+$/, "");
    if (!this.named) this.inputs.output.value = adapter && KINDS[this.kind][4] && `${adapter}${KINDS[this.kind][4]}`;
  }

  start() {
    const given = Object.fromEntries(Object.entries(this.inputs).filter(([name]) => !this.boxes[name].hidden).map(([name, input]) => [name, input.value]));
    if (given.adapters !== undefined) given.adapters = given.adapters.split("\n");
    this.jobs.start({ kind: KINDS[this.kind][2], form: this.kind, ...given });
  }

  tell({ state, log }, head, [terminal]) {
    const place = state.result ? el("div", { class: "copy" }, el("pre", {}, state.result), copied(() => state.result)) : null;
    return [el("div", { class: "card stack" }, head, place, el("pre", { class: "said", tabindex: "0" }, log.trim()), terminal)];
  }
}
