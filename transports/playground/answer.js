// One answer: chunks are put together as they come, and shown. What a model says is text, whatever it looks like.

import { copier, duration, h } from "./dom.js";

const MOST_EVENTS = 2000;

/** The choices of an answer, and what was told about all of them. */
export class Fold {
  constructor() {
    this.choices = [];
    this.usage = null;
    this.metrics = null;
    this.model = "";
    this.events = [];
  }

  /** Take one payload; does it hold something of the answer? */
  take(chunk) {
    if (this.events.length < MOST_EVENTS) this.events.push(chunk);
    this.usage = chunk.usage ?? this.usage;
    this.metrics = chunk.metrics ?? this.metrics;
    this.model = chunk.model ?? this.model;
    let some = false;
    for (const part of chunk.choices ?? []) {
      const choice = (this.choices[part.index] ??= { content: "", reasoning: "", calls: [], logprobs: [], reason: null, error: null });
      const delta = part.delta ?? {};
      const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
      choice.content += delta.content ?? "";
      choice.reasoning += reasoning;
      for (const one of delta.tool_calls ?? []) {
        const call = (choice.calls[one.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
        call.id ||= one.id ?? "";
        call.function.name += one.function?.name ?? "";
        call.function.arguments += one.function?.arguments ?? "";
      }
      choice.logprobs.push(...(part.logprobs?.content ?? []));
      choice.reason = part.finish_reason ?? choice.reason;
      choice.error = part.error ?? choice.error;
      some ||= Boolean(delta.content || reasoning || delta.tool_calls?.length);
    }
    return some;
  }

  /** What goes into the conversation; null: nothing was said. */
  message() {
    const first = this.choices[0];
    if (!first || !(first.content || first.calls.length)) return null;
    const message = { role: "assistant", content: first.content || null };
    if (first.calls.length) message.tool_calls = first.calls.filter(Boolean);
    return message;
  }
}

const pretty = (text) => {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // not all of it is there yet
  }
};

/** Text nodes grow by what is new, so that a long answer costs no more than a short one. */
class Growing {
  constructor(node) {
    this.text = node.appendChild(document.createTextNode(""));
    this.shown = "";
  }

  set(text) {
    if (text.startsWith(this.shown)) this.text.appendData(text.slice(this.shown.length));
    else this.text.data = text;
    this.shown = text;
  }
}

class Choice {
  constructor(label) {
    this.reasoning = h("div", { class: "thought" });
    this.thinking = h("details", { class: "reasoning", hidden: true }, h("summary", {}, "Reasoning"), this.reasoning);
    this.content = h("div", { class: "text" });
    this.calls = h("div", { class: "calls" });
    this.element = h("div", { class: "choice" }, label ? h("h4", {}, label) : null, this.thinking, this.content, this.calls);
    this.said = new Growing(this.content);
    this.thought = new Growing(this.reasoning);
    this.cards = [];
  }

  show(choice) {
    this.thinking.hidden = !choice.reasoning;
    this.thought.set(choice.reasoning);
    this.said.set(choice.content);
    choice.calls.forEach((call, index) => {
      if (!this.cards[index]) {
        const card = { name: h("code", { class: "name" }), body: h("pre", { class: "code" }) };
        this.calls.append(h("div", { class: "call" }, h("p", {}, "Calls ", card.name), card.body));
        this.cards[index] = card;
      }
      this.cards[index].name.textContent = call.function.name;
      this.cards[index].body.textContent = pretty(call.function.arguments);
    });
  }

  /** Once it is complete: each token shaded by how probable it was. */
  shade(choice) {
    const tokens = choice.logprobs;
    if (!tokens.length || tokens.map((one) => one.token).join("") !== choice.content) return; // tokens that hold half a character
    const spans = tokens.map(({ token, logprob }) => {
      const share = Math.exp(logprob);
      return h("span", { class: `lp lp${Math.min(4, Math.floor(share * 5))}`, title: `${(100 * share).toFixed(1)}%` }, token);
    });
    this.content.replaceChildren(...spans);
  }
}

/** How an answer looks in the conversation. */
export class Shown {
  constructor(count) {
    this.count = count;
    this.choices = [];
    this.body = h("div", { class: "choices" });
    this.stats = h("ul", { class: "stats" });
    this.raw = h("details", { class: "raw", hidden: true }, h("summary", {}, "Request and reply"));
    this.problem = h("p", { class: "error", hidden: true });
    this.after = h("div", { class: "after" });
    const article = h("article", { "aria-busy": "true", "aria-label": "Answer" }, this.body, this.problem, this.after, h("footer", {}, this.stats, this.raw));
    this.article = article;
    this.element = h("li", { class: "turn assistant waiting" }, article);
  }

  show(fold) {
    fold.choices.forEach((choice, index) => {
      if (!this.choices[index]) {
        this.choices[index] = new Choice(this.count > 1 ? `Answer ${index + 1}` : "");
        this.body.append(this.choices[index].element);
      }
      this.choices[index].show(choice);
    });
  }

  state(word) {
    this.element.className = `turn assistant ${word}`;
    this.article.setAttribute("aria-busy", String(word !== "over"));
  }

  fail(words) {
    this.problem.textContent = words;
    this.problem.hidden = false;
  }

  end(fold, seen, reason) {
    this.state("over");
    this.choices.forEach((shown, index) => shown.shade(fold.choices[index]));
    const gaps = seen.arrivals.slice(1).map((at, index) => at - seen.arrivals[index]).sort((a, b) => a - b);
    const at = (share) => gaps[Math.min(gaps.length - 1, Math.floor(share * gaps.length))];
    const tokens = fold.usage?.completion_tokens;
    const streamed = seen.arrivals.at(-1) - seen.first - seen.paused;
    const speed = tokens > 1 && streamed > 0 ? ((tokens - 1) * 1000) / streamed : null;
    const facts = [
      ["TTFT", seen.first == null ? null : duration(seen.first), "Time to the first token, measured here"],
      ["ITL P50", gaps.length ? duration(at(0.5)) : null, "Median time between two pieces, measured here"],
      ["P95", gaps.length ? duration(at(0.95)) : null, "95th percentile of the time between two pieces, measured here"],
      ["tokens", tokens == null ? null : `${fold.usage.prompt_tokens} + ${tokens}`, "Of the prompt and of the answer"],
      ["speed", speed ? `${speed.toFixed(0)}/s` : null, "Tokens a second, after the first"],
      ["end", reason, "Why it ended"],
    ];
    this.stats.replaceChildren(...facts.filter(([, value]) => value).map(([name, value, title]) => h("li", { title }, `${name} `, h("b", {}, value))));
  }

  /** The request as a shell would send it, and what came, made when somebody opens it. */
  tell(curl, body, fold) {
    this.raw.hidden = false;
    const part = (name, text) => {
      const code = h("pre", { class: "code", tabindex: "0", role: "group", "aria-label": name }, text);
      return [h("div", { class: "raw-head" }, h("h4", {}, name), copier(name, () => text, code)), code];
    };
    this.raw.addEventListener(
      "toggle",
      () => {
        const events = fold.events.map((event) => JSON.stringify(event)).join("\n");
        this.raw.append(...part("As curl", curl), ...part("Body", JSON.stringify(body, null, 2)), ...part("Reply", events || "Nothing came."));
      },
      { once: true },
    );
  }
}
