"""Brook's synthetic corpus: whole conversations made of the tasks, and the held-out cases of the evaluation.

A generator is seeded and endless. The training split and the held-out split differ in what must be copied (facts,
invented words, codes, phrases, requests, random functions) and in the operands of sums, not in the kinds of task.

This module knows nothing about tokens, except that a filler sentence is about twelve of them.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import brook_pools as pools
import brook_tasks as tasks
import brook_tools as tools
from brook_pools import HELD_OUT, TRAIN, Pools
from brook_tasks import Fact, Turn

Message = dict[str, Any]

_TOKENS_PER_SENTENCE: Final = 12.5
# A bank of sentences per generator: making each one anew would cost more time than training on it.
_BANK_SIZE: Final = 4000


class Conversation(NamedTuple):
    """One document of the corpus. In a held-out case the last message is the right answer."""

    task: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    expected: Any = None
    schema: dict[str, Any] | None = None


_SYSTEMS: Final = (
    "You are a helpful assistant.", "You are Brook, a helpful assistant.", "Be brief.", "Answer briefly.", "You are a friendly chatbot.",
    "You are a helpful, honest assistant.", "Help the user.", "You are an assistant that answers questions.",
    "You are Brook, the demo model of Penstock.", "Answer the user's questions as well as you can.", "Be polite and precise.",
    "You are a concise assistant.", "You are a careful assistant. Never invent facts.",
)  # fmt: skip

_SIMPLE: Final[tuple[tuple[Callable[[Pools], Turn], int], ...]] = (
    (tasks.arithmetic, 34), (tasks.smalltalk, 9), (tasks.penstock, 14), (tasks.unknown, 4), (tasks.counting, 8),
    (tasks.listing, 8), (tasks.trivia, 7), (tasks.rewriting, 20), (tasks.story, 4),
)  # fmt: skip
_BESIDE_TOOLS: Final[tuple[tuple[Callable[[Pools], Turn], int], ...]] = (
    (tasks.smalltalk, 4), (tasks.penstock, 4), (tasks.counting, 1), (tasks.listing, 1), (tasks.rewriting, 2), (tasks.story, 1),
)  # fmt: skip


def say(role: str, content: str) -> Message:
    """A plain message."""
    return {"role": role, "content": content}


class Corpus:
    """An endless, seeded stream of conversations of one split."""

    def __init__(self, seed: int, split: str = TRAIN) -> None:
        self.p = Pools(random.Random(f"{seed}/{split}"), split)
        self._bank: list[str] = []

    # --- parts ------------------------------------------------------------------------------------------------

    def _simple(self, mix: tuple[tuple[Callable[[Pools], Turn], int], ...] = _SIMPLE) -> Turn:
        task = self.p.rng.choices([task for task, _ in mix], [weight for _, weight in mix])[0]
        return task(self.p)

    def _system(self, share: float = 0.15) -> list[Message]:
        rng = self.p.rng
        return [say("system", rng.choice(_SYSTEMS))] if rng.random() < share else []

    def filler(self, sentences: int) -> list[str]:
        """Sentences that nobody asks about."""
        rng = self.p.rng
        while len(self._bank) < _BANK_SIZE:
            self._bank.append(tasks.filler_sentence(self.p))
        for _ in range(min(sentences, 20)):
            self._bank[rng.randrange(_BANK_SIZE)] = tasks.filler_sentence(self.p)
        return rng.choices(self._bank, k=sentences)

    def _length(self, most: int) -> int:
        """A number of filler sentences, short ones more often: half of the lengths are log-uniform."""
        rng = self.p.rng
        if most < 1:
            return 0
        if rng.random() < 0.35:
            return rng.randint(0, most)
        return int(math.exp(rng.uniform(0.0, math.log(most + 1)))) - 1

    # --- conversations ----------------------------------------------------------------------------------------

    def single(self) -> Conversation:
        """One exchange."""
        turn = self._simple()
        return Conversation(turn.task, [*self._system(), say("user", turn.user), say("assistant", turn.assistant)], None, turn.check)

    def mixed(self) -> Conversation:
        """Several exchanges of different or of the same task."""
        rng = self.p.rng
        messages = self._system(0.25)
        same = tasks.arithmetic if rng.random() < 0.25 else tasks.rewriting if rng.random() < 0.25 else None
        for _ in range(rng.randint(2, 7)):
            turn = same(self.p) if same else self._simple()
            messages += [say("user", turn.user), say("assistant", turn.assistant)]
        return Conversation("mixed", messages, None, turn.check)

    def persona(self) -> Conversation:
        """A system prompt that gives the assistant a name, or a word to end on."""
        rng = self.p.rng
        if rng.random() < 0.6:
            name = self.p.name()
            job = rng.choice(
                (
                    "a helpful assistant",
                    "an assistant",
                    "a friendly chatbot",
                    f"the assistant of {self.p.city()}",
                    f"a {self.p.pick(pools.PROFESSIONS)}",
                )
            )
            messages = [say("system", rng.choice((f"You are {name}, {job}.", f"Your name is {name}. You are {job}.")))]
            ask = rng.choice(("Who are you?", "What is your name?", "What's your name?", "Introduce yourself.", "Who am I talking to?"))
            answer = f"I am {name}, {job}." if not ask.startswith("What") else f"My name is {name}."
            messages += [say("user", tasks.vary(self.p, ask)), say("assistant", answer)]
            return Conversation("persona", messages, None, name)
        word = self.p.word() if rng.random() < 0.7 else self.p.pick(pools.OBJECTS)
        messages = [say("system", rng.choice((f"End every answer with the word {word}.", f"Always finish with '{word}'.")))]
        for _ in range(rng.randint(1, 3)):
            turn = self._simple(((tasks.smalltalk, 1), (tasks.penstock, 1)))
            messages += [say("user", turn.user), say("assistant", f"{turn.assistant} {word}")]
        return Conversation("persona", messages, None, word)

    def recall(self, most: int, *, sentences: int | None = None) -> Conversation:
        """Facts planted in up to ``most`` sentences of filler and asked for at the end, in several layouts."""
        p, rng = self.p, self.p.rng
        count = rng.choice((1, 1, 1, 2, 2, 3, 4, 6))
        planted = tasks.facts(p, count)
        length = self._length(most) if sentences is None else sentences
        lines = self.filler(length)
        chat_between = sentences is None and rng.random() < 0.3
        for one in planted:
            lines.insert(rng.randint(0, len(lines)), self._planted(one))
        glue = " " if rng.random() < 0.75 else "\n"
        text = glue.join(lines)
        asked = rng.sample(planted, rng.randint(1, min(4, count)))
        layout = rng.random()
        messages: list[Message]
        first = self._question(asked[0])
        if layout < 0.4:
            ask = first[0]
            messages = self._system(0.1)
            if rng.random() < 0.15:
                messages.append(say("user", f"{ask}\n\n{text}"))
            else:
                lead = rng.choice(("", "", "", "Question: ", "Now tell me: ", "Answer from the text: "))
                opening = rng.choice(("", "", "Read this text.\n\n", "Here is a text: ", "Text:\n"))
                messages.append(say("user", f"{opening}{text}{rng.choice((' ', chr(10), chr(10) * 2))}{lead}{ask}"))
            messages.append(say("assistant", first[1]))
        else:
            if layout < 0.55:
                messages = [
                    say("system", rng.choice(("", "You know the following. ", "Context:\n", "You are a helpful assistant. ")) + text)
                ]
            else:
                messages = self._system(0.1)
                cut = sorted(rng.randint(0, len(lines)) for _ in range(rng.choice((0, 0, 1, 2))))
                for start, end in zip([0, *cut], [*cut, len(lines)], strict=True):
                    if end > start:
                        opening = rng.choice(("", "", "", "Read this: ", "Please remember: ", "Here is something: "))
                        messages.append(say("user", opening + glue.join(lines[start:end])))
                        messages.append(
                            say("assistant", rng.choice(("OK.", "I have read it.", "I will remember that.", "Noted.", "All right.")))
                        )
            if chat_between or (layout >= 0.55 and rng.random() < 0.3):
                for _ in range(rng.randint(1, 4)):
                    turn = self._simple()
                    messages += [say("user", turn.user), say("assistant", turn.assistant)]
            messages += [say("user", first[0]), say("assistant", first[1])]
        expected = asked[0].value
        for one in asked[1:]:
            ask, answer = self._question(one)
            messages += [say("user", ask), say("assistant", answer)]
            expected = one.value
        if sentences is None and rng.random() < 0.12:
            told = {one.answer for one in planted}
            other = tasks.fact(p)
            if other.answer.removesuffix(f"{other.value}.") not in {answer.rsplit(" ", 1)[0] + " " for answer in told}:
                messages += [say("user", rng.choice(other.questions)), say("assistant", "I do not know: you have not told me that.")]
        return Conversation("recall", messages, None, expected)

    def _planted(self, one: Fact) -> str:
        """A fact as people plant it."""
        rng = self.p.rng
        roll = rng.random()
        if roll < 0.42:
            return one.statement
        if roll < 0.47 and one.answer.startswith("The ") and one.answer == f"{one.answer.split(' is ')[0]} is {one.value}.":
            thing = one.answer.split(" is ")[0]
            return f"{rng.choice(('Remember', 'Please remember', 'Note', 'Keep in mind'))} {thing[0].lower()}{thing[1:]} {one.value}."
        if roll < 0.75:
            return rng.choice(("Remember this: ", "Note: ", "Important: ", "Please remember: ", "Keep in mind: ", "Remember: ",
                               "By the way: ", "Hi! ", "Note this: ", "Do not forget: ")) + one.statement  # fmt: skip
        if roll < 0.88 and one.statement.startswith(("The ", "My ")):
            lead = rng.choice(("Remember that", "Please remember that", "Note that", "Keep in mind that", "I want you to know that",
                               "Please note that", "Do not forget that"))  # fmt: skip
            return f"{lead} {one.statement[0].lower()}{one.statement[1:]}"
        tail = rng.choice(("Remember that.", "Please remember it.", "Do not forget it.", "I will ask you later.", "Got it?",
                           "Keep it in mind.", "That is important."))  # fmt: skip
        return f"{one.statement} {tail}"

    def _question(self, one: Fact) -> tuple[str, str]:
        rng = self.p.rng
        ask = rng.choice(one.questions)
        if rng.random() < 0.12:
            return (
                f"{ask} {rng.choice(('Answer with the value only.', 'Only the value, please.', 'One word only.', 'Just the answer.'))}",
                one.value,
            )
        return tasks.vary(self.p, ask), one.answer

    def lookup(self, most: int) -> Conversation:
        """A table of pairs and questions about it: the densest practice in copying."""
        p, rng = self.p, self.p.rng
        draws: tuple[Callable[[], str], ...] = (p.word, p.code, p.name, lambda: p.pick(pools.OBJECTS), lambda: p.digits(1, 4), p.city,
                                                lambda: p.pick(pools.ANIMALS))  # fmt: skip
        keys, values = rng.choice(draws), rng.choice(draws)
        table: dict[str, str] = {}
        for _ in range(rng.randint(2, max(3, min(60, most)))):
            table.setdefault(keys(), values())
        link = rng.choice((": ", " = ", " -> ", " is ", " has "))
        text = rng.choice(("\n", ", ", "; ")).join(f"{key}{link}{value}" for key, value in table.items())
        messages: list[Message] = []
        names = list(table)
        lead = rng.choice(("Here is a table:\n", "", "Remember these pairs. ", "Table: "))
        forms = ("What is the value of {k}?", "What is {k}?", "{k}?", "Look up {k}.", "Which value belongs to {k}?")
        form = rng.choice(forms)
        value = ""
        for index in range(rng.randint(1, min(8, len(names)))):
            roll = rng.random()
            key = rng.choice(names)
            value = table[key]
            ask = form.format(k=key)
            if roll < 0.12 and len(names) > 1:
                place = rng.randrange(len(names) - 1)
                ask, value = f"Which entry comes after {names[place]}?", names[place + 1]
            elif roll < 0.18:
                key = p.word()
                if key not in table:
                    ask, value = form.format(k=key), "It is not in the table."
            messages.append(say("user", f"{lead}{text}\n{ask}" if index == 0 else ask))
            messages.append(say("assistant", value))
        return Conversation("lookup", messages, None, value)

    def tool_use(self, *, most_tools: int = 5) -> Conversation:
        """A conversation in which functions are offered, and mostly called."""
        p, rng = self.p, self.p.rng
        offered = tools.offers(p, rng.choice((1, 1, 2, 2, 3, 4, 5)[:] if most_tools >= 5 else (1, 1, 2)))
        messages = self._system(0.35)
        expected: Any = None
        for index in range(rng.choice((1, 1, 1, 2, 2, 3))):
            roll = rng.random()
            if roll < 0.14:
                turn = self._simple(_BESIDE_TOOLS)
                messages += [say("user", turn.user), say("assistant", turn.assistant)]
                expected = []
            elif roll < 0.18:
                other = tools.random_offer(p)
                if any(other.name.split("_")[-1].lower() in offer.name.lower() for offer in offered):
                    continue
                messages += [say("user", tasks.vary(p, other.ask(p)[0])), say("assistant", "I have no tool for that.")]
                expected = []
            else:
                part, expected = tools.tool_turns(p, offered, follow=index > 0 or rng.random() < 0.7)
                messages += part
                if part[-1].get("tool_calls"):
                    break
        if not messages or messages[-1]["role"] == "system":
            part, expected = tools.tool_turns(p, offered, follow=True)
            messages += part
        return Conversation("tools", messages, [offer.definition for offer in offered], expected)

    def extraction(self) -> Conversation:
        """JSON by schema, once or twice in a row."""
        turn = tools.json_task(self.p)
        messages = turn.messages
        if messages[0]["role"] != "system" and self.p.rng.random() < 0.1:
            again = tools.json_task(self.p)
            if again.messages[0]["role"] != "system":
                messages = [*again.messages, *messages]
        return Conversation("json", messages, None, turn.expected, turn.schema)

    def draw(self, most_tokens: int) -> Conversation:
        """The next conversation of the training mix, of roughly ``most_tokens`` tokens at most."""
        room = int(most_tokens * 0.85 / _TOKENS_PER_SENTENCE) - 8
        roll = self.p.rng.random()
        if roll < 0.33:
            return self.single()
        if roll < 0.47:
            return self.mixed()
        if roll < 0.49:
            return self.persona()
        if roll < 0.64:
            return self.recall(min(room, 250))
        if roll < 0.69:
            return self.lookup(room)
        if roll < 0.88:
            return self.tool_use(most_tools=5 if most_tokens > 600 else 2)
        return self.extraction()


# --- held-out cases -------------------------------------------------------------------------------------------


def _sum_case(sign: str) -> Callable[[Corpus, int], Conversation]:
    def case(corpus: Corpus, index: int) -> Conversation:
        del index
        turn = tasks.two_digit(corpus.p, sign)
        return Conversation("", [say("user", turn.user), say("assistant", turn.assistant)], None, turn.check)

    return case


def _recall_case(low: int, high: int) -> Callable[[Corpus, int], Conversation]:
    """One fact at a known place: ``low`` to ``high`` tokens of filler stand between it and the question."""

    def case(corpus: Corpus, index: int) -> Conversation:
        p, rng = corpus.p, corpus.p.rng
        planted = tasks.facts(p, 1 + index % 3)
        after = int(rng.uniform(low, high) / _TOKENS_PER_SENTENCE)
        lines = corpus.filler(after)
        for one in planted[1:]:
            lines.insert(rng.randint(0, len(lines)), one.statement)
        lines = [*corpus.filler(rng.randint(0, 12)), planted[0].statement, *lines]
        ask = rng.choice(planted[0].questions)
        answer = say("assistant", planted[0].answer)
        text = " ".join(lines)
        if index % 2:
            return Conversation("", [say("user", f"{text}\n\n{ask}"), answer], None, planted[0].value)
        return Conversation("", [say("user", text), say("assistant", "OK."), say("user", ask), answer], None, planted[0].value)

    return case


def _tool_case(kind: str) -> Callable[[Corpus, int], Conversation]:
    def case(corpus: Corpus, index: int) -> Conversation:
        del index
        p = corpus.p
        while True:
            offered = tools.offers(p, 1 if kind == "one" else p.rng.randint(2, 5))
            definitions = [offer.definition for offer in offered]
            if kind == "none":
                turn = corpus._simple(_BESIDE_TOOLS)
                return Conversation("", [say("user", turn.user), say("assistant", turn.assistant)], definitions, [])
            messages, expected = tools.tool_turns(p, offered, follow=False)
            if (len(expected) > 1) == (kind == "parallel"):
                return Conversation("", messages, definitions, expected)

    return case


def _answer_case(corpus: Corpus, index: int) -> Conversation:
    """The answer that follows a tool's result."""
    del index
    offered = tools.offers(corpus.p, corpus.p.rng.randint(1, 3))
    messages, _ = tools.tool_turns(corpus.p, offered, follow=True)
    return Conversation("", messages, [offer.definition for offer in offered], messages[-1]["content"])


def _json_case(corpus: Corpus, index: int) -> Conversation:
    del index
    turn = tools.json_task(corpus.p)
    return Conversation("", turn.messages, None, turn.expected, turn.schema)


def _turn_case(task: Callable[[Pools], Turn]) -> Callable[[Corpus, int], Conversation]:
    def case(corpus: Corpus, index: int) -> Conversation:
        del index
        turn = task(corpus.p)
        return Conversation("", [say("user", turn.user), say("assistant", turn.assistant)], None, turn.check or turn.assistant)

    return case


def _lookup_case(corpus: Corpus, index: int) -> Conversation:
    del index
    return corpus.lookup(60)


# How an answer is judged: "number" (its last number), "contains", "exact", "calls", "json" or "fluent" (not judged).
CASES: Final[dict[str, tuple[str, Callable[[Corpus, int], Conversation]]]] = {
    "addition": ("number", _sum_case("+")),
    "subtraction": ("number", _sum_case("-")),
    "recall, up to 500 tokens": ("contains", _recall_case(0, 500)),
    "recall, 500 to 1000 tokens": ("contains", _recall_case(500, 1000)),
    "recall, 1000 to 2000 tokens": ("contains", _recall_case(1000, 2000)),
    "recall, 2000 to 3000 tokens": ("contains", _recall_case(2000, 3000)),
    "tool call, one tool": ("calls", _tool_case("one")),
    "tool call, several tools": ("calls", _tool_case("many")),
    "tool calls in parallel": ("calls", _tool_case("parallel")),
    "no tool needed": ("calls", _tool_case("none")),
    "answer from a tool's result": ("exact", _answer_case),
    "JSON by schema": ("json", _json_case),
    "counting": ("exact", _turn_case(tasks.counting)),
    "rewriting": ("exact", _turn_case(tasks.rewriting)),
    "table look-up": ("exact", _lookup_case),
    "little facts (not held out)": ("contains", _turn_case(tasks.trivia)),
}


def cases(name: str, count: int, seed: int = 2024) -> list[Conversation]:
    """Held-out cases of one sort, always the same for a seed."""
    corpus = Corpus(seed + zlib.crc32(name.encode()), HELD_OUT)
    make = CASES[name][1]
    return [make(corpus, index)._replace(task=name) for index in range(count)]
