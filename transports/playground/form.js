// The settings: what is typed into them becomes a request's body, or a word about what is wrong.

import { $, h } from "./dom.js";

/** Field of the request: what it may be, and what it is where it is left empty. */
const NUMBERS = {
  temperature: { min: 0, max: 1000, step: "any", placeholder: "model’s" },
  max_tokens: { min: 1, placeholder: "what fits" },
  top_p: { min: 0, max: 1, step: "any", placeholder: "model’s" },
  top_k: { min: -1, placeholder: "model’s" },
  min_p: { min: 0, max: 1, step: "any", placeholder: "model’s" },
  seed: { placeholder: "any" },
  n: { min: 1, max: 8, placeholder: "1" },
  presence_penalty: { min: -2, max: 2, step: "any", placeholder: "0" },
  frequency_penalty: { min: -2, max: 2, step: "any", placeholder: "0" },
  repetition_penalty: { min: 0, step: "any", placeholder: "model’s" },
};

export const SCHEMA = {
  type: "object",
  properties: { name: { type: "string" }, age: { type: "integer", minimum: 0, maximum: 120 } },
  required: ["name", "age"],
  additionalProperties: false,
};
export const TOOLS = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Get the current weather in a city",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];

export function build() {
  for (const [id, more] of Object.entries(NUMBERS)) {
    const [name, penalty] = id.split("_penalty");
    const field = h("div", { class: "field" }, h("label", { for: id }, name), h("input", { id, type: "number", ...more }));
    if (penalty === undefined) $("numbers").lastElementChild.before(field); // the last one, stop, is a text
    else $("penalties").append(field);
  }
}

/** A field holds something that cannot be sent. */
export class Wrong extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

/** What is in an editor, or undefined where it is empty. Throws Wrong. */
function json(id, check) {
  const text = $(id).value.trim();
  if (!text) return undefined;
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Wrong(id, `This is no JSON: ${error.message}`);
  }
  const problem = check(value);
  if (problem) throw new Wrong(id, problem);
  return value;
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const schemaOf = () => json("schema", (value) => (isObject(value) || typeof value === "boolean" ? "" : "A schema is a JSON object."));
const toolsOf = () =>
  json("tools", (value) => {
    if (!Array.isArray(value)) return "Tools are a JSON list: [ … ]";
    const odd = value.findIndex((tool) => !tool?.function?.name);
    return odd < 0 ? "" : `Tool ${odd + 1} has no function.name.`;
  });

/** Tell beside each editor what is wrong with it, and in its group's heading that it is in use. */
export function look() {
  for (const [id, read] of [["schema", schemaOf], ["tools", toolsOf]]) {
    let problem = "";
    try {
      read();
    } catch (error) {
      problem = error.message;
    }
    $(`${id}-error`).textContent = problem;
    $(id).setAttribute("aria-invalid", String(Boolean(problem)));
  }
  $("schema-field").hidden = $("format").value !== "json_schema";
  $("format-mark").textContent = $("format").value ? "on" : "";
  $("tools-mark").textContent = $("tools").value.trim() ? "on" : "";
}

/** The body of a chat request with these messages. Throws Wrong. */
export function bodyOf(messages) {
  const system = $("system").value.trim();
  const body = { model: $("model").value || undefined, messages: system ? [{ role: "system", content: system }, ...messages] : messages };
  for (const name of Object.keys(NUMBERS)) {
    const input = $(name);
    if (input.validity.badInput) throw new Wrong(name, `${name} is no number.`);
    if (input.value !== "") body[name] = Number(input.value); // whether it is a good one, the server says
  }
  const stop = $("stop").value.split("|").map((text) => text.replaceAll("\\n", "\n")).filter(Boolean);
  if (stop.length) body.stop = stop;
  const format = $("format").value;
  if (format === "json_object") body.response_format = { type: format };
  if (format === "json_schema") {
    const schema = schemaOf();
    if (schema === undefined) throw new Wrong("schema", "Type a schema, or choose another format.");
    body.response_format = { type: format, json_schema: { name: "answer", schema, strict: true } };
  }
  const tools = toolsOf();
  if (tools?.length) {
    body.tools = tools;
    if ($("tool_choice").value) body.tool_choice = $("tool_choice").value;
  }
  if ($("logprobs").checked) body.logprobs = true;
  return { ...body, stream: true, stream_options: { include_usage: true } };
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** The same request for a shell. The key is not in it. */
export function curlOf(path, headers, body, locked) {
  const all = { "content-type": "application/json", ...headers };
  const lines = [`curl -N ${quoted(new URL(path, document.baseURI).href)}`];
  for (const [name, value] of Object.entries(all)) lines.push(`-H ${quoted(`${name}: ${value}`)}`);
  if (locked) lines.push('-H "authorization: Bearer $PENSTOCK_API_KEY"');
  lines.push(`-d ${quoted(JSON.stringify(body))}`);
  return lines.join(" \\\n  ");
}
