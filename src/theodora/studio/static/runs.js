// Runs: all that are known, their curves over one another, and one of them in full.
import { get, post } from "./api.js";
import { Chart } from "./chart.js";
import { bytes, copied, el, figure, lastWords, place, put, quoted, say } from "./dom.js";

const EVERY = 1500; // milliseconds between two looks
const COLORS = matchMedia("(prefers-color-scheme: dark)").matches
  ? ["#84b0ee", "#eb9a78", "#9ccb82", "#c6a3ec", "#e6c15f", "#6fcbc3", "#ee8fb6", "#b7b3aa"]
  : ["#2f62a8", "#c4552f", "#4f8a2f", "#7a4fb0", "#a67c00", "#16847b", "#b83c77", "#6f6a61"];
const WORDS = { waiting: "waits", starting: "starting", training: "training", stopping: "stopping", finished: "finished", stopped: "stopped", failed: "failed" };
const BUSY = ["waiting", "starting", "training", "stopping"];

export class RunsScreen {
  constructor(root, { about, atWork, again, look }) {
    Object.assign(this, { home: about.home, atWork, again, lookAt: look, runs: [], cards: new Map(), curves: new Map(), shown: new Map(), open: null, visible: false });
    this.list = el("div", { class: "list", role: "list" });
    this.detail = new Detail(this);
    this.charts = [
      ["loss", new Chart("Loss in training", { show: figure, smooth: true, large: true }), "loss"],
      ["reward", new Chart("Reward", { show: figure, smooth: true, large: true }), "reward"],
      ["eval", new Chart("Held-out loss", { show: figure }), "eval_loss"],
      ["general", new Chart("Loss on general text", { show: figure }), "general_loss"],
      ["speed", new Chart("Tokens a second", { show: figure, floor: 0 }), "tokens_per_second"],
      ["direction", new Chart("Turned: mean angle of the weights' rows, degrees", { show: figure, floor: 0 }), "moved_direction"],
      ["magnitude", new Chart("Lengthened or shortened: mean change of magnitudes", { show: share, floor: 0 }), "moved_magnitude"],
      ["memory", new Chart("Peak memory", { show: bytes, floor: 0 }), "peak_memory"],
    ];
    const folder = el("input", { id: "folder", placeholder: "a run, or a folder of runs", autocomplete: "off", spellcheck: "false", "aria-label": "Folder" });
    this.wrong = el("span", { class: "problem" });
    const name = el("form", { class: "row", onsubmit: (event) => { event.preventDefault(); this.name(folder); } }, folder, el("button", { type: "submit" }, "Show its runs"), this.wrong);
    folder.style.width = "16rem";
    this.board = el("div", { class: "board" }, this.list, el("div", {}, this.detail.element, el("div", { class: "charts" }, ...this.charts.map(([, chart]) => chart.element)), this.detail.texts));
    this.empty = el("div", { class: "card empty", hidden: true }, el("h2", {}, "No run yet"),
      el("p", {}, "A run that is started here, or in a terminal into a folder that is named above, appears by itself."),
      el("div", { class: "row" }, el("a", { class: "button", href: "#data" }, "Look at data"), el("a", { class: "button", href: "#train" }, "Train")));
    put(root, el("div", { class: "head row spread" }, el("h1", {}, "Runs"), name), this.empty, this.board);
    setInterval(() => { if (!document.hidden) this.look(); }, EVERY);
    this.look();
  }

  show(rest) {
    this.visible = true;
    if (rest) {
      this.wanted = rest;
      this.choose(rest);
    }
    this.look();
  }

  hide() { this.visible = false; }

  async name(input) {
    try {
      await post("/api/folders", { path: input.value });
      input.value = "";
      say(this.wrong, "");
      await this.look();
    } catch (error) {
      say(this.wrong, error.message);
    }
  }

  choose(id) {
    if (this.open !== id) {
      if (this.open && this.shown.size === 1) this.shown.clear(); // one was looked at, and now it is another
      this.open = id;
      this.lay(id, true);
      this.detail.changed();
    }
    this.look();
  }

  lay(id, over) {
    if (over && !this.shown.has(id)) {
      const taken = new Set(this.shown.values());
      this.shown.set(id, COLORS.find((color) => !taken.has(color)) ?? COLORS[this.shown.size % COLORS.length]);
    } else if (!over) this.shown.delete(id);
    this.cardsAnew();
    this.draw();
  }

  async look() {
    if (this.looking) return;
    this.looking = true;
    try {
      const { runs } = await get("/api/runs");
      this.runs = runs;
      this.atWork(runs.filter(({ state }) => BUSY.includes(state) && state !== "waiting").length);
      if (!this.visible) return;
      this.empty.hidden = runs.length > 0;
      this.board.hidden = !runs.length;
      if (!runs.some(({ id }) => id === this.open) && runs.length) {
        this.open = null;
        this.choose(runs.some(({ id }) => id === this.wanted) ? this.wanted : runs[0].id);
      }
      this.cardsAnew();
      const ids = new Set(runs.map(({ id }) => id));
      for (const id of this.shown.keys()) if (!ids.has(id)) this.shown.delete(id);
      await Promise.all([...this.shown.keys()].map((id) => this.follow(id)));
      this.draw();
      await this.detail.look();
    } catch { /* the banner says it */
    } finally {
      this.looking = false;
    }
  }

  async follow(id) {
    const curve = this.curves.get(id) ?? { cursor: "", lines: [] };
    this.curves.set(id, curve);
    const run = this.runs.find((each) => each.id === id);
    if (curve.complete === run?.changed && !BUSY.includes(run?.state)) return;
    let found;
    do {
      found = await get(`/api/runs/${id}?cursor=${encodeURIComponent(curve.cursor)}`);
      if (found.anew) Object.assign(curve, { lines: [], paced: false });
      for (const line of found.lines) curve.lines.push(line);
      Object.assign(curve, { cursor: found.cursor, state: found.state });
    } while (found.more);
    // Runs of earlier versions have their pace in the log of the studio alone.
    if (!curve.paced && found.paces.length && !curve.lines.some((line) => "peak_memory" in line)) {
      curve.lines.push(...found.paces.map(({ step, tokens_per_second, memory }) => ({ step, tokens_per_second, ...(memory ? { peak_memory: memory } : {}) })));
      curve.paced = true;
    }
    curve.complete = found.state.changed;
  }

  draw() {
    for (const [kind, chart, key] of this.charts)
      chart.set([...this.shown].map(([id, color]) => {
        const curve = this.curves.get(id);
        const lines = curve ? curve.lines : [];
        const byStep = new Map(lines.filter((line) => typeof line[key] === "number").map((line) => [line.step, line[key]]));
        // The loss of what learns from rewards is no figure to look at.
        const hidden = (kind === "loss" || kind === "eval") && lines.some((line) => typeof line.reward === "number");
        return { color, points: hidden ? [] : [...byStep].sort(([a], [b]) => a - b), dots: ["eval", "general", "direction", "magnitude"].includes(kind) };
      }));
  }

  cardsAnew() {
    const cards = this.runs.map((run) => {
      let card = this.cards.get(run.id);
      if (!card) this.cards.set(run.id, (card = new Card(run, this)));
      card.tell(run, this.open === run.id, this.shown.get(run.id));
      return card.element;
    });
    if (cards.length !== this.list.children.length || cards.some((card, index) => this.list.children[index] !== card)) put(this.list, ...cards);
  }
}

const share = (value) => `${(100 * value).toPrecision(2)} %`;

class Card {
  constructor(run, screen) {
    this.swatch = el("input", { type: "checkbox", class: "swatch", "aria-label": `Lay the curves of ${run.name} over the others`, onclick: (event) => event.stopPropagation() });
    this.swatch.addEventListener("change", () => screen.lay(run.id, this.swatch.checked) ?? screen.look());
    this.name = el("button", { type: "button", class: "name" });
    this.badge = el("span", { class: "badge" });
    this.progress = el("progress", { max: 1 });
    this.about = el("div", { class: "about" });
    this.element = el("div", { class: "run", role: "listitem", onclick: () => { location.hash = `runs/${run.id}`; } }, this.swatch, this.name, this.badge, this.progress, this.about);
  }

  tell(run, chosen, color) {
    say(this.name, run.name);
    this.element.title = run.folder;
    say(this.badge, WORDS[run.state] ?? run.state);
    this.badge.className = `badge ${run.state}`;
    this.element.classList.toggle("chosen", chosen);
    this.swatch.checked = Boolean(color);
    this.swatch.style.setProperty("--swatch", color ?? "");
    const known = run.steps && run.step !== null;
    this.progress.hidden = !known || run.state === "finished";
    if (known) this.progress.value = Math.min(1, run.step / run.steps);
    const step = known && run.state !== "finished" ? `${figure(run.step)} / ${figure(run.steps)}` : run.step === null ? "" : `${figure(run.step)} steps`;
    say(this.about, [step, run.reward !== null ? `reward ${figure(run.reward)}` : run.loss !== null ? `loss ${figure(run.loss)}` : "", run.left ? `${run.left} left` : "", run.method].filter(Boolean).join(" · "));
  }
}

// One run: its figures and buttons above the curves, its texts below.
class Detail {
  constructor(screen) {
    this.screen = screen;
    this.title = el("h2", {});
    this.badge = el("span", { class: "badge" });
    this.folder = el("div", { class: "quiet mono" });
    this.buttons = el("div", { class: "row" });
    this.figures = el("div", { class: "figures" });
    this.wrong = el("div", { class: "note bad", role: "alert", hidden: true });
    this.why = el("div", { class: "note bad", role: "alert", hidden: true });
    this.progress = el("progress", { max: 1, hidden: true });
    this.stop = el("button", { type: "button", class: "danger", onclick: () => this.act("stop") }, "Stop");
    this.resume = el("button", { type: "button", class: "main", onclick: () => this.act("resume") }, "Resume");
    this.again = el("button", { type: "button", onclick: () => this.copy() }, "Another like it");
    this.answers = el("button", { type: "button", onclick: () => this.screen.lookAt("answers", { model: place(this.run.folder, this.screen.home), data: this.typed.eval_data ?? "" }) }, "Before and after");
    this.chat = el("button", { type: "button", onclick: () => this.screen.lookAt("chat", { adapters: [place(this.run.folder, this.screen.home)] }) }, "Chat");
    this.change = el("button", { type: "button", onclick: () => this.screen.lookAt("change", { runs: [place(this.run.folder, this.screen.home)] }) }, "What changed");
    this.make = el("button", { type: "button", onclick: () => this.screen.lookAt("make", { adapter: place(this.run.folder, this.screen.home) }) }, "Make");
    put(this.buttons, this.answers, this.chat, this.change, this.make, this.stop, this.resume, this.again);
    this.element = el("div", { class: "card stack" }, el("div", { class: "row spread" }, el("div", {}, el("div", { class: "row" }, this.title, this.badge), this.folder), this.buttons), this.progress, this.figures, this.wrong, this.why);
    this.log = el("pre", { class: "log", tabindex: "0" });
    this.results = el("div", {});
    this.config = el("pre", { class: "log", tabindex: "0" });
    this.command = el("pre", {});
    const config = el("details", { class: "card" }, el("summary", {}, "Configuration"), el("div", { class: "copy" }, this.config, copied(() => this.config.textContent)));
    this.logCard = el("div", { class: "card stack" }, el("h2", {}, "Log"), this.log);
    this.texts = el("div", { class: "stack" }, this.results, this.logCard, config,
      el("div", { class: "card stack" }, el("h2", {}, "In a terminal"), el("div", { class: "copy" }, this.command, copied(() => this.command.textContent))));
    this.texts.style.marginTop = "1.1rem";
  }

  get run() { return this.screen.runs.find(({ id }) => id === this.screen.open); }

  changed() {
    this.seen = null;
    this.typed = {};
    this.wrong.hidden = this.why.hidden = true;
    for (const each of [this.log, this.config, this.command]) say(each, "");
    put(this.results);
  }

  async act(what) {
    this.wrong.hidden = true;
    try {
      await post(`/api/runs/${this.screen.open}/${what}`);
      await this.screen.look();
    } catch (error) {
      say(this.wrong, error.message);
      this.wrong.hidden = false;
    }
  }

  copy() {
    const values = { ...this.typed };
    delete values.overwrite;
    values.output = next(this.run.folder, this.screen.runs.map(({ folder }) => folder));
    this.screen.again(values);
  }

  async look() {
    const { run } = this;
    if (!run) return;
    say(this.title, run.name);
    say(this.folder, place(run.folder, this.screen.home));
    say(this.badge, WORDS[run.state] ?? run.state);
    this.badge.className = `badge ${run.state}`;
    this.stop.hidden = !run.can_stop;
    this.stop.disabled = run.state === "stopping";
    say(this.stop, run.state === "waiting" ? "Take it out of the queue" : "Stop");
    this.resume.hidden = !run.can_resume;
    for (const each of [this.answers, this.chat, this.change, this.make]) each.hidden = run.state !== "finished";
    say(this.resume, run.step === null ? "Start again" : "Resume");
    const known = run.steps && run.step !== null && BUSY.includes(run.state);
    this.progress.hidden = !known;
    if (known) this.progress.value = Math.min(1, run.step / run.steps);
    this.tell(run, this.screen.curves.get(run.id));
    const texts = BUSY.includes(run.state) || this.seen !== `${run.id} ${run.changed} ${run.state}` ? await get(`/api/runs/${run.id}/texts`) : null;
    if (!texts || this.run?.id !== run.id) return;
    this.seen = `${run.id} ${run.changed} ${run.state}`;
    const atEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 30;
    say(this.log, texts.log);
    if (atEnd) this.log.scrollTop = this.log.scrollHeight;
    this.logCard.hidden = !texts.log;
    say(this.config, texts.config);
    this.typed = texts.typed;
    say(this.command, commands(run, texts.command));
    put(this.results, ...card(texts.card));
    say(this.why, run.state === "failed" ? lastWords(texts.log) : "");
    this.why.hidden = !this.why.textContent;
  }

  tell(run, curve) {
    const last = (key) => curve?.lines.findLast((line) => typeof line[key] === "number")?.[key];
    const rewarded = run.reward !== null;
    const facts = [
      [run.step === null ? null : run.steps ? `${figure(run.step)} / ${figure(run.steps)}` : figure(run.step), "steps"],
      rewarded ? [run.reward, "reward"] : [run.loss, "loss"],
      [rewarded ? undefined : last("eval_loss"), "held-out loss"], [last("general_loss"), "loss on general text"],
      [last("tokens_per_second"), "tokens/s"], [last("peak_memory"), "peak memory"], [run.left, "left"],
    ].filter(([value]) => value !== null && value !== undefined);
    put(this.figures, ...facts.map(([value, told]) => el("div", { class: "figure" }, el("b", {}, typeof value === "number" ? (told === "peak memory" ? bytes(value) : figure(value)) : value), el("span", {}, told))));
    this.figures.hidden = !facts.length;
  }
}

function next(folder, taken) {
  const stem = folder.replace(/-\d+$/, "");
  let number = 2;
  while (taken.includes(`${stem}-${number}`)) number++;
  return `${stem}-${number}`;
}

function commands(run, again) {
  const folder = quoted(run.folder);
  if (run.state === "finished") return `theodora chat ${folder}\ntheodora info ${folder}\ntheodora merge ${folder} --output ${quoted(`${run.folder}-merged`)}`;
  return again;
}

// The card's results: tables of Markdown, as text in cells.
function card(text) {
  const part = text.split(/^## /m).find((each) => each.startsWith("Results"));
  if (!part) return [];
  const tables = [];
  let rows = null;
  for (const line of part.split("\n")) {
    if (!line.startsWith("|")) rows = null;
    else if (!/^[|:\s-]+$/.test(line) || !rows) {
      const cells = line.replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replace(/\\(.)/g, "$1"));
      if (!rows) tables.push((rows = []));
      rows.push(cells);
    }
  }
  const numeric = (cell) => /^-?[\d.,]+%?$/.test(cell);
  return [el("div", { class: "card stack" }, el("h2", {}, "Results"), ...tables.map(([head, ...body]) =>
    el("table", {}, el("thead", {}, el("tr", {}, ...head.map((cell, at) => el("th", { class: body.length && body.every((row) => !row[at] || numeric(row[at])) && at ? "number" : undefined }, cell)))),
      el("tbody", {}, ...body.map((row) => el("tr", {}, ...row.map((cell, at) => el("td", { class: at && numeric(cell) ? "number" : undefined }, cell))))))))];
}
