// Questions to the studio's server. What goes wrong is an Error whose message is for people.

class Refused extends Error {
  constructor(message, answer) {
    super(message);
    this.answer = answer;
  }
}

const banner = document.getElementById("banner");

function tell(text) {
  banner.textContent = text;
  banner.hidden = !text;
}

async function asked(path, options) {
  let reply;
  try {
    reply = await fetch(path, options);
  } catch {
    tell("The studio does not answer. Runs go on without it; start it again with `theodora studio`, and open its new address.");
    throw new Refused("The studio does not answer.");
  }
  const answer = await reply.json().catch(() => ({}));
  if (reply.status === 403) tell(`${answer.error ?? "Refused."} Was the studio started again? Its address is a new one each time.`);
  else tell("");
  if (!reply.ok) throw new Refused(answer.error ?? `The studio answered ${reply.status}.`, answer);
  return answer;
}

// An answer of lines of JSON, each told as it comes; until its end, or until `signal` ends it.
export async function stream(path, body, signal, told) {
  const reply = await fetch(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal });
  if (!reply.ok) throw new Refused((await reply.json().catch(() => ({}))).error ?? `The studio answered ${reply.status}.`);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) told(JSON.parse(line));
  }
}

export const get = (path) => asked(path);

export const post = (path, body = {}) =>
  asked(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });

export const upload = (file) =>
  asked(`/api/upload?name=${encodeURIComponent(file.name)}`, {
    method: "POST",
    headers: { "content-type": "application/octet-stream" },
    body: file,
  });
