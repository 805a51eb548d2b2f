// Before and after: what the base answers to held-out rows, and what the adapter does.
import { el, put } from "./dom.js";

export class AnswersTab {
  constructor(root) { put(root, el("p", { class: "quiet" }, "")); }

  show() {}
}
