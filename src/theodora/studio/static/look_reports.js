// Comparisons of methods: `theodora compare`'s report, as text, tables and pictures; none of its markup comes here.
import { get } from "./api.js";
import { el, place, put } from "./dom.js";
import { grid } from "./look_parts.js";

export class ReportsTab {
  constructor(root, { about }) {
    this.home = about.home;
    this.list = el("div", { class: "row look-earlier", role: "group", "aria-label": "Reports" });
    this.result = el("div", { class: "look-result" });
    put(root, el("p", { class: "quiet look-told" }, "What theodora compare found out about methods on your data. Reports of folders that are named on the screen Runs appear here."), this.list, this.result);
  }

  async show(id) {
    this.wanted = id;
    try {
      const { reports } = await get("/api/look/reports");
      const open = reports.some((each) => each.id === id) ? id : reports[0]?.id;
      put(this.list, ...reports.slice(0, 30).map((each) => el("button", { type: "button", class: "chip", title: each.folder, "aria-pressed": String(each.id === open), onclick: () => { location.hash = `look/reports/${each.id}`; } }, each.name)));
      if (!open) return put(this.result, el("div", { class: "card empty" }, el("h2", {}, "No report yet"), el("p", {}, "Write a comparison in YAML, and run it in a terminal:"), el("pre", {}, "theodora compare comparison.yaml --output runs/comparison")));
      const stamp = `${open} ${reports.find((each) => each.id === open).changed}`;
      if (stamp === this.stamp) return;
      const found = await get(`/api/look/reports/${open}`);
      if (this.wanted !== id) return; // another one was asked for meanwhile
      this.tell(open, found);
      this.stamp = stamp;
    } catch (error) {
      this.stamp = null;
      put(this.result, el("div", { class: "note bad", role: "alert" }, error.message));
    }
  }

  tell(id, { folder, blocks }) {
    const cards = [];
    let card = null, figures = null, list = null;
    const begin = () => { cards.push((card = el("div", { class: "card stack report" }))); figures = list = null; };
    for (const block of blocks) {
      if (!card || block.kind === "h2") begin();
      if (block.kind !== "figure" && block.kind !== "figcaption") figures = null;
      if (block.kind !== "li") list = null;
      if (block.kind === "h1" || block.kind === "h2") card.append(el("h2", {}, block.text));
      else if (block.kind === "table") card.append(grid(block.head, block.rows));
      else if (block.kind === "figure" || block.kind === "figcaption") {
        if (!figures) card.append((figures = el("div", { class: "drawn-grid" })));
        // A caption and its picture, whichever comes first.
        const image = block.kind === "figure", last = figures.lastElementChild;
        const own = last && !last.querySelector(image ? "img" : "figcaption") ? last : el("figure", { class: "drawn" });
        own.append(image ? el("img", { src: `/api/look/reports/${id}/figure/${block.number}`, alt: "Figure of the report", loading: "lazy" }) : el("figcaption", {}, block.text));
        figures.append(own);
      } else if (block.kind === "li") {
        if (!list) card.append((list = el("ul", {})));
        list.append(el("li", {}, block.text));
      } else if (block.kind === "note") card.append(el("div", { class: "note warn" }, block.text));
      else if (["h3", "h4", "summary"].includes(block.kind)) card.append(el("h3", {}, block.text));
      else if (block.kind === "pre") card.append(el("pre", {}, block.text));
      else card.append(el("p", { class: "quiet" }, block.text));
    }
    put(this.result, el("div", { class: "quiet mono small look-told" }, place(folder, this.home)), ...cards);
  }
}
