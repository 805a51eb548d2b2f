// Look: what an adapter has changed. Each tab is a module of its own, with `show(rest)`, and `hide()` and `fill(values)` if it wants.
import { el, put } from "./dom.js";
import { AnswersTab } from "./look_answers.js";
import { ChangeTab } from "./look_change.js";
import { ChatTab } from "./look_chat.js";
import { MakeTab } from "./look_make.js";
import { ReportsTab } from "./look_reports.js";

const TABS = [
  ["answers", "Before and after", AnswersTab],
  ["chat", "Chat", ChatTab],
  ["change", "What changed", ChangeTab],
  ["reports", "Comparisons", ReportsTab],
  ["make", "Make", MakeTab],
];

export class LookScreen {
  constructor(root, { about }) {
    this.tabs = new Map();
    const list = el("div", { class: "tabbed look-tabs", role: "tablist", "aria-label": "What to look at", onkeydown: (event) => this.key(event) });
    const panels = TABS.map(([name, label, Tab]) => {
      const button = el("button", { type: "button", role: "tab", id: `look-tab-${name}`, "aria-controls": `look-${name}`, onclick: () => { location.hash = `look/${name}`; } }, label);
      const panel = el("div", { id: `look-${name}`, role: "tabpanel", "aria-labelledby": button.id, hidden: true });
      this.tabs.set(name, { button, panel, tab: new Tab(panel, { about }) });
      list.append(button);
      return panel;
    });
    put(root, el("div", { class: "head" }, el("h1", {}, "Look")), list, ...panels);
  }

  // The rest of the address: the tab's name, and after it what is the tab's own.
  show(rest) {
    const [name, ...more] = rest.split("/");
    this.open = this.tabs.has(name) ? name : this.open ?? TABS[0][0];
    for (const [each, { button, panel, tab }] of this.tabs) {
      const shown = each === this.open;
      button.setAttribute("aria-selected", String(shown));
      button.tabIndex = shown ? 0 : -1;
      panel.hidden = !shown;
      if (shown) tab.show(more.join("/"));
      else tab.hide?.();
    }
  }

  hide() { for (const { tab } of this.tabs.values()) tab.hide?.(); }

  fill(name, values) { this.tabs.get(name)?.tab.fill?.(values); }

  // Arrows go from tab to tab, as in every list of them.
  key(event) {
    const names = [...this.tabs.keys()];
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = names[(names.indexOf(this.open) + step + names.length) % names.length];
    location.hash = `look/${next}`;
    this.tabs.get(next).button.focus();
  }
}
