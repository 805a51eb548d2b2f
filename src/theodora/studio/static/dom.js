// Elements without markup: whatever comes from a file, a model or a log becomes text, by way of textContent alone.

export function el(name, given = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(given)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "class") element.className = value;
    else if (key in element && typeof value !== "string") element[key] = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

export function svg(name, given = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(given)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

export const put = (element, ...children) => element.replaceChildren(...children.filter((child) => child));

export const say = (element, text) => {
  if (element.textContent !== text) element.textContent = text; // selections and focus stay where nothing changes
};

const NUMBERS = new Intl.NumberFormat("en");

export function figure(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value)) return NUMBERS.format(value);
  const size = Math.abs(value);
  return size >= 1000 ? NUMBERS.format(Math.round(value)) : size >= 0.01 ? value.toFixed(size >= 100 ? 1 : 4) : value.toExponential(1);
}

export function bytes(value) {
  return value >= 1e9 ? `${(value / 1e9).toFixed(1)} GB` : `${Math.round(value / 1e6)} MB`;
}

// As a shell takes it for one word.
export const quoted = (text) => (/^[\w./:@%+=,~-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

// A command's own message stands at the end of its log, after a blank line or the last line of progress.
export function lastWords(log) {
  const lines = log.trimEnd().split("\n");
  const start = lines.findLastIndex((line) => /^(step \d+\/|╰|(base|model): .* \d+\/\d+$|\s*$)/.test(line));
  return lines.slice(start + 1).slice(-12).join("\n");
}

export const place = (path, home) => (home.length > 1 && path.startsWith(`${home}/`) ? `~${path.slice(home.length)}` : path);

export function copied(text) {
  const button = el("button", { class: "plain", type: "button" }, "Copy");
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text());
    say(button, "Copied");
    setTimeout(() => say(button, "Copy"), 1500);
  });
  return button;
}

export function later(work, milliseconds) {
  let timer;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...given), milliseconds);
  };
}
