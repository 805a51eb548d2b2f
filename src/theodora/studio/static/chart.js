// Curves, drawn by hand: several runs over one another, with a cross that reads their values off.
import { bytes, el, put, say, svg } from "./dom.js";

const LEFT = 52, RIGHT = 18, TOP = 8, BOTTOM = 24;
const MOST_POINTS = 1200;

export class Chart {
  constructor(title, { show, smooth = false, large = false, floor = null }) {
    Object.assign(this, { show, smooth, floor, series: [], at: null });
    this.read = el("div", { class: "read" });
    this.drawing = svg("svg", { role: "img", "aria-label": title });
    this.element = el("figure", { class: large ? "chart large" : "chart", style: undefined }, el("header", {}, el("h3", {}, title), this.read), this.drawing);
    this.element.style.margin = "0";
    this.height = large ? 270 : 170;
    new ResizeObserver(() => this.draw()).observe(this.element);
    this.drawing.addEventListener("pointermove", (event) => this.point(event));
    this.drawing.addEventListener("pointerleave", () => this.leave());
  }

  // series: [{ name, color, points: [[step, value]], dots }]
  set(series) {
    this.series = series.filter((each) => each.points.length);
    this.element.hidden = !this.series.length;
    this.draw();
  }

  draw() {
    const width = this.drawing.clientWidth;
    if (!width || !this.series.length) return;
    this.drawing.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
    this.drawing.setAttribute("height", this.height);
    const steps = this.series.flatMap(({ points }) => [points[0][0], points[points.length - 1][0]]);
    const values = this.series.flatMap(({ points }) => points.map(([, value]) => value)).sort((a, b) => a - b);
    // A spike at the beginning must not press the rest flat: the highest two in a hundred may leave the frame.
    let low = values[0], high = values.length > 60 ? values[Math.floor(values.length * 0.985)] : values[values.length - 1];
    if (this.floor !== null) low = Math.min(this.floor, low);
    if (high - low < 1e-9) [low, high] = [low - Math.abs(low || 1) * 0.05, high + Math.abs(high || 1) * 0.05];
    const room = (high - low) * 0.06;
    if (this.floor === null) low -= room;
    high += room;
    const [first, last] = [Math.min(...steps), Math.max(...steps)];
    this.x = (step) => LEFT + ((step - first) / (last - first || 1)) * (width - LEFT - RIGHT);
    this.y = (value) => TOP + (1 - (Math.min(value, high) - low) / (high - low)) * (this.height - TOP - BOTTOM);
    this.step = (x) => first + ((x - LEFT) / (width - LEFT - RIGHT)) * (last - first);
    const parts = [];
    for (const value of ticks(low, high, 4)) {
      const y = this.y(value);
      parts.push(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y, y2: y }));
      const label = svg("text", { x: LEFT - 8, y: y + 4, "text-anchor": "end" });
      label.textContent = this.label(value);
      parts.push(label);
    }
    for (const value of ticks(first, last, Math.max(2, Math.floor(width / 110))).filter(Number.isInteger)) {
      const label = svg("text", { x: this.x(value), y: this.height - 6, "text-anchor": "middle" });
      label.textContent = value.toLocaleString("en");
      parts.push(label);
    }
    for (const { points, color, dots } of this.series) {
      const few = thinned(points);
      const faint = this.smooth && points.length > 8;
      parts.push(this.path(few, color, faint ? { "stroke-width": 1, opacity: 0.28 } : { "stroke-width": 2 }));
      if (faint) parts.push(this.path(thinned(smoothed(points)), color, { "stroke-width": 2.2 }));
      if ((dots && points.length < 60) || points.length === 1)
        for (const [step, value] of points) parts.push(svg("circle", { cx: this.x(step), cy: this.y(value), r: 2.8, fill: color }));
    }
    this.cross = svg("g");
    put(this.drawing, ...parts, this.cross);
    if (this.at === null) this.leave();
    else this.mark();
  }

  label(value) {
    return this.show === bytes ? bytes(value) : Math.abs(value) >= 1e6 || (value && Math.abs(value) < 1e-3) ? value.toExponential(0) : value.toLocaleString("en", { maximumFractionDigits: 4 });
  }

  path(points, color, more) {
    const d = points.map(([step, value], index) => `${index ? "L" : "M"}${this.x(step).toFixed(1)} ${this.y(value).toFixed(1)}`).join("");
    return svg("path", { d, stroke: color, ...more });
  }

  point(event) {
    const box = this.drawing.getBoundingClientRect();
    this.at = this.step(event.clientX - box.left);
    this.mark();
  }

  mark() {
    const all = this.series.map((each) => ({ ...each, near: nearest(each.points, this.at) }));
    const closest = all.reduce((a, b) => (Math.abs(b.near[0] - this.at) < Math.abs(a.near[0] - this.at) ? b : a));
    const step = closest.near[0];
    // A run that ended long before has nothing to say here.
    const found = all.filter(({ points, near }) => near[0] === step || (points[0][0] <= step && points[points.length - 1][0] >= step));
    const parts = [svg("line", { class: "cross", x1: this.x(step), x2: this.x(step), y1: TOP, y2: this.height - BOTTOM })];
    for (const { near, color } of found) parts.push(svg("circle", { cx: this.x(near[0]), cy: this.y(near[1]), r: 3.5, fill: color }));
    put(this.cross, ...parts);
    put(this.read, `step ${step.toLocaleString("en")}  `, ...found.flatMap(({ near, color }) => [value(this.show(near[1]), color), " "]));
  }

  leave() {
    this.at = null;
    if (this.cross) put(this.cross);
    put(this.read, ...this.series.flatMap(({ points, color }) => [value(this.show(points[points.length - 1][1]), color), " "]));
  }
}

function value(text, color) {
  const element = el("b");
  element.style.color = color;
  say(element, text);
  return element;
}

function nearest(points, step) {
  let [low, high] = [0, points.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle;
    else high = middle;
  }
  return Math.abs(points[low][0] - step) < Math.abs(points[high][0] - step) ? points[low] : points[high];
}

// The mean of two exponential means, one from either end: smooth, and not behind the curve where it is steep.
function smoothed(points) {
  const there = mean(points), back = mean([...points].reverse()).reverse();
  return points.map(([step], at) => [step, (there[at] + back[at]) / 2]);
}

function mean(points) {
  let [value, weight] = [0, 0];
  const share = 1 / Math.min(50, Math.max(2, points.length / 20)); // over a twentieth of the curve, about
  return points.map(([, each]) => {
    weight = (1 - share) * weight + share; // corrected as in Adam, so that the first one is itself
    return (value += ((each - value) * share) / weight);
  });
}

// Of many points the lowest and the highest of each stretch, so that no spike is lost.
function thinned(points) {
  if (points.length <= MOST_POINTS) return points;
  const size = Math.ceil((2 * points.length) / MOST_POINTS);
  const kept = [];
  for (let start = 0; start < points.length; start += size) {
    const part = points.slice(start, start + size);
    const low = part.reduce((a, b) => (b[1] < a[1] ? b : a));
    const high = part.reduce((a, b) => (b[1] > a[1] ? b : a));
    kept.push(...(low[0] <= high[0] ? [low, high] : [high, low]));
  }
  return kept;
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(Number(value.toPrecision(12)));
  return found;
}

export function bars(counts, label) {
  const [width, height] = [counts.length * 12, 56];
  const most = Math.max(...counts, 1);
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", class: "bars", role: "img", "aria-label": label, width: "100%", height });
  counts.forEach((count, index) => {
    const size = count ? Math.max(2, (count / most) * height) : 0;
    drawing.append(svg("rect", { x: index * 12 + 1, y: height - size, width: 10, height: size, rx: 1.5 }));
  });
  return drawing;
}
