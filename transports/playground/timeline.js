// Where a request's time went: the server's own phases in one lane, what came to the browser in another, on one scale.

import { duration, h, svg } from "./dom.js";

const MOST_MARKS = 400;

/** [name, milliseconds] of the metrics that the server sent; together they are its total. */
export function phasesOf(metrics) {
  const { queue_ms = 0, prefill_ms = 0, decode_ms = 0, total_ms = 0 } = metrics;
  const first = metrics.time_to_first_token_ms ?? total_ms - decode_ms;
  const before = Math.max(0, first - queue_ms - prefill_ms);
  const after = Math.max(0, total_ms - before - queue_ms - prefill_ms - decode_ms);
  return [["received", before], ["queued", queue_ms], ["prefill", prefill_ms], ["decode", decode_ms], ["finish", after]];
}

function lane(name, parts, total, marks = []) {
  const across = (ms) => ((1000 * ms) / total).toFixed(2);
  const bars = parts.map(([kind, from, length]) =>
    svg("rect", { class: `ph-${kind}`, x: across(from), width: Math.max(1.5, (1000 * length) / total).toFixed(2), y: 0, height: 12 }),
  );
  const ticks = marks.map((at) => svg("rect", { class: "tick", x: across(at), width: 1.5, y: 2.5, height: 7 }));
  const drawing = svg("svg", { viewBox: "0 0 1000 12", preserveAspectRatio: "none", "aria-hidden": "true" }, ...bars, ...ticks);
  return h("div", { class: "lane" }, h("span", {}, name), drawing);
}

/** `seen`: what the browser measured, {total, first, arrivals, pauses: [from, to][]}; `metrics`: the server's word, if it came. */
export function timeline(metrics, seen) {
  const phases = metrics ? phasesOf(metrics) : [];
  const total = Math.max(seen.total, metrics?.total_ms ?? 0, 0.001);
  let at = 0;
  const server = phases.map(([name, ms]) => [name, (at += ms) - ms, ms]).filter(([, , ms]) => ms > 0);
  const first = seen.first ?? seen.total;
  const browser = [["waiting", 0, first], ["stream", first, (seen.arrivals.at(-1) ?? first) - first], ...seen.pauses.map(([from, to]) => ["paused", from, to - from])];
  const step = Math.ceil(seen.arrivals.length / MOST_MARKS) || 1;
  const marks = seen.arrivals.filter((_, index) => index % step === 0);
  const paused = seen.pauses.reduce((sum, [from, to]) => sum + to - from, 0);
  const told = phases.map(([name, ms]) => [name, ms]);
  if (paused) told.push(["paused", paused]);
  const words = told.map(([name, ms]) => `${name} ${duration(ms)}`).join(", ");
  const here = seen.first == null ? "nothing came" : `the first token after ${duration(seen.first)}`;
  const text = `Server: ${words || "no word of it"}. Browser: ${here}, ${seen.arrivals.length} pieces, ${duration(seen.total)} in all.`;
  const legend = told.filter(([, ms]) => ms > 0).map(([name, ms]) => h("li", {}, h("i", { class: `ph-${name}` }), `${name} `, h("b", {}, duration(ms))));
  return h(
    "figure",
    { class: "timeline" },
    h("div", { role: "img", "aria-label": text }, server.length ? lane("server", server, total) : null, lane("browser", browser, total, marks)),
    h("figcaption", {}, h("ul", { class: "legend" }, ...legend)),
  );
}
