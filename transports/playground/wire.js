// How requests reach the server: over its WebSocket (penstock.v1) or as server-sent events. Both give the same things:
// ask(...) -> { done, pause, resume, stop, cancel }, and call on.began(), on.data(payload), on.broke() and on.back().
// Knows nothing of chats: payloads are passed on as they come.

const FIRST_WAIT_MS = 200;
const LONGEST_WAIT_MS = 3000;
const PATIENCE_MS = 20000;

const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const here = (path) => new URL(path.replace(/^\//, ""), document.baseURI);

/** What went wrong, in the server's words if it had some. `status` 0: nobody answered. */
export class Failure extends Error {
  constructor(error, status) {
    super(typeof error === "string" ? error : error?.message || `The server answered ${status}.`);
    this.status = status;
    this.code = error?.code ?? "";
    this.param = error?.param ?? "";
  }
}

export const silent = () => new Failure("The server does not answer.", 0);

/** 32 hexadecimal digits. (randomUUID is there on HTTPS and localhost only.) */
export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");

/** Headers are bytes: a key beyond ASCII travels as UTF-8. */
const keyed = (key, headers = {}) => (key ? { ...headers, authorization: `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}` } : headers);

/** A plain request; the reply if it is good. Throws a Failure. */
export async function call(method, path, { key, headers, body, signal } = {}) {
  let reply;
  try {
    reply = await fetch(here(path), { method, headers: keyed(key, headers), body, signal, cache: "no-store", keepalive: method === "DELETE" });
  } catch (error) {
    throw signal?.aborted ? error : silent();
  }
  if (reply.ok) return reply;
  const said = await reply.json().catch(() => null);
  throw new Failure(said?.error ?? said, reply.status);
}

// ---------------------------------------------------------------- server-sent events

async function* eventsOf(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch(() => ({ done: true })); // broken off: whoever reads sees that no end was told
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const event = { id: 0, data: "" };
      for (const line of part.split("\n")) {
        if (line.startsWith("data: ")) event.data += line.slice(6);
        else if (line.startsWith("id: ")) event.id = Number(line.slice(4));
      }
      if (event.data) yield event;
    }
  }
}

export function askSse({ path, body, headers, key, retained, on }) {
  const id = headers["x-request-id"];
  const steer = (op) => async () => void (await call("POST", `v1/requests/${id}/${op}`, { key }));
  let after = 0;

  async function read(reply) {
    for await (const event of eventsOf(reply)) {
      after = event.id || after;
      if (event.data === "[DONE]") return true;
      const data = JSON.parse(event.data);
      if (data.error) throw new Failure(data.error, 0);
      on.data(data);
    }
    return false; // it ended without saying so
  }

  async function run() {
    const plain = { "content-type": "application/json", accept: "text/event-stream" };
    let reply = await call("POST", path, { key, headers: { ...plain, ...headers }, body: JSON.stringify(body) });
    on.began();
    let pause = FIRST_WAIT_MS;
    const lost = () => performance.now() + PATIENCE_MS;
    for (let until = 0; ; ) {
      if (reply && (await read(reply))) return;
      if (!retained) throw new Failure("The connection was lost, and the answer with it.", 0);
      if (reply) [until, pause] = [lost(), FIRST_WAIT_MS], on.broke();
      await wait(pause);
      pause = Math.min(2 * pause, LONGEST_WAIT_MS);
      reply = await call("GET", `v1/streams/${id}`, { key, headers: { "last-event-id": String(after) } }).catch((error) => {
        if (error.status || performance.now() > until) throw error;
        return null;
      });
      if (reply) on.back();
      if (reply?.status === 204) return;
    }
  }

  return {
    done: run(),
    pause: steer("pause"),
    resume: steer("resume"),
    stop: steer("stop"),
    cancel: async () => void (await call("DELETE", `v1/requests/${id}`, { key })),
  };
}

// ---------------------------------------------------------------- WebSocket

/** One connection for the page, opened when it is first needed. Streams that are kept outlive it. */
class Socket {
  constructor() {
    this.streams = new Map();
    this.ws = null;
    this.key = "";
    this.opening = null;
  }

  /** Resolves when messages may be sent; rejects with a Failure (`refused`: the handshake was). */
  open(key) {
    if (this.key !== key) this.close();
    this.opening ??= new Promise((resolve, reject) => {
      this.key = key;
      const url = here("v1/stream");
      url.protocol = url.protocol.replace("http", "ws");
      const ws = (this.ws = new WebSocket(url, ["penstock.v1"]));
      let opened = false;
      ws.onopen = () => {
        opened = true;
        if (key) ws.send(JSON.stringify({ op: "auth", key }));
        resolve();
      };
      ws.onmessage = (event) => {
        const said = JSON.parse(event.data);
        this.streams.get(said.id)?.take(said);
      };
      ws.onclose = (event) => {
        if (this.ws !== ws) return;
        this.ws = this.opening = null;
        if (!opened) return reject(Object.assign(new Failure("The WebSocket could not be opened.", 0), { refused: true }));
        const why = event.code === 4401 ? new Failure(event.reason || "An API key is needed.", 401) : null;
        for (const stream of [...this.streams.values()]) stream.lost(why);
      };
    });
    return this.opening;
  }

  close() {
    const ws = this.ws;
    this.ws = this.opening = null;
    ws?.close();
    for (const stream of [...this.streams.values()]) stream.lost(null);
  }

  say(message) {
    if (this.ws?.readyState === WebSocket.OPEN) this.ws.send(JSON.stringify(message));
  }
}

export const socket = new Socket();

export function askSocket({ path, body, headers, key, retained, on }) {
  const id = headers["x-request-id"];
  const start = { op: "start", id, path: `/${path}`, body, headers };
  const asked = []; // what was asked of the stream and is not answered yet
  let begun = false;
  let after = 0;
  let finish;
  const over = new Promise((resolve, reject) => (finish = { resolve, reject }));

  function end(error) {
    socket.streams.delete(id);
    for (const one of asked.splice(0)) one.resolve();
    if (error) finish.reject(error);
    else finish.resolve();
  }

  function take(said) {
    if (said.op === "start" || said.op === "attach") return end(new Failure(said.error, said.status));
    if (said.op) {
      const one = asked.shift();
      return said.error ? one?.reject(new Failure(said.error, said.status)) : one?.resolve();
    }
    if (said.error) {
      // The start was lost with the connection before the server saw it: once more, it cannot run twice.
      if (!begun && said.error.code === "stream_not_found") return socket.say(start);
      return end(new Failure(said.error, said.status));
    }
    if (said.stream && !begun) (begun = true), on.began();
    if (said.data) (after = said.seq), on.data(said.data);
    if (said.done) end(null);
  }

  async function lost(why) {
    if (why || !retained) return end(why ?? new Failure("The connection was lost, and the answer with it.", 0));
    on.broke();
    for (const one of asked.splice(0)) one.reject(new Failure("The connection was lost.", 0));
    const until = performance.now() + PATIENCE_MS;
    for (let pause = FIRST_WAIT_MS; ; pause = Math.min(2 * pause, LONGEST_WAIT_MS)) {
      await wait(pause);
      try {
        await socket.open(key);
        break;
      } catch {
        if (performance.now() > until) return end(silent());
      }
    }
    on.back();
    socket.say({ op: "attach", id, stream: id, after });
  }

  async function run() {
    await socket.open(key);
    socket.streams.set(id, { take, lost });
    socket.say(start);
    await over;
  }

  const steer = (op) => () =>
    new Promise((resolve, reject) => {
      asked.push({ resolve, reject });
      socket.say({ op, id });
    });
  return { done: run(), pause: steer("pause"), resume: steer("resume"), stop: steer("stop"), cancel: steer("cancel") };
}
