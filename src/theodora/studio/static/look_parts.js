// What the tabs of Look share: fields, what is wrong with them, runs that a field offers, and tables.
import { get } from "./api.js";
import { el, place, put } from "./dom.js";

export function field(label, input, { kind = "", help = "" } = {}) {
  const problem = el("span", { class: "problem", id: `${input.id}-problem`, role: "alert" });
  input.setAttribute("aria-describedby", problem.id);
  return el("div", { class: `field ${kind}` }, el("label", { for: input.id }, label), input, problem, help && el("span", { class: "help" }, help));
}

export const typed = (id, given = {}) => el("input", { id, autocomplete: "off", spellcheck: "false", ...given });

// A list of runs that have an adapter, which inputs name by their attribute `list`.
export class KnownRuns {
  constructor(id, about) {
    Object.assign(this, { home: about.home, runs: [], element: el("datalist", { id }) });
  }

  async look() {
    const { runs } = await get("/api/runs");
    this.runs = runs.filter(({ state }) => state === "finished" || state === "stopped");
    put(this.element, ...this.runs.map(({ folder, name, method }) => el("option", { value: place(folder, this.home), label: `${name} · ${method}` })));
    return this.runs;
  }
}

// What is wrong stands at its field; `problems` has texts by name, and `boxes` the fields.
export function problems(boxes, wrong) {
  for (const [name, box] of Object.entries(boxes)) {
    box.querySelector(".problem").textContent = wrong[name] ?? "";
    box.classList.toggle("wrong", name in wrong);
    box.querySelector("input, select, textarea").setAttribute("aria-invalid", String(name in wrong));
  }
  const first = Object.keys(boxes).find((name) => name in wrong);
  if (first) boxes[first].querySelector("input, select, textarea").focus();
}

export const grid = (head, rows, from = 1) => el("div", { class: "wide-table" }, el("table", {},
  el("thead", {}, el("tr", {}, ...head.map((cell, at) => el("th", { scope: "col", class: at >= from ? "number" : undefined }, cell)))),
  el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell, at) => el("td", { class: at >= from ? "number" : undefined }, cell)))))));
