// The server's figures, once a second while somebody looks: /metrics, read for a handful of names.

import { $, h, svg } from "./dom.js";
import { call, Failure } from "./wire.js";

const EVERY_MS = 1000;
const LONGEST_MS = 5000;
const KEPT = 60;

/** Prometheus text -> a function: the sum of what is called `name`, of all label sets or of those that hold `label` (state="used"). */
export function parse(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const match = line.startsWith("penstock_") && /^(\w+)(?:\{(.*)\})? ([^ ]+)/.exec(line);
    if (match) found.push({ name: match[1], labels: match[2] ?? "", value: Number(match[3]) });
  }
  return (name, label = "") => found.reduce((sum, one) => (one.name === name && one.labels.includes(label) ? sum + one.value : sum), 0);
}

class Gauge {
  constructor(name, kinds = []) {
    this.past = [];
    this.value = h("b", {}, "–");
    this.more = h("span", { class: "more" }, "");
    this.bars = kinds.map((kind) => svg("rect", { class: `bar-${kind}`, y: 0, height: 6, width: 0 }));
    this.line = svg("polyline", { points: "" });
    this.area = svg("polygon", { points: "" });
    const drawing = kinds.length
      ? svg("svg", { class: "meter", viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" }, svg("rect", { class: "bar-rest", width: 100, height: 6 }), ...this.bars)
      : null;
    const spark = svg("svg", { class: "spark", viewBox: `0 0 ${KEPT - 1} 20`, preserveAspectRatio: "none", "aria-hidden": "true" }, svg("polyline", { class: "base", points: `0,19 ${KEPT - 1},19` }), this.area, this.line);
    this.element = h("div", { class: "gauge" }, h("p", {}, h("span", {}, name), this.value), spark, drawing, this.more);
  }

  /** `shares`: of the meter, 0 to 1 each; `top`: the sparkline's scale is at least so much. */
  show(number, text, more = "", shares = [], top = 1) {
    this.past = [...this.past, number].slice(-KEPT);
    this.value.textContent = text;
    this.more.textContent = more;
    let at = 0;
    shares.forEach((share, index) => {
      this.bars[index].setAttribute("x", 100 * at);
      this.bars[index].setAttribute("width", 100 * share);
      at += share;
    });
    const most = Math.max(top, ...this.past);
    const from = KEPT - this.past.length;
    const points = this.past.map((one, index) => `${from + index},${(19 - (18 * one) / most).toFixed(2)}`).join(" ");
    this.line.setAttribute("points", points);
    this.area.setAttribute("points", `${from},19 ${points} ${KEPT - 1},19`);
  }

  blank() {
    this.value.textContent = "–";
    this.more.textContent = "";
  }
}

const whole = (number) => Math.round(number).toLocaleString("en");

/** Look at the server until the page is closed. `key()` is the key to ask with; `onState(state, words)`: ready, busy, locked or dead. */
export function watch(key, onState) {
  const gauges = {
    tokens: new Gauge("Tokens a second"),
    running: new Gauge("Running"),
    waiting: new Gauge("Waiting"),
    kv: new Gauge("KV cache", ["used", "cached"]),
  };
  $("gauges").append(...Object.values(gauges).map((gauge) => gauge.element));
  let seats = 0;
  let before = null;
  let timer = 0;
  let again = 0;
  let rounds = 0;

  function show(read, now) {
    const total = read("penstock_kv_blocks", 'state="total"');
    const used = read("penstock_kv_blocks", 'state="used"');
    const cached = read("penstock_kv_blocks", 'state="cached"');
    const running = read("penstock_sequences", 'state="running"');
    const parked = read("penstock_sequences", 'state="parked"');
    const waiting = read("penstock_pending_requests");
    const made = read("penstock_tokens_total", 'source="generated"');
    const prompts = read("penstock_tokens_total", 'source="prompt_computed"');
    const kept = read("penstock_tokens_total", 'source="prompt_cached"');
    if (before && made >= before.made) {
      const seconds = (now - before.now) / 1000;
      const speed = (made - before.made) / seconds;
      gauges.tokens.show(speed, whole(speed), `and ${whole((prompts - before.prompts) / seconds)} of prompts`, [], 10);
    }
    before = { made, prompts, now };
    gauges.running.show(running, whole(running), seats ? `of ${whole(seats)}${parked ? `, ${whole(parked)} parked` : ""}` : "", [], Math.min(seats || 4, 4));
    gauges.waiting.show(waiting, whole(waiting), `${whole(read("penstock_pending_prompt_tokens"))} tokens`);
    const share = total ? used / total : 0;
    const percent = share && share < 0.1 ? (100 * share).toFixed(1) : whole(100 * share);
    const hits = prompts + kept ? `. ${whole((100 * kept) / (prompts + kept))}% of prompt tokens were in it` : "";
    gauges.kv.show(share, `${percent}%`, `${whole(used)} of ${whole(total)} blocks, ${whole(cached)} cached${hits}`, [share, total ? cached / total : 0]);
  }

  async function look() {
    clearTimeout(timer);
    if (document.hidden) return;
    const round = ++rounds;
    try {
      const reply = await call("GET", "metrics", { key: key(), signal: AbortSignal.timeout(5000) });
      const read = parse(await reply.text());
      if (round !== rounds) return;
      if (!seats) {
        const info = await call("GET", "server_info", { key: key() }).then((one) => one.json(), () => null);
        seats = info?.pools?.reduce((sum, pool) => sum + (pool.engine?.max_num_seqs ?? 0), 0) ?? 0;
      }
      again = 0;
      show(read, performance.now());
      const ready = read("penstock_ready") > 0;
      onState(ready ? "ready" : "busy", ready ? "Ready" : "Up, but not ready");
    } catch (error) {
      if (round !== rounds) return;
      Object.values(gauges).forEach((gauge) => gauge.blank());
      before = null;
      let refused = error instanceof Failure && error.status;
      again = refused ? LONGEST_MS : again + 1; // a key that is typed in is tried at once
      if (refused === 403 || refused === 404) refused = await call("GET", "health/ready").then(() => 200, (health) => health.status);
      if (refused === 200) onState("ready", "Ready; its figures are not for everybody"); // a key without that scope, or a proxy that hides them
      else if (refused === 401) onState("locked", "Needs an API key");
      else if (refused === 503) onState("busy", "Up, but not ready");
      else onState("dead", refused ? error.message : "The server does not answer. Trying again");
    }
    timer = setTimeout(look, Math.min(EVERY_MS * 2 ** Math.max(0, again - 2), LONGEST_MS));
  }

  document.addEventListener("visibilitychange", look);
  look();
  return look;
}
