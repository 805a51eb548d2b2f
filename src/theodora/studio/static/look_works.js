// Works of the studio (comparisons on rows, and commands with a result): a list of them, and one in full.
import { get, post } from "./api.js";
import { copied, el, lastWords, put, say } from "./dom.js";
import { problems } from "./look_parts.js";

const EVERY = 1200, LISTED = 12;
const WORDS = { running: "at work", finished: "finished", stopped: "stopped", failed: "failed" };
const BADGES = { running: "training", failed: "bad", finished: "good" };

export class WorksView {
  // tab, works: their names in addresses, of the page and of the server.
  // boxes, button: of the form that begins one; alone: whether it waits until none is at work.
  // shows(work): whether it is one of this tab. name(work), told(work): of its button in the list. title(work), under(work): above it.
  // forget: what deleting is called. progress(found): `doing` in words, and its `share` and `log` if they tell something.
  // tell(found, head, words): elements for one that has ended well.
  constructor(tab, works, given) {
    Object.assign(this, { tab, works, alone: false, shows: () => true, under: () => null, all: [], visible: false, ...given });
    this.wrong = el("div", { class: "note bad", role: "alert", hidden: true });
    this.list = el("div", { class: "row look-earlier", role: "group", "aria-label": "Earlier ones" });
    this.result = el("div", { class: "look-result" });
    this.element = el("div", {}, this.wrong, this.list, this.result);
    setInterval(() => { if (this.visible && !document.hidden && !this.looking && (this.busy || this.waiting)) this.look(); }, EVERY);
  }

  get busy() { return this.all.some(({ state }) => state === "running"); }

  show(id) {
    this.visible = true;
    if (id) this.open = id;
    this.look();
  }

  hide() { this.visible = false; }

  async start(asked) {
    this.wrong.hidden = true;
    problems(this.boxes, {});
    this.button.disabled = true;
    try {
      const { id } = await post(`/api/look/${this.works}`, asked);
      this.open = id;
      location.hash = `look/${this.tab}/${id}`;
      await this.look();
    } catch (error) {
      if (error.answer?.problems) problems(this.boxes, error.answer.problems);
      else this.failed(error.message);
    } finally {
      this.button.disabled = this.alone && this.busy;
    }
  }

  failed(text) {
    say(this.wrong, text);
    this.wrong.hidden = false;
  }

  // One look at a time; who asks meanwhile, perhaps for another work, gets one after it.
  async look() {
    this.again = true;
    if (this.looking) return;
    this.looking = true;
    try {
      while (this.again) {
        this.again = false;
        await this.lookNow();
      }
      this.waiting = false;
    } catch {
      this.waiting = true; // the banner says it
    } finally {
      this.looking = false;
    }
  }

  async lookNow() {
    this.all = (await get(`/api/look/${this.works}`)).works.filter(this.shows);
    if (this.alone) this.button.disabled = this.busy;
    if (!this.all.some(({ id }) => id === this.open)) this.open = this.all[0]?.id;
    this.draw();
    const chosen = this.all.find(({ id }) => id === this.open);
    if (!chosen) return put(this.result);
    if (chosen.state !== "running" && this.stamp === `${chosen.id} ${chosen.state}`) return;
    const found = await get(`/api/look/${this.works}/${chosen.id}`);
    const stamp = `${chosen.id} ${found.state.state}`;
    if (found.state.state === "running") this.atWork(found, stamp !== this.stamp);
    else this.ended(found);
    this.stamp = stamp;
  }

  // The list, where it has changed: who is at one of its buttons stays there.
  draw() {
    const listed = this.all.length > 1 ? this.all.slice(0, LISTED) : [];
    const stamp = JSON.stringify([this.open, ...listed.map(({ id, state }) => [id, state])]);
    if (stamp !== this.drawn) put(this.list, ...listed.map((each) => this.chip(each)));
    this.drawn = stamp;
  }

  chip(work) {
    const { id, state } = work;
    return el("button", { type: "button", class: "chip", "aria-pressed": String(id === this.open), title: this.told(work), onclick: () => { location.hash = `look/${this.tab}/${id}`; } },
      this.name(work), state !== "finished" && badge(state));
  }

  atWork(found, anew) {
    const { state } = found;
    if (anew) {
      this.bar = el("progress", { max: 1 });
      this.doing = el("span", { class: "quiet" });
      this.log = el("pre", { class: "log", tabindex: "0" });
      put(this.result, el("div", { class: "card stack" },
        el("div", { class: "row spread" }, el("h2", {}, this.title(state)), el("button", { type: "button", class: "danger", onclick: () => this.act(state.id, "stop") }, "Stop")),
        this.bar, el("div", { role: "status" }, el("span", { class: "spin" }), this.doing), this.log, shell(state.command)));
    }
    const { doing, share, log = "" } = this.progress(found);
    this.bar.hidden = share === undefined;
    this.bar.value = share ?? 0;
    say(this.doing, doing);
    say(this.log, log);
    this.log.hidden = !log;
  }

  async act(id, what) {
    this.wrong.hidden = true;
    try {
      await post(`/api/look/${this.works}/${id}/${what}`);
    } catch (error) {
      this.failed(error.message);
    }
    this.stamp = null;
    await this.look();
  }

  ended(found) {
    const { state, log } = found;
    const head = el("div", { class: "row spread" },
      el("div", {}, el("div", { class: "row" }, el("h2", {}, this.title(state)), badge(state.state)), this.under(state)),
      el("button", { type: "button", class: "plain", onclick: () => this.act(state.id, "forget") }, this.forget));
    const words = [el("details", {}, el("summary", {}, "In a terminal"), shell(state.command)),
      log && el("details", {}, el("summary", {}, "Log"), el("pre", { class: "log", tabindex: "0" }, log))];
    if (state.state === "finished") return put(this.result, ...this.tell(found, head, words));
    const told = state.state === "failed" && el("div", { class: "note bad", role: "alert" }, lastWords(log) || "It ended without a word.");
    put(this.result, el("div", { class: "card stack" }, head, told, ...words));
  }
}

const badge = (state) => el("span", { class: `badge ${BADGES[state] ?? ""}` }, WORDS[state] ?? state);

const shell = (command) => el("div", { class: "copy" }, el("pre", {}, command), copied(() => command));

// Commands with a result, of some kinds.
export const jobsView = (tab, kinds, given) => new WorksView(tab, "jobs", {
  shows: ({ kind }) => kinds.includes(kind),
  name: ({ title }) => title,
  told: ({ kind, at }) => `${kind}, ${new Date(at * 1000).toLocaleString()}`,
  title: ({ title }) => title,
  forget: "Delete from the list",
  progress: ({ state, log }) => {
    const lines = log.trimEnd().split("\n");
    return { doing: `${lines.at(-1) || "Loading …"} · ${Math.round(state.seconds)} s`, log: lines.length > 1 ? log : "" };
  },
  ...given,
});
