// Run in the page by test_browser.py: what a person would see there, and the WebSocket's protocol by the browser's own hand.

/** All that the Tab key leads to, in the order of the document. */
function focusable() {
  return [...document.querySelectorAll("a[href], button, input, select, textarea, summary, [tabindex='0']")].filter(
    (e) => !e.disabled && e.checkVisibility({ visibilityProperty: true }) && (e.getClientRects().length || e.matches(".skip")),
  );
}

/** Is it seen that the focus is there? */
function seen(e) {
  const style = getComputedStyle(e);
  if (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1) return true;
  return e.id === "prompt" && getComputedStyle(e.closest(".box")).boxShadow !== "none";
}

/** [red, green, blue, alpha] of any colour, by painting it. */
function painted(colour) {
  const context = (painted.canvas ??= Object.assign(document.createElement("canvas"), { width: 1, height: 1 })).getContext("2d", { willReadFrequently: true });
  context.clearRect(0, 0, 1, 1);
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
  return [r, g, b, a / 255];
}

const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);

function ground(e) {
  const layers = [];
  for (let at = e; at; at = at.parentElement) {
    const colour = painted(getComputedStyle(at).backgroundColor);
    layers.push(colour);
    if (colour[3] === 1) break;
  }
  return layers.reduceRight((below, top) => over(top, below), [255, 255, 255, 1]);
}

/** WCAG 2.2: the contrast ratio of two colours. */
function contrast(one, other) {
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const [a, b] = [light(one), light(other)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}

/** Text below 4.5 : 1 (3 : 1 where it is large), placeholders too, and edges of fields below 3 : 1. */
function faint() {
  const found = [];
  const judge = (e, colour, least, what) => {
    const below = ground(e);
    const ratio = contrast(over(painted(colour), below), below);
    if (ratio < least) found.push(`${what} ${e.localName}#${e.id}.${e.className}: ${ratio.toFixed(2)}`);
  };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let texts = 0;
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !e.checkVisibility() || e.closest(".away, noscript, option, :disabled")) continue;
    const style = getComputedStyle(e);
    const size = parseFloat(style.fontSize);
    judge(e, style.color, size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5, "text");
    texts++;
  }
  for (const e of document.querySelectorAll("input:not([type=checkbox]), select, textarea")) {
    if (!e.checkVisibility()) continue;
    judge(e, getComputedStyle(e).color, 4.5, "value");
    if (e.placeholder) judge(e, getComputedStyle(e, "::placeholder").color, 4.5, "placeholder");
    const box = e.id === "prompt" ? e.closest(".box") : e;
    judge(box.parentElement, getComputedStyle(box).borderTopColor, 3, "edge");
  }
  if (texts < 80) found.push(`only ${texts} texts were looked at`);
  return found;
}

/** start, attach after a close, pause, resume, stop, cancel and a wrong word, each over the browser's WebSocket. */
async function protocol(long) {
  const url = new URL("v1/stream", document.baseURI);
  url.protocol = "ws:";
  function open() {
    const ws = new WebSocket(url, ["penstock.v1"]);
    const came = [];
    const waiting = new Set();
    ws.onmessage = (event) => {
      came.push(JSON.parse(event.data));
      for (const look of waiting) look();
    };
    const say = (message) => ws.send(JSON.stringify(message));
    const until = (found) =>
      new Promise((resolve) => {
        const look = () => {
          const one = came.find(found);
          if (one) waiting.delete(look), resolve(one);
        };
        waiting.add(look);
        look();
      });
    return new Promise((resolve, reject) => {
      ws.onopen = () => resolve({ ws, came, say, until });
      ws.onerror = () => reject(new Error("no WebSocket"));
    });
  }
  const ask = (content, more = {}) => ({ messages: [{ role: "user", content }], temperature: 0, stream: true, ...more });
  const path = "/v1/chat/completions";
  const kept = `kept-${Math.random().toString(36).slice(2)}`;

  const one = await open();
  const headers = { "x-request-id": kept, "x-penstock-retain": "30", "x-penstock-on-disconnect": "continue" };
  one.say({ op: "start", id: "a", path, body: ask("Count from 3 to 90."), headers });
  await one.until((m) => m.id === "a" && m.seq === 5);
  const closed = new Promise((resolve) => (one.ws.onclose = resolve));
  one.ws.close();
  await closed; // what still came before is part of what this side has
  const had = one.came.filter((m) => m.data);

  const two = await open();
  two.say({ op: "attach", id: "b", stream: kept, after: had.at(-1).seq });
  await two.until((m) => m.id === "b" && m.done);
  const all = [...had, ...two.came.filter((m) => m.id === "b" && m.data)];

  const body = ask("Numbers.", { max_tokens: 3000, response_format: { type: "json_schema", json_schema: { name: "n", schema: long } } });
  const acks = [];
  two.say({ op: "start", id: "c", path, body });
  await two.until((m) => m.id === "c" && m.seq === 3);
  for (const op of ["pause", "resume", "stop"]) {
    two.say({ op, id: "c" });
    const ack = await two.until((m) => m.id === "c" && ((m.op === op && m.ok) || m.done)); // nothing is said of one that ends meanwhile
    acks.push(ack.op ?? (ack.done && op === "stop" && op));
  }
  await two.until((m) => m.id === "c" && m.done);
  const stopped = two.came.filter((m) => m.id === "c" && m.data).at(-1).data.choices[0].finish_reason;
  two.say({ op: "start", id: "d", path, body });
  await two.until((m) => m.id === "d" && m.seq === 3);
  two.say({ op: "cancel", id: "d" });
  const cancelled = await two.until((m) => m.id === "d" && m.error && !m.op);
  two.say({ op: "pause", id: "d" });
  const wrong = await two.until((m) => m.id === "d" && m.op === "pause");
  two.ws.close();
  return {
    protocol: two.ws.protocol,
    seqs: all.map((m) => m.seq),
    first: had.length,
    text: all.map((m) => m.data.choices[0]?.delta.content ?? "").join(""),
    acks,
    stopped,
    cancelled,
    wrong,
  };
}
