// Chat: one message to the base and to adapters, side by side.
import { el, put } from "./dom.js";

export class ChatTab {
  constructor(root) { put(root, el("p", { class: "quiet" }, "")); }

  show() {}
}
