// Two answers at once over one WebSocket (docs/streams.md). In a browser, or: node websocket.js [http://127.0.0.1:8000] (22 or later)
const url = (globalThis.process?.argv[2] ?? "http://127.0.0.1:8000").replace(/^http/, "ws") + "/v1/stream";
const socket = new WebSocket(url, ["penstock.v1"]); // with a key: ["penstock.v1", "penstock.key." + key]
const questions = { sum: "What is 40 plus 2?", sky: "What colour is the sky?" };
const answers = {};

socket.onopen = () => {
  for (const [id, content] of Object.entries(questions)) {
    const body = { messages: [{ role: "user", content }], max_tokens: 32, temperature: 0, stream: true };
    socket.send(JSON.stringify({ op: "start", id, path: "/v1/chat/completions", body }));
  }
};
socket.onmessage = (event) => {
  const { id, data, done, error } = JSON.parse(event.data);
  if (data) answers[id] = (answers[id] ?? "") + (data.choices[0]?.delta.content ?? "");
  if (error) answers[id] = error.message;
  if (done || error) console.log(`${id}: ${answers[id]}`);
  if (done || error) delete questions[id];
  if (!Object.keys(questions).length) socket.close();
};
