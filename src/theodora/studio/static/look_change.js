// What changed: how far runs have moved magnitudes and directions, as `theodora inspect` measures it, side by side.
import { el, place, put } from "./dom.js";
import { field, grid, KnownRuns, typed } from "./look_parts.js";
import { jobsView } from "./look_works.js";

const METHODS = { lora: "LoRA", dora: "DoRA", full: "full" };
const short = (value, digits = 3) => (typeof value === "number" && Number.isFinite(value) ? value.toPrecision(digits) : "–");
const percent = (value) => (typeof value === "number" && Number.isFinite(value) ? `${Math.abs(value) < 5e-6 ? 0 : (100 * value).toPrecision(2)} %` : "–");
const mean = (values) => { const known = values.filter((value) => typeof value === "number"); return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null; };
const MEASURES = [["ΔM", "magnitude", short], ["ΔM / ‖w‖", "relative_magnitude", percent], ["ΔD", "direction", short], ["‖ΔW‖ / ‖W‖", "size", percent], ["rank", "effective_rank", (value) => short(value, 2)]];
const FIGURES = { "scatter.png": "ΔM against ΔD, a point for each layer", "heat_map.png": "Every module", "experts.png": "Experts" };

export class ChangeTab {
  constructor(root, { about }) {
    Object.assign(this, { home: about.home, known: new KnownRuns("change-runs", about) });
    this.runs = el("textarea", { id: "change-runs-typed", placeholder: "runs/first\nruns/second", spellcheck: "false", rows: 3 });
    this.base = typed("change-base", { placeholder: "the one that the adapter names" });
    this.button = el("button", { class: "main", type: "submit" }, "Measure");
    this.boxes = {
      runs: field("Runs, adapters, or fully tuned models", this.runs, { kind: "wide", help: "One a line; each of a run's checkpoints is measured." }),
      base_model: field("The model before training", this.base, { help: "A fully tuned model needs it." }),
    };
    this.chips = el("div", { class: "row look-earlier", role: "group", "aria-label": "Known runs" });
    this.jobs = jobsView("change", ["inspect"], { boxes: this.boxes, button: this.button, tell: (...found) => this.tell(...found) });
    put(root, el("p", { class: "quiet look-told" }, "How far training has moved each weight: ΔM is the change of its rows' lengths, ΔD that of their directions."),
      el("form", { class: "card stack", onsubmit: (event) => { event.preventDefault(); this.start(); } },
        el("div", { class: "fields" }, ...Object.values(this.boxes), el("div", { class: "field end" }, this.button)), this.chips), this.jobs.element);
  }

  show(id) {
    this.known.look().then((runs) => put(this.chips, ...runs.slice(0, 10).map(({ folder, name }) =>
      el("button", { type: "button", class: "chip", onclick: () => this.add(place(folder, this.home)) }, `+ ${name}`)))).catch(() => {});
    this.jobs.show(id);
  }

  hide() { this.jobs.hide(); }

  fill({ runs }) { this.runs.value = runs.join("\n"); }

  add(folder) {
    const lines = this.runs.value.split("\n").filter((line) => line.trim());
    if (!lines.includes(folder)) this.runs.value = [...lines, folder].join("\n");
  }

  start() {
    this.jobs.start({ kind: "inspect", runs: this.runs.value.split("\n").filter((line) => line.trim()), base_model: this.base.value });
  }

  tell({ state, report, figures }, head, words) {
    const runs = report?.runs ?? [];
    const told = runs.flatMap(({ path, warnings, notes }) => [...(warnings ?? []).map((text) => ["bad", path, text]), ...(notes ?? []).map((text) => ["", path, text])]);
    const cards = [el("div", { class: "card stack" }, head,
      ...told.map(([kind, path, text]) => el("div", { class: `note ${kind}` }, runs.length > 1 ? `${name(path)}: ${text}` : text)),
      el("h3", {}, "By kind of module, at the last checkpoint"), this.kinds(runs), ...words)];
    if (runs.some(({ checkpoints }) => checkpoints.length > 1)) cards.push(el("div", { class: "card stack" }, el("h2", {}, "Along the run"), this.along(runs)));
    for (const figure of figures)
      cards.push(el("figure", { class: "card drawn" }, el("figcaption", {}, FIGURES[figure] ?? figure), el("img", { src: `/api/look/jobs/${state.id}/figure/${figure}`, alt: FIGURES[figure] ?? figure, loading: "lazy" })));
    cards.push(el("div", { class: "card stack" }, el("h2", {}, "What moved most"), this.movers(runs)));
    return cards;
  }

  kinds(runs) {
    const rows = runs.flatMap((run) => {
      const modules = run.checkpoints.at(-1).modules;
      const correlation = Object.fromEntries(run.correlations.map((each) => [each.kind, each.pearson]));
      return [...new Set(modules.map(({ kind }) => kind))].map((kind) => {
        const own = modules.filter((module) => module.kind === kind);
        return [...(runs.length > 1 ? [label(run)] : []), kind, String(own.length), ...measures(own), short(correlation[kind], 2)];
      });
    });
    if (runs.length > 1) rows.sort((a, b) => a[1].localeCompare(b[1]));
    return grid([...(runs.length > 1 ? ["run"] : []), "modules", "", ...MEASURES.map(([told]) => told), "r(ΔD, ΔM)"], rows, runs.length > 1 ? 2 : 1);
  }

  along(runs) {
    return grid(["run", "checkpoint", ...MEASURES.map(([told]) => told)], runs.flatMap((run) => run.checkpoints.map((each) => [label(run), each.label, ...measures(each.modules)])), 2);
  }

  movers(runs) {
    const all = runs.flatMap((run) => run.checkpoints.at(-1).modules.map((module) => [run, module])).filter(([, { size }]) => typeof size === "number").sort(([, a], [, b]) => b.size - a.size);
    return grid([...(runs.length > 1 ? ["run"] : []), "module", ...MEASURES.map(([told]) => told)], all.slice(0, 10).map(([run, module]) => [...(runs.length > 1 ? [label(run)] : []), module.path, ...measures([module])]), runs.length > 1 ? 2 : 1);
  }
}

const measures = (modules) => MEASURES.map(([, key, show]) => show(mean(modules.map((module) => module[key]))));
const name = (path) => path.split("/").at(-1);
const label = ({ path, method }) => `${name(path)} (${METHODS[method] ?? method})`;
