// Chat: one message to the base and to adapters, whose answers stand side by side and arrive as they are made.
import { get, post, stream } from "./api.js";
import { copied, el, figure, place, put, say } from "./dom.js";
import { field, KnownRuns, problems, typed } from "./look_parts.js";

const KEPT = "theodora-chat", EVERY = 1000, SELDOM = 5;
const ENDS = { length: "cut: the longest answer", stop: "" };

export class ChatTab {
  constructor(root, { about }) {
    Object.assign(this, { home: about.home, known: new KnownRuns("chat-runs", about), turns: [], state: { state: "none" }, ticks: 0, visible: false, adapters: [] });
    this.model = typed("chat-model", { placeholder: "the one that the adapter names" });
    this.list = el("div", { class: "stack" });
    this.modelBox = field("Model", this.model, { help: "A folder, or a name on the hub. Empty: the base that the first adapter names." });
    this.picks = el("div", { class: "row look-earlier", role: "group", "aria-label": "Runs that are known" });
    this.wrong = el("div", { class: "note bad", role: "alert", hidden: true });
    this.button = el("button", { class: "main", type: "submit" }, "Load");
    this.form = el("form", { class: "card stack", onsubmit: (event) => { event.preventDefault(); this.load(); } },
      el("h2", {}, "Who is to answer"), this.picks, this.list,
      el("div", { class: "row" }, el("button", { type: "button", class: "plain", onclick: () => this.add("").focus() }, "Another adapter")),
      this.modelBox, this.wrong,
      el("div", { class: "row" }, this.button, el("span", { class: "quiet small" }, "Base and adapters share one copy of the model. They are served on the loopback, with a key, until you unload them or the studio ends.")),
      this.known.element);
    this.status = el("div", { class: "card stack", hidden: true });
    this.room = el("div", { hidden: true }, ...this.furnished());
    put(root, el("p", { class: "quiet look-told" }, "One message goes to all; each answers in its own conversation."), this.form, this.status, this.room);
    this.add("");
    try {
      this.kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
    } catch { /* of another version */ }
    setInterval(() => { if (this.visible && !document.hidden && (this.state.state === "starting" || ++this.ticks % SELDOM === 0)) this.look(); }, EVERY);
  }

  // What a chat needs: who is there, settings, what was said, and a place to write.
  furnished() {
    this.who = el("div", { class: "row" });
    this.system = el("textarea", { id: "chat-system", rows: "2", placeholder: "none" });
    this.temperature = typed("chat-temperature", { value: "0", inputmode: "decimal" });
    this.longest = typed("chat-longest", { value: "256", inputmode: "numeric" });
    this.settings = {
      system: field("System prompt", this.system, { kind: "wide" }),
      temperature: field("Temperature", this.temperature, { help: "0: the likeliest words" }),
      max_tokens: field("Longest answer", this.longest, { help: "tokens" }),
    };
    for (const input of [this.system, this.temperature, this.longest]) input.addEventListener("input", () => this.keep());
    this.command = el("pre", {});
    this.talk = el("div", { class: "talk" });
    this.text = el("textarea", { id: "chat-text", rows: "2", placeholder: "Write to all of them", "aria-label": "Message", onkeydown: (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.send(); }
    } });
    this.sending = el("button", { class: "main", type: "submit" }, "Send");
    this.halt = el("button", { class: "danger", type: "button", hidden: true, onclick: () => this.stop() }, "Stop");
    this.sendWrong = el("div", { class: "note bad", role: "alert", hidden: true });
    const composer = el("form", { class: "composer card", onsubmit: (event) => { event.preventDefault(); this.send(); } }, this.text, el("div", { class: "row" }, this.sending, this.halt));
    addEventListener("keydown", (event) => { if (event.key === "Escape" && this.visible && this.abort) this.stop(); });
    return [
      el("div", { class: "card stack" },
        el("div", { class: "row spread" }, this.who, el("div", { class: "row" },
          el("button", { type: "button", onclick: () => this.anew() }, "New conversation"),
          el("button", { type: "button", class: "danger", onclick: () => this.unload() }, "Unload"))),
        el("details", {}, el("summary", {}, "Settings"), el("div", { class: "fields" }, ...Object.values(this.settings))),
        el("details", {}, el("summary", {}, "In a terminal"), el("div", { class: "copy" }, this.command, copied(() => this.command.textContent)))),
      this.talk, this.sendWrong, composer];
  }

  show() {
    this.visible = true;
    this.look();
    this.known.look().then((runs) => this.offer(runs)).catch(() => {});
  }

  hide() { this.visible = false; }

  fill({ adapters = [], model = "" }) {
    this.model.value = model;
    put(this.list);
    this.adapters = [];
    for (const folder of adapters.length ? adapters : [""]) this.add(folder);
    this.wanted = adapters;
    this.arrange();
  }

  add(folder) {
    if (folder && this.adapters[0] && !this.adapters.at(-1).value) {
      this.adapters.at(-1).value = folder;
      return this.adapters.at(-1);
    }
    const input = typed(`chat-adapter-${this.adapters.length}`, { value: folder, placeholder: "runs/first", list: "chat-runs" });
    this.adapters.push(input);
    this.list.append(field(this.adapters.length === 1 ? "A run or an adapter" : `Adapter ${this.adapters.length}`, input));
    return input;
  }

  offer(runs) {
    const names = runs.filter(({ state }) => state === "finished").slice(0, 8);
    put(this.picks, ...names.map(({ name, folder }) => el("button", { type: "button", class: "chip", title: folder, onclick: () => this.add(place(folder, this.home)) }, `+ ${name}`)));
  }

  async load() {
    this.wrong.hidden = true;
    const boxes = Object.fromEntries([...this.adapters.map((input, at) => [`adapter-${at}`, input.parentElement]), ["model", this.modelBox]]);
    problems(boxes, {});
    this.button.disabled = true;
    try {
      await post("/api/look/chat", { model: this.model.value, adapters: this.adapters.map(({ value }) => value) });
      this.wanted = null;
      this.forgetTurns();
      await this.look();
    } catch (error) {
      if (error.answer?.problems) problems(boxes, error.answer.problems);
      else this.failed(error);
    } finally {
      this.button.disabled = false;
    }
  }

  failed(error) {
    say(this.wrong, error.message);
    this.wrong.hidden = false;
  }

  async unload() {
    this.stop();
    try {
      await post("/api/look/chat/stop");
    } catch (error) {
      this.failed(error);
    }
    await this.look();
  }

  async look() {
    try {
      this.state = await get("/api/look/chat");
    } catch {
      return; // the banner says it
    }
    this.arrange();
  }

  arrange() {
    const { state, columns = [], command, log } = this.state;
    const there = columns.map(({ folder }) => place(folder, this.home));
    const ready = state === "ready" && (this.wanted ?? []).every((folder) => there.includes(folder));
    this.form.hidden = ready || state === "starting";
    this.room.hidden = !ready;
    this.status.hidden = state !== "starting" && state !== "failed";
    const told = JSON.stringify([state, columns, log]);
    if (told !== this.told) this.tell();
    this.told = told;
    if (!ready) return;
    const stamp = JSON.stringify(columns);
    if (stamp === this.stamp) return;
    this.stamp = stamp;
    put(this.who, ...columns.map(({ name, told, folder }, at) => el("span", { class: "who", title: folder || told }, el("i", { class: `dot dot-${at % 6}` }), el("b", {}, name), el("span", { class: "quiet small" }, at ? told : place(told, this.home)))));
    say(this.command, command);
    this.remembered(stamp);
  }

  // What is loading, or why it could not be; drawn anew only where there is news, or a log that somebody reads would jump.
  tell() {
    const { state, columns = [], command, log } = this.state;
    if (state === "starting") put(this.status, el("div", { class: "row spread" }, el("div", { role: "status" }, el("span", { class: "spin" }), `Loading ${columns.map(({ name }) => name).join(", ")} …`), el("button", { type: "button", onclick: () => this.unload() }, "Stop")), log && el("pre", { class: "log", tabindex: "0" }, log), el("pre", {}, command));
    else if (state === "failed") put(this.status, el("h2", {}, "It could not be loaded"), el("div", { class: "note bad", role: "alert" }, log.trim().split("\n").slice(-12).join("\n") || "It ended without a word."), el("pre", {}, command));
  }

  // A reload finds what was said, as long as the same ones are there.
  remembered(stamp) {
    put(this.talk);
    this.turns = [];
    const { kept } = this;
    this.kept = null;
    if (kept) [this.system.value, this.temperature.value, this.longest.value] = [kept.system, kept.temperature, kept.longest];
    if (kept?.stamp === stamp) for (const { text, answers } of kept.turns) this.turn(text, answers);
    this.keep();
  }

  keep() {
    const turns = this.turns.map(({ text, answers }) => ({ text, answers: answers.map(({ said }) => said) }));
    sessionStorage.setItem(KEPT, JSON.stringify({ stamp: this.stamp, turns, system: this.system.value, temperature: this.temperature.value, longest: this.longest.value }));
  }

  forgetTurns() {
    this.stamp = this.kept = null;
    this.turns = [];
    put(this.talk);
  }

  anew() {
    this.stop();
    this.turns = [];
    put(this.talk);
    this.keep();
    this.text.focus();
  }

  turn(text, before) {
    const answers = this.state.columns.map(({ name }, at) => new Answer(name, at, before?.[at]));
    const turn = { text, answers, element: el("section", { class: "said" }, el("div", { class: "asked" }, text), el("div", { class: "replies" }, ...answers.map(({ element }) => element))) };
    this.turns.push(turn);
    this.talk.append(turn.element);
    return turn;
  }

  // Each has a conversation of its own, of what it said itself.
  messages(column) {
    const system = this.system.value.trim();
    const said = this.turns.flatMap(({ text, answers }, at) => {
      const asked = { role: "user", content: text }, own = answers[column].said.text;
      if (at === this.turns.length - 1) return [asked];
      return own ? [asked, { role: "assistant", content: own }] : [];
    });
    return [...(system ? [{ role: "system", content: system }] : []), ...said];
  }

  async send() {
    const text = this.text.value.trim();
    if (!text || this.abort) return;
    const temperature = Number(this.temperature.value), longest = Number(this.longest.value);
    const wrong = {};
    if (!(temperature >= 0 && temperature <= 2) || !this.temperature.value.trim()) wrong.temperature = "expected a number from 0 to 2";
    if (!(Number.isInteger(longest) && longest > 0)) wrong.max_tokens = "expected a whole number above 0";
    if (Object.keys(wrong).length) this.temperature.closest("details").open = true;
    problems(this.settings, wrong);
    if (Object.keys(wrong).length) return;
    this.sendWrong.hidden = true;
    this.text.value = "";
    const turn = this.turn(text);
    this.abort = new AbortController();
    this.sending.hidden = true;
    this.halt.hidden = false;
    turn.element.scrollIntoView({ block: "end" });
    try {
      const columns = this.state.columns.map(({ name }, at) => ({ name, messages: this.messages(at) }));
      await stream("/api/look/chat/say", { columns, temperature, max_tokens: longest }, this.abort.signal, ({ column, ...piece }) => {
        const follows = document.documentElement.scrollHeight - scrollY - innerHeight < 80;
        turn.answers[column].take(piece);
        if (follows) scrollTo(0, document.documentElement.scrollHeight);
      });
    } catch (error) {
      if (error.name !== "AbortError") {
        say(this.sendWrong, error instanceof TypeError ? "The studio does not answer." : error.message);
        this.sendWrong.hidden = false;
      }
    } finally {
      for (const answer of turn.answers) answer.over();
      for (const answer of turn.answers.slice(1)) answer.compare(turn.answers[0]);
      this.abort = null;
      this.sending.hidden = false;
      this.halt.hidden = true;
      this.keep();
      this.look();
      if (this.visible) turn.element.scrollIntoView({ block: "nearest" });
      if (this.visible) this.text.focus({ preventScroll: true });
    }
  }

  stop() { this.abort?.abort(); }
}

class Answer {
  constructor(name, at, said) {
    this.said = said ?? { text: "", thought: "", note: "", error: "", told: "" };
    this.done = Boolean(said);
    this.thought = el("div", { class: "thought" });
    this.text = el("div", { class: "answer" });
    this.told = el("span", { class: "quiet small" });
    this.error = el("div", { class: "note bad" });
    this.note = el("div", { class: "note warn" });
    this.element = el("article", { class: "reply", "aria-label": name, "aria-busy": String(!this.done) }, el("header", {}, el("i", { class: `dot dot-${at % 6}` }), el("b", {}, name), this.told), this.thought, this.text, this.note, this.error);
    this.draw();
  }

  take({ text = "", thought = "", note, error, end, tokens, seconds }) {
    this.said.text += text;
    this.said.thought += thought;
    if (note) this.said.note = note;
    if (error) [this.said.error, this.done] = [error, true];
    if (end !== undefined) {
      this.done = true;
      this.said.told = [`${figure(tokens)} tokens`, seconds > 0 && tokens > 1 ? `${figure(Math.round(tokens / seconds))}/s` : "", ENDS[end] ?? end].filter(Boolean).join(" · ");
    }
    this.draw();
  }

  over() {
    if (!this.done) this.said.told = "stopped";
    this.done = true;
    this.draw();
  }

  compare(base) {
    if (this.said.text && this.said.text === base.said.text) this.said.told += ` · the same as ${base.element.getAttribute("aria-label")}`;
    this.draw();
  }

  draw() {
    say(this.text, this.said.text || (this.done ? "" : "…"));
    for (const name of ["thought", "note", "error"]) {
      say(this[name], this.said[name]);
      this[name].hidden = !this.said[name];
    }
    say(this.told, this.said.told);
    this.element.setAttribute("aria-busy", String(!this.done));
  }
}
