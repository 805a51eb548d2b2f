// Commands with an end and a result, of some kinds: a list of them, and one in full. Tabs are made of it.
import { get, post } from "./api.js";
import { copied, el, put, say } from "./dom.js";

const EVERY = 1200;
const WORDS = { running: "at work", finished: "finished", stopped: "stopped", failed: "failed" };
const BADGES = { running: "training", failed: "bad", finished: "good" };

export class JobsView {
  // kinds: those that are shown; tell(found): elements for a job that has ended well.
  constructor(name, { kinds, tell }) {
    Object.assign(this, { name, kinds, tellMore: tell, jobs: [], visible: false });
    this.wrong = el("div", { class: "note bad", role: "alert", hidden: true });
    this.list = el("div", { class: "row look-earlier", role: "group", "aria-label": "Earlier ones" });
    this.result = el("div", { class: "look-result" });
    this.element = el("div", {}, this.wrong, this.list, this.result);
    setInterval(() => { if (this.visible && !document.hidden && (this.busy || this.waiting)) this.look(); }, EVERY);
  }

  get busy() { return this.jobs.some(({ state }) => state === "running"); }

  show(id) {
    this.visible = true;
    if (id) this.open = id;
    this.look();
  }

  hide() { this.visible = false; }

  // Begin one; what is wrong with single fields is thrown for the form to show.
  async start(kind, typed) {
    this.wrong.hidden = true;
    try {
      const { id } = await post("/api/look/jobs", { kind, ...typed });
      this.open = id;
      this.stamp = null;
      location.hash = `look/${this.name}/${id}`;
      await this.look();
    } catch (error) {
      if (error.answer?.problems) throw error;
      this.failed(error.message);
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
      this.jobs = (await get("/api/look/jobs")).jobs.filter(({ kind }) => this.kinds.includes(kind));
      if (!this.jobs.some(({ id }) => id === this.open)) this.open = this.jobs[0]?.id;
      put(this.list, ...(this.jobs.length > 1 ? this.jobs.slice(0, 12).map((each) => this.chip(each)) : []));
      const chosen = this.jobs.find(({ id }) => id === this.open);
      if (!chosen) return put(this.result);
      const stamp = `${chosen.id} ${chosen.state}`;
      this.waiting = false;
      if (chosen.state === "running" || stamp !== this.stamp) {
        const found = await get(`/api/look/jobs/${chosen.id}`);
        if (found.state.state === "running") this.atWork(found, stamp !== this.stamp);
        else this.tell(found);
      }
      this.stamp = stamp;
    } catch {
      this.waiting = true; // the banner says it
    } finally {
      this.looking = false;
    }
  }

  chip({ id, title, state, at, kind }) {
    const button = el("button", { type: "button", class: "chip", "aria-pressed": String(id === this.open), title: `${kind}, ${new Date(at * 1000).toLocaleString()}`, onclick: () => { location.hash = `look/${this.name}/${id}`; } }, title);
    if (state !== "finished") button.append(el("span", { class: `badge ${BADGES[state] ?? ""}` }, WORDS[state] ?? state));
    return button;
  }

  atWork({ state, log }, anew) {
    if (anew) {
      this.doing = el("span", { class: "quiet" });
      this.log = el("pre", { class: "log", tabindex: "0" });
      put(this.result, el("div", { class: "card stack" },
        el("div", { class: "row spread" }, el("h2", {}, state.title), el("button", { type: "button", class: "danger", onclick: () => this.act(state.id, "stop") }, "Stop")),
        el("div", { role: "status" }, el("span", { class: "spin" }), this.doing), this.log, shell(state.command)));
    }
    const lines = log.trimEnd().split("\n");
    say(this.doing, `${lines.at(-1) || "Loading …"} · ${Math.round(state.seconds)} s`);
    this.log.hidden = lines.length < 2;
    say(this.log, log);
  }

  async act(id, what) {
    try {
      await post(`/api/look/jobs/${id}/${what}`);
    } catch (error) {
      this.failed(error.message);
    }
    this.stamp = null;
    await this.look();
  }

  tell(found) {
    const { state, log } = found;
    const head = el("div", { class: "row spread" },
      el("div", { class: "row" }, el("h2", {}, state.title), el("span", { class: `badge ${BADGES[state.state] ?? ""}` }, WORDS[state.state] ?? state.state)),
      el("button", { type: "button", class: "plain", onclick: () => this.act(state.id, "forget") }, "Delete from the list"));
    if (state.state !== "finished") {
      const told = state.state === "failed" ? el("div", { class: "note bad", role: "alert" }, lastWords(log) || "It ended without a word.") : null;
      put(this.result, el("div", { class: "card stack" }, head, ...[told].filter(Boolean), ...words(state.command, log)));
      return;
    }
    put(this.result, ...this.tellMore(found, head));
  }
}

const shell = (command) => el("div", { class: "copy" }, el("pre", {}, command), copied(() => command));

export const words = (command, log) => [
  el("details", {}, el("summary", {}, "In a terminal"), shell(command)),
  ...(log ? [el("details", {}, el("summary", {}, "Log"), el("pre", { class: "log", tabindex: "0" }, log))] : []),
];

function lastWords(log) {
  const lines = log.trimEnd().split("\n");
  const start = lines.findLastIndex((line) => !line.trim());
  return lines.slice(start + 1).slice(-12).join("\n");
}

export const grid = (head, rows, from = 1) => el("div", { class: "wide-table" }, el("table", {},
  el("thead", {}, el("tr", {}, ...head.map((cell, at) => el("th", { scope: "col", class: at >= from ? "number" : undefined }, cell)))),
  el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell, at) => el("td", { class: at >= from ? "number" : undefined }, cell)))))));
