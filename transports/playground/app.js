// The page: a conversation, what it is asked with, and what runs. Beside it: wire.js (how requests travel), form.js (what is asked),
// answer.js (what came), live.js (the server's figures), timeline.js (where the time went).

import { Fold, Shown } from "./answer.js";
import { $, duration, h } from "./dom.js";
import { bodyOf, build, curlOf, look, SCHEMA, TOOLS, Wrong } from "./form.js";
import { watch } from "./live.js";
import { timeline } from "./timeline.js";
import { askSocket, askSse, call, Failure, newId } from "./wire.js";

const CHATS = "v1/chat/completions";
const RETAIN = "x-penstock-retain";
const ON_DISCONNECT = "x-penstock-on-disconnect";
const KEPT_S = 30;
const MOST_REQUESTS = 20;

let messages = []; // the conversation, as the API has it
let running = null; // what is being answered
let limit = 0; // the model's context

const key = () => $("key").value;
const announce = (words) => ($("announce").textContent = words);

function notice(words = "") {
  $("notice").textContent = words;
  $("notice").hidden = !words;
  if (words) announce(words);
}

// ---------------------------------------------------------------- what is shown while something runs

function controls() {
  for (const id of ["pause", "stop-button", "cancel"]) $(id).hidden = !running;
  $("send").hidden = Boolean(running);
  $("pause").textContent = running?.pausedAt != null ? "Resume" : "Pause";
  for (const id of ["pause", "stop-button", "cancel"]) $(id).disabled = !running?.began || running?.ending;
}

function follow() {
  const scroll = $("scroll");
  return scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
}

const toEnd = () => ($("scroll").scrollTop = $("scroll").scrollHeight);

function contextOf(usage) {
  if (usage && limit) $("context").textContent = `${usage.total_tokens.toLocaleString("en")} of ${limit.toLocaleString("en")} tokens of context`;
}

function addRequest(title, metrics, seen) {
  $("no-requests").hidden = true;
  const head = h("p", { class: "request-head" }, h("span", {}, title), h("b", {}, duration(seen.total)));
  $("requests").prepend(h("li", {}, head, timeline(metrics, seen)));
  while ($("requests").children.length > MOST_REQUESTS) $("requests").lastChild.remove();
}

// ---------------------------------------------------------------- asking

function starting(title, body) {
  const shown = new Shown(body.n ?? 1);
  $("welcome").hidden = true;
  $("turns").append(shown.element);
  toEnd();
  running = { title, shown, messages, fold: new Fold(), began: false, ending: "", pausedAt: null, pauses: [], arrivals: [], from: performance.now(), handle: null };
  controls();
  return running;
}

function listeners(run) {
  let drawing = 0;
  const draw = () => {
    drawing = 0;
    const down = follow();
    run.shown.show(run.fold);
    if (down) toEnd();
  };
  return {
    began() {
      run.began = true;
      controls();
    },
    data(chunk) {
      if (run.fold.take(chunk)) run.arrivals.push(performance.now() - run.from);
      if (run.fold.choices.length && run.pausedAt == null) run.shown.state("streaming");
      drawing ||= requestAnimationFrame(draw);
    },
    broke: () => notice("The connection broke. Going on with the stream as soon as the server is back."),
    back: () => notice(),
    flush() {
      cancelAnimationFrame(drawing);
      draw();
    },
  };
}

/** Ask; once more where the server keeps no streams, or not for so long. */
async function travel(run, body, headers, on) {
  try {
    return await ask(run, body, headers, on);
  } catch (error) {
    if (error.param !== RETAIN || !headers[RETAIN]) throw error;
    $("retain").checked = false;
    delete headers[RETAIN];
    delete headers[ON_DISCONNECT];
    notice("This server does not keep streams, so an answer ends with its connection.");
    return await ask(run, body, headers, on);
  }
}

/** Ask once; over SSE where the WebSocket is not let through. */
async function ask(run, body, headers, on) {
  const asked = { path: CHATS, body, headers, key: key(), retained: RETAIN in headers, on };
  if ($("transport").value === "websocket") {
    run.handle = askSocket(asked);
    try {
      return await run.handle.done;
    } catch (error) {
      if (!error.refused) throw error;
      await call("GET", "version", { key: key() }); // a server that answers nothing is another matter
      $("transport").value = "sse";
      notice("The WebSocket could not be opened here, so answers come as server-sent events.");
    }
  }
  run.handle = askSse(asked);
  return await run.handle.done;
}

function wordsOf(error) {
  if (!(error instanceof Failure)) return String(error?.message ?? error);
  const more = [error.status || "", error.code, error.param && `field ${error.param}`].filter(Boolean).join(", ");
  return more ? `${error.message} (${more})` : error.message;
}

/** Answer `messages`. `undo` is called where nothing came of it that the conversation could go on with. */
async function answer(title, undo) {
  let body;
  try {
    body = bodyOf(messages);
  } catch (error) {
    undo();
    if (!(error instanceof Wrong)) throw error;
    show(error.field);
    return notice(error.message);
  }
  notice();
  const run = starting(title, body);
  const headers = { "x-request-id": newId(), "x-include-metrics": "1" };
  if ($("retain").checked) Object.assign(headers, { [RETAIN]: String(KEPT_S), [ON_DISCONNECT]: "park" });
  const on = listeners(run);
  let failure = null;
  try {
    await travel(run, body, headers, on);
  } catch (error) {
    failure = error;
  }
  on.flush();
  finish(run, failure, undo);
  run.shown.tell(curlOf(CHATS, headers, body, Boolean(key())), body, run.fold);
}

function finish(run, failure, undo) {
  const { fold, shown } = run;
  const total = performance.now() - run.from;
  if (run.pausedAt != null) run.pauses.push([run.pausedAt, total]);
  const paused = run.pauses.reduce((sum, [from, to]) => sum + to - from, 0);
  const seen = { total, first: run.arrivals[0] ?? null, arrivals: run.arrivals, pauses: run.pauses, paused };
  const first = fold.choices[0];
  const cancelled = failure?.code === "cancelled" || run.ending === "cancel";
  const stopped = run.ending === "stop" && !failure;
  const reason = failure ? (cancelled ? "cancelled" : "") : stopped ? "stopped" : first?.reason;
  shown.end(fold, seen, reason);
  if (failure && !cancelled) shown.fail(wordsOf(failure));
  else if (first?.error) shown.fail(first.error.message);
  addRequest(run.title, fold.metrics, seen);
  running = null;
  controls();
  if (messages !== run.messages) return; // a new chat began meanwhile
  contextOf(fold.usage);
  const message = fold.message();
  const calls = message?.tool_calls ?? [];
  if (message && (!failure || !calls.length)) messages.push(message);
  else undo();
  if (calls.length && !failure) askForResults(calls, shown);
  if (failure && !cancelled) announce(`Error: ${wordsOf(failure)}`);
  else announce([cancelled ? "Cancelled." : stopped ? "Stopped." : "Answer:", first?.content, ...calls.map((one) => `Calls ${one.function.name}.`)].filter(Boolean).join(" "));
  if (failure?.status === 401) show("key");
}

/** What the functions gave, typed in by hand, so that the model can go on. */
function askForResults(calls, shown) {
  const fields = calls.map((one, index) => {
    const id = `result-${one.id || index}`;
    return { one, input: h("textarea", { id, rows: "1", class: "code", placeholder: '{"temperature": 7}' }), label: h("label", { for: id }, `Result of ${one.function.name}`) };
  });
  const form = h("form", { class: "results" }, ...fields.flatMap(({ label, input }) => [label, input]), h("button", { class: "small" }, "Send results"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) return;
    const before = messages;
    messages = [...messages, ...fields.map(({ one, input }) => ({ role: "tool", tool_call_id: one.id, content: input.value }))];
    form.querySelectorAll("textarea, button").forEach((one) => (one.disabled = true));
    answer(`Results of ${calls.map((one) => one.function.name).join(", ")}`, () => {
      messages = before;
      form.querySelectorAll("textarea, button").forEach((one) => (one.disabled = false));
    });
    $("prompt").focus();
  });
  shown.after.append(form);
}

function send(text) {
  if (running || !text.trim()) return;
  const before = messages;
  messages = [...messages, { role: "user", content: text }];
  const mine = h("li", { class: "turn user" }, h("article", { "aria-label": "You" }, text));
  $("turns").append(mine);
  $("prompt").value = "";
  grow();
  answer(text, () => {
    messages = before;
    mine.classList.add("lost");
    if (!$("prompt").value) $("prompt").value = text;
    grow();
  });
}

/** Pause, resume, stop or cancel what runs. */
async function steer(op) {
  const run = running;
  if (!run?.handle || run.ending) return;
  if (op === "stop" || op === "cancel") run.ending = op;
  try {
    await run.handle[op]();
  } catch (error) {
    run.ending = "";
    if (running === run) notice(wordsOf(error));
  }
  if (running !== run) return;
  const now = performance.now() - run.from;
  if (op === "pause") {
    run.pausedAt = now;
    run.shown.state("paused");
    announce("Paused.");
  }
  if (op === "resume" && run.pausedAt != null) {
    run.pauses.push([run.pausedAt, now]);
    run.pausedAt = null;
    run.shown.state("streaming");
    announce("Going on.");
  }
  controls();
}

// ---------------------------------------------------------------- panels, fields, starters

function grow() {
  const prompt = $("prompt");
  prompt.rows = Math.min(8, Math.max(1, prompt.value.split("\n").length, Math.ceil(prompt.value.length / 70)));
}

function drawer(name, open) {
  for (const one of ["settings", "live"]) {
    const now = one === name && open;
    $(one).classList.toggle("open", now);
    $(`show-${one}`).setAttribute("aria-expanded", String(now));
  }
}

/** Bring a field of the settings into sight, and the focus to it. */
function show(id) {
  for (let place = $(id); place; place = place.parentElement) if (place.localName === "details") place.open = true;
  if ($(id).closest("#settings") && $("show-settings").offsetParent) drawer("settings", true);
  $(id).focus();
  $(id).scrollIntoView({ block: "center" });
}

function starter(kind, text) {
  if (kind === "schema" || kind === "tools") $("format").value = $("tools").value = "";
  if (kind === "schema") {
    $("format").value = "json_schema";
    $("schema").value = JSON.stringify(SCHEMA, null, 2);
    $("format-group").open = true;
    text = "Invent a person. Answer in JSON.";
  }
  if (kind === "tools") {
    $("tools").value = JSON.stringify(TOOLS, null, 2);
    $("tools-group").open = true;
    text = "What is the weather in Oslo?";
  }
  look();
  send(text);
  $("prompt").focus();
}

async function models() {
  try {
    const { data } = await (await call("GET", "v1/models", { key: key() })).json();
    const chosen = $("model").value;
    $("model").replaceChildren(...data.map(({ id }) => h("option", { selected: id === chosen }, id)));
    limit = data[0]?.max_model_len ?? 0;
    $("welcome-model").textContent = $("model").value;
    return true;
  } catch {
    return false; // the state in the header says why
  }
}

function stored(value) {
  try {
    if (value === undefined) return sessionStorage.getItem("penstock.key") ?? "";
    if (value) sessionStorage.setItem("penstock.key", value);
    else sessionStorage.removeItem("penstock.key");
  } catch {
    // a browser that keeps nothing
  }
  return "";
}

function wire() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send($("prompt").value);
  });
  $("prompt").addEventListener("input", grow);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send($("prompt").value);
  });
  $("pause").addEventListener("click", () => steer(running?.pausedAt != null ? "resume" : "pause"));
  $("stop-button").addEventListener("click", () => steer("stop"));
  $("cancel").addEventListener("click", () => steer("cancel"));
  $("new-chat").addEventListener("click", () => {
    if (running) steer("cancel");
    messages = [];
    $("turns").replaceChildren();
    $("welcome").hidden = false;
    $("context").textContent = "";
    notice();
    $("prompt").focus();
  });
  for (const name of ["settings", "live"]) $(`show-${name}`).addEventListener("click", () => {
    const open = !$(name).classList.contains("open");
    drawer(name, open);
    if (open) $(name).querySelector("select, input, textarea, button")?.focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    const open = document.querySelector(".panel.open");
    if (open) {
      drawer("", false);
      $(`show-${open.id}`).focus();
    } else if (running) steer("stop");
  });
  addEventListener("pagehide", () => running && steer("cancel")); // who leaves needs no answer, nor a place for it
  $("form").addEventListener("submit", (event) => event.preventDefault());
  $("form").addEventListener("input", look);
  $("model").addEventListener("change", () => ($("welcome-model").textContent = $("model").value));
  $("schema-example").addEventListener("click", () => (($("schema").value = JSON.stringify(SCHEMA, null, 2)), look()));
  $("tools-example").addEventListener("click", () => (($("tools").value = JSON.stringify(TOOLS, null, 2)), look()));
  for (const button of document.querySelectorAll("[data-starter]"))
    button.addEventListener("click", () => starter(button.dataset.starter, button.firstChild.data));
}

function begin() {
  build();
  wire();
  look();
  controls();
  $("key").value = stored();
  let known = false;
  const again = watch(key, async (state, words) => {
    const changed = $("state").dataset.state !== state;
    $("state").dataset.state = state;
    if ($("state-text").textContent !== words) $("state-text").textContent = words;
    if (changed && state === "locked") show("key");
    if (changed && (state === "dead" || state === "locked")) known = false;
    if (!known && (state === "ready" || state === "busy")) known = (await models()) && state === "ready"; // before, the context is not known
  });
  $("key").addEventListener("change", () => {
    stored(key());
    known = false;
    again();
  });
  $("prompt").focus();
}

begin();
