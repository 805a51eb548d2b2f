// The frame: which screen is shown, and what all of them know.
import { get } from "./api.js";
import { place, say } from "./dom.js";
import { DataScreen } from "./data.js";
import { TrainScreen } from "./train.js";
import { RunsScreen } from "./runs.js";
import { LookScreen } from "./look.js";

const about = await get("/api/studio");
say(document.getElementById("where"), place(about.working, about.home));
document.getElementById("where").title = `version ${about.version}, working in ${about.working}`;

const go = (to) => { location.hash = to; };
const atWork = (count) => {
  const badge = document.getElementById("at-work");
  badge.hidden = !count;
  say(badge, String(count));
};
const screens = {
  data: new DataScreen(document.getElementById("data-screen"), { about, train: (values) => { screens.train.fill(values); go("train"); } }),
  train: new TrainScreen(document.getElementById("train-screen"), { about, started: (id) => go(`runs/${id}`), look: (values) => { screens.data.fill(values); go("data"); } }),
  runs: new RunsScreen(document.getElementById("runs-screen"), { about, atWork, again: (values) => { screens.train.fill(values, true); go("train"); }, look: (tab, values) => { screens.look.fill(tab, values); go(`look/${tab}`); } }),
  look: new LookScreen(document.getElementById("look-screen"), { about }),
};

let before;

function show(focuses) {
  const [name, ...rest] = location.hash.slice(1).split("/");
  const chosen = name in screens ? name : "runs";
  for (const [each, screen] of Object.entries(screens)) {
    const shown = each === chosen;
    document.getElementById(`${each}-screen`).hidden = !shown;
    const tab = document.querySelector(`[data-screen=${each}]`);
    if (shown) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
    if (shown) screen.show(rest.join("/"));
    else screen.hide?.();
  }
  if (chosen !== before) scrollTo(0, 0);
  before = chosen;
  document.title = `${chosen[0].toUpperCase()}${chosen.slice(1)} · Theodora studio`;
  if (focuses) document.getElementById("main").focus({ preventScroll: true });
}

addEventListener("hashchange", () => show(true));
// g then d, t, r, l, as in other tools of this kind; not while somebody types.
let waiting = 0;
addEventListener("keydown", (event) => {
  if (event.target.closest("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const to = { d: "data", t: "train", r: "runs", l: "look" }[event.key];
  if (event.key === "g") waiting = Date.now();
  else if (to && Date.now() - waiting < 1000) go(to);
});
show(false);
document.body.dataset.ready = "yes";
