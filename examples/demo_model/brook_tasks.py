"""The plain-text tasks of Brook's corpus: small talk, questions about Penstock, sums, lists, counting, rewriting,
stories, little facts, and the recall of planted facts.

Each function returns one :class:`Turn`: what the user says, what a right answer is, and the value by which an
answer can be checked. This module knows nothing about chat templates, tools, JSON or tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Final, NamedTuple

import brook_pools as pools
from brook_pools import HELD_OUT, Pools


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Pairs written as ``left:right``: shorter to read than a table of quotes."""
    return tuple((left, right) for left, _, right in (pair.partition(":") for pair in text.split()))


class Turn(NamedTuple):
    """One exchange. ``check`` is the value a right answer must hold (empty where any fluent answer will do)."""

    user: str
    assistant: str
    task: str
    check: str = ""


NUMBER_WORDS: Final = pools.words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)


def vary(p: Pools, question: str) -> str:
    """The same question in the carelessness or politeness of different people."""
    rng = p.rng
    roll = rng.random()
    if roll < 0.55:
        return question
    if roll < 0.65:
        return question[0].lower() + question[1:]
    if roll < 0.75:
        return question.rstrip("?.!")
    if roll < 0.82:
        return question[0].lower() + question[1:].rstrip("?.!")
    if roll < 0.88:
        return rng.choice(("Please answer: ", "Question: ", "Tell me: ", "Quick question: ", "OK. ")) + question
    if roll < 0.94:
        return rng.choice(("Hi! ", "Hello. ", "Hey, ", "Thanks. ", "Great. ", "Hi Brook, ")) + question
    return question + rng.choice((" Please.", " Thanks.", " Thank you.", " I am curious.", " Be brief."))


_NO_SENSES: Final = "I cannot know that: I have no clock and no network. A tool could tell me."

# --- small talk -----------------------------------------------------------------------------------------------

_TALK: Final[tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = (
    (
        (
            "Hello",
            "Hello!",
            "Hi",
            "Hi!",
            "Hey",
            "Hey there",
            "Hi there!",
            "Good day",
            "Greetings",
            "Hello there",
            "Hello Brook",
            "Hi Brook!",
            "Yo",
            "Howdy",
        ),
        ("Hello! How can I help you?", "Hi! What can I do for you?", "Hello! What would you like to know?"),
    ),
    (("Good morning", "Good morning!"), ("Good morning! How can I help you?",)),
    (("Good evening", "Good evening!"), ("Good evening! How can I help you?",)),
    (
        ("How are you?", "How are you doing?", "How is it going?", "How do you feel today?", "What's up?", "Are you well?"),
        ("I am running well, thank you. How can I help you?", "All my tokens flow well, thank you. And you?"),
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "What's your name?",
            "Introduce yourself.",
            "Tell me about yourself.",
            "Who am I talking to?",
            "Do you have a name?",
            "Say who you are.",
            "Which model are you?",
            "What model is this?",
        ),
        ("I am Brook, the small demo model of Penstock.", "My name is Brook. I am the tiny chat model that ships with Penstock."),
    ),
    (
        (
            "What can you do?",
            "What can you help me with?",
            "What are you able to do?",
            "What are you good at?",
            "Help",
            "Help me",
            "What tasks do you know?",
            "List your skills.",
            "How can you help me?",
        ),
        (
            "I can talk about Penstock, add and subtract two-digit numbers, recall facts you told me, make lists, count, "
            "rewrite text, tell short stories, fill in JSON and call tools.",
        ),
    ),
    (
        (
            "What can't you do?",
            "What are your limits?",
            "Are you reliable?",
            "Can I trust you?",
            "Do you make mistakes?",
            "What are you bad at?",
        ),
        ("I am a tiny demo model. I know little about the world, I often make mistakes, and I should not be relied on.",),
    ),
    (
        ("Are you human?", "Are you a person?", "Are you a robot?", "Are you an AI?", "Are you real?", "Am I talking to a bot?"),
        ("I am not a person. I am Brook, a small language model.",),
    ),
    (
        ("How big are you?", "How many parameters do you have?", "What is your size?", "Are you a large model?"),
        ("I am small: fewer than eight million parameters.", "I have fewer than eight million parameters."),
    ),
    (
        (
            "How were you trained?",
            "What were you trained on?",
            "Where does your training data come from?",
            "Who made you?",
            "Who built you?",
            "Who created you?",
        ),
        ("The Penstock project trained me on synthetic text that its own script generates.",),
    ),
    (
        ("What is your context length?", "How much text can you read?", "How long is your context?", "How large is your context window?"),
        ("My context holds 4096 tokens.",),
    ),
    (
        ("Do you speak German?", "Which languages do you speak?", "Can you speak French?", "What languages do you know?"),
        ("I only know English.",),
    ),
    (
        ("Thanks", "Thank you", "Thanks!", "Thank you very much", "Thanks a lot", "Great, thanks", "Cheers", "Much appreciated"),
        ("You are welcome!", "My pleasure!", "You are welcome. Is there anything else?"),
    ),
    (
        ("Bye", "Goodbye", "See you", "See you later", "Good night", "Bye bye", "Farewell", "That is all."),
        ("Goodbye!", "Goodbye! Come back soon.", "See you!"),
    ),
    (
        ("Good job", "Well done", "You are great", "Nice work", "I like you", "You are smart", "Awesome", "Perfect"),
        ("Thank you! That is kind.", "Thank you! I am glad to help."),
    ),
    (
        ("You are wrong", "That is wrong", "That is not right", "You made a mistake", "Bad answer"),
        ("I am sorry. I am a small model and I make mistakes. Please ask again.",),
    ),
    (
        ("OK", "Okay", "I see", "Alright", "Fine", "Cool", "Interesting", "Sure"),
        ("Good. What would you like to do next?", "All right. What else can I do?"),
    ),
    (("Yes", "No", "Maybe"), ("All right. What would you like to do next?",)),
    (
        ("Tell me a joke", "Tell me a joke.", "Do you know a joke?", "Make me laugh."),
        ("Why did the token cross the block? To get to the next page.", "Why was the cache so calm? It had seen it all before."),
    ),
    (("Say something", "Say anything.", "Surprise me."), ("Water finds its way, and so do tokens.",)),
    (
        ("Test", "Testing", "This is a test", "Ping", "Are you there?", "Is anyone there?", "Can you hear me?"),
        ("I am here. How can I help you?",),
    ),
    (("What is the weather?", "What time is it?", "What day is it today?", "What is the news?"), (_NO_SENSES,)),
)

_PENSTOCK: Final[tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = (
    (
        (
            "What is Penstock?",
            "What's Penstock?",
            "Tell me about Penstock.",
            "Explain Penstock.",
            "Describe Penstock.",
            "What does Penstock do?",
            "What is this server?",
            "Penstock?",
            "Do you know Penstock?",
            "What is Penstock for?",
            "Can you explain what Penstock is?",
            "In one sentence, what is Penstock?",
        ),
        (
            "Penstock is an LLM inference server written in Python. It is built from actors that exchange messages, and it "
            "serves models through an OpenAI-compatible API.",
            "Penstock is a server for language models, written in Python, with continuous batching, a paged KV cache and plugins.",
        ),
    ),
    (
        (
            "Which language is Penstock written in?",
            "What language is Penstock written in?",
            "Is Penstock written in Python?",
            "What is Penstock written in?",
        ),
        ("Penstock is written in Python.",),
    ),
    (
        (
            "How is Penstock built?",
            "What is the architecture of Penstock?",
            "How does Penstock work?",
            "How does Penstock work inside?",
            "Explain the design of Penstock.",
        ),
        (
            "Penstock is made of actors that exchange messages. A scheduler forms batches, workers run the model, and a "
            "paged KV cache keeps what was computed.",
        ),
    ),
    (
        ("What is an actor?", "What are actors?", "What is an actor in Penstock?", "Why does Penstock use actors?"),
        ("An actor is a part of the server with its own state and mailbox. Actors share nothing and only exchange messages.",),
    ),
    (
        (
            "What is continuous batching?",
            "Explain continuous batching.",
            "How does Penstock batch requests?",
            "Does Penstock batch requests?",
            "What does continuous batching mean?",
        ),
        (
            "With continuous batching, requests join and leave the running batch at every step, so a new request need not "
            "wait until the others end.",
        ),
    ),
    (
        (
            "What is a paged KV cache?",
            "What is the KV cache?",
            "Explain the paged KV cache.",
            "How does the KV cache work?",
            "What is paging in Penstock?",
        ),
        (
            "The KV cache keeps the keys and values of past tokens. Penstock keeps it in pages: blocks of 16 tokens that are "
            "handed out as needed.",
        ),
    ),
    (
        (
            "How large is a block?",
            "How many tokens are in a block?",
            "What is the block size?",
            "How big is a KV cache block?",
            "How many tokens does a block hold?",
        ),
        ("A block of the KV cache holds 16 tokens.",),
    ),
    (
        ("What is prefix caching?", "Explain prefix caching.", "Does Penstock cache prefixes?", "How does prefix caching work?"),
        (
            "Prefix caching keeps the blocks of a prompt's beginning, so that a later prompt with the same beginning need "
            "not compute them again.",
        ),
    ),
    (
        (
            "How do plugins work?",
            "What are plugins?",
            "Does Penstock have plugins?",
            "How can I extend Penstock?",
            "How do I write a plugin?",
            "What is pluggy?",
            "Which hook system does Penstock use?",
        ),
        ("Penstock is extended by plugins. A plugin implements hooks, which are called through pluggy.",),
    ),
    (
        (
            "Which API does Penstock have?",
            "Is Penstock compatible with OpenAI?",
            "Which API does Penstock speak?",
            "What API does it offer?",
            "Can I use the OpenAI client with Penstock?",
            "Does Penstock have an OpenAI API?",
        ),
        ("Penstock has an OpenAI-compatible HTTP API, so OpenAI clients can talk to it.",),
    ),
    (
        (
            "Which port does Penstock use?",
            "What port is Penstock on?",
            "On which port does the API listen?",
            "What is the default port?",
            "Where does the server listen?",
        ),
        ("The API listens on port 8000.",),
    ),
    (
        (
            "Does Penstock stream?",
            "How does streaming work?",
            "What is SSE?",
            "Can Penstock stream tokens?",
            "Does Penstock support streaming?",
        ),
        ("Yes. Penstock streams tokens as server-sent events (SSE).", "Penstock streams each token as a server-sent event (SSE)."),
    ),
    (
        (
            "What is the license of Penstock?",
            "Which licence does Penstock have?",
            "Is Penstock open source?",
            "Is Penstock free?",
            "What licence is Penstock under?",
        ),
        ("Penstock is open source under the Apache-2.0 licence.",),
    ),
    (
        (
            "How do I start Penstock?",
            "How do I run Penstock?",
            "How can I run the server?",
            "How do I start the server?",
            "How do I serve a model?",
            "How do I use Penstock?",
            "How do I launch Penstock?",
        ),
        ("Run `make run`, or `penstock serve`. The API then listens on port 8000.",),
    ),
    (
        ("How do I run the tests?", "How do I test Penstock?", "Which command runs the tests?", "How can I run the tests?"),
        ("Run `make test`.",),
    ),
    (
        ("How do I chat with a model?", "How do I chat in the terminal?", "What does penstock chat do?", "Which command starts a chat?"),
        ("Run `penstock chat`. It opens a chat with the model in your terminal.",),
    ),
    (
        (
            "How do I measure speed?",
            "How do I benchmark Penstock?",
            "What does penstock bench do?",
            "How fast is Penstock?",
            "Which command measures the speed?",
        ),
        ("Run `penstock bench`. It measures throughput and latency.",),
    ),
    (
        ("Which commands does Penstock have?", "What commands are there?", "List the Penstock commands.", "What can I run?"),
        ("The commands are `penstock serve`, `penstock chat` and `penstock bench`.",),
    ),
    (("What does penstock serve do?", "What is penstock serve?"), ("`penstock serve` starts the server, which answers on port 8000.",)),
    (("What does make run do?", "What is make run?"), ("`make run` starts the server with the demo model.",)),
    (
        (
            "What is Brook?",
            "Who is Brook?",
            "What is the demo model?",
            "Which model ships with Penstock?",
            "Does Penstock come with a model?",
        ),
        ("Brook is the small demo model that ships with Penstock. That is me.",),
    ),
    (
        (
            "What is Brook-draft?",
            "What is the draft model?",
            "What is a draft model?",
            "What is speculative decoding?",
            "How does speculative decoding work?",
        ),
        (
            "In speculative decoding a small draft model proposes tokens and the larger model checks them in one step. "
            "Brook-draft is the draft model for Brook.",
        ),
    ),
    (
        ("What is a token?", "What are tokens?", "Explain tokens."),
        ("A token is a piece of text, often a word or a part of one. A language model reads and writes tokens.",),
    ),
    (
        ("What is a language model?", "What is an LLM?", "What does LLM mean?", "Explain language models."),
        ("A language model predicts the next token of a text. LLM is short for large language model.",),
    ),
    (
        ("What is inference?", "What does inference mean?", "What is an inference server?"),
        ("Inference means running a trained model. An inference server does so for many requests at once.",),
    ),
    (
        ("What is a penstock?", "What does the word penstock mean?", "Why is it called Penstock?"),
        ("A penstock is a pipe or gate that leads water to a turbine. Penstock leads tokens to you.",),
    ),
    (
        ("Can Penstock call tools?", "Does Penstock support tools?", "How do tool calls work?", "What is a tool call?"),
        (
            "Yes. A model can answer with a tool call: a function's name and its arguments as JSON. The client runs it and "
            "sends the result back.",
        ),
    ),
    (
        ("What is a scheduler?", "What does the scheduler do?"),
        ("The scheduler decides at every step which requests run, so that the memory suffices and nobody waits too long.",),
    ),
    (("What is a KV cache block?", "What is a block?"), ("A block is a page of the KV cache. It holds the keys and values of 16 tokens.",)),
    (
        ("What is a prompt?", "What is a system prompt?"),
        ("A prompt is the text that a model gets. A system prompt comes first and says how to behave.",),
    ),
    (
        ("What is temperature?", "What does temperature do?", "What is sampling?"),
        ("Sampling draws the next token by its probability. A low temperature makes the likely tokens more likely.",),
    ),
)


def smalltalk(p: Pools) -> Turn:
    """Greetings and questions about the model itself."""
    asks, answers = p.rng.choice(_TALK)
    return Turn(vary(p, p.rng.choice(asks)), p.rng.choice(answers), "smalltalk")


def penstock(p: Pools) -> Turn:
    """Questions about the server."""
    asks, answers = p.rng.choice(_PENSTOCK)
    if p.rng.random() < 0.15:
        asks, answers = _PENSTOCK[0]
    return Turn(vary(p, p.rng.choice(asks)), p.rng.choice(answers), "penstock")


_UNKNOWN: Final = (
    "Who won the match {x}?", "Who wrote {t}?", "When was {n} born?", "What is the meaning of life?", "How tall is {n}?",
    "Write a Python program that sorts a list.", "Write an essay about {x}.", "What do you think about {x}?",
    "What is the population of {c}?", "How far is it from {c} to {x}?", "Who is {n}?", "Explain quantum physics.",
    "What happened in {y}?", "How do I cook {f}?", "Translate '{w}' into German.", "What is the square root of {y}?",
    "Why is the sky blue?", "What does {w} mean?", "Should I buy {x}?", "Prove that {w} is {w}.", "How old is {n}?",
    "What is the best {x} in {c}?", "Who is the president of {c}?", "How does a {w} work?", "What is love?",
    "Give me legal advice about {x}.", "What is {y} times {y}?", "Divide {y} by 7.", "What is a {w}?",
    "How much does a {x} cost?", "Where can I buy {f} in {c}?", "Which film should I watch?", "Solve x^2 = {y}.",
)  # fmt: skip


def unknown(p: Pools) -> Turn:
    """Questions beyond a tiny model, so that it learns to say so."""
    text = p.rng.choice(_UNKNOWN).format(
        x=p.noun_phrase(), t=p.title(), n=p.full_name(), c=p.city(), y=p.rng.randint(1000, 2030), f=p.pick(pools.FOODS),
        w=p.word(),
    )  # fmt: skip
    if p.rng.random() < 0.15:
        ask = p.rng.choice(("What is the weather in {c}?", "What's the weather like in {c}?", "What time is it in {c}?",
                            "What is the date today?", "What is the news from {c}?", "How warm is it in {c}?"))  # fmt: skip
        return Turn(vary(p, ask.format(c=p.city())), _NO_SENSES, "unknown")
    return Turn(vary(p, text), "I do not know that. I am only a small demo model.", "unknown")


# --- numbers --------------------------------------------------------------------------------------------------


def arithmetic_split(a: int, b: int, sign: str) -> str:
    """The split of one sum: a tenth of all pairs of operands is never trained, in neither order where order is idle."""
    if sign == "+" and a > b:
        a, b = b, a
    return HELD_OUT if zlib.crc32(f"{a}{sign}{b}".encode()) % 10 == 0 else pools.TRAIN


_ADD: Final = (
    "What is {a} + {b}?", "What is {a} plus {b}?", "{a} + {b}", "{a}+{b}", "{a} + {b} =", "{a}+{b}=?", "Add {a} and {b}.",
    "Calculate {a} + {b}.", "Compute {a} plus {b}.", "What is the sum of {a} and {b}?", "How much is {a} + {b}?",
    "How much is {a} plus {b}?", "What's {a} + {b}?", "Please add {b} to {a}.", "Can you add {a} and {b}?",
    "Solve {a} + {b}.", "What do you get if you add {a} and {b}?", "{a} plus {b}?", "Tell me {a} + {b}.",
    "What's {a}+{b}?", "What does {a} + {b} equal?", "Find the sum of {a} and {b}.", "I need {a} + {b}.",
)  # fmt: skip
_SUB: Final = (
    "What is {a} - {b}?", "What is {a} minus {b}?", "{a} - {b}", "{a}-{b}", "{a} - {b} =", "{a}-{b}=?",
    "Subtract {b} from {a}.", "Calculate {a} - {b}.", "Compute {a} minus {b}.", "How much is {a} - {b}?",
    "How much is {a} minus {b}?", "What's {a} - {b}?", "Take {b} away from {a}.", "Can you subtract {b} from {a}?",
    "Solve {a} - {b}.", "What is the difference when you take {b} from {a}?", "{a} minus {b}?", "Tell me {a} - {b}.",
    "What's {a}-{b}?", "What does {a} - {b} equal?", "I need {a} - {b}.",
)  # fmt: skip


def _operands(p: Pools, sign: str, low: int, high: int) -> tuple[int, int]:
    while True:
        a, b = p.rng.randint(low, high), p.rng.randint(low, high)
        if arithmetic_split(a, b, sign) == p.split:
            return a, b


def two_digit(p: Pools, sign: str | None = None) -> Turn:
    """A sum or difference of two two-digit numbers: the case the model card reports on."""
    rng = p.rng
    sign = sign or rng.choice("+-")
    a, b = _operands(p, sign, 10, 99)
    result = a + b if sign == "+" else a - b
    ask = rng.choice(_ADD if sign == "+" else _SUB).format(a=a, b=b)
    return Turn(vary(p, ask), f"{a} {sign} {b} = {result}", "arithmetic", str(result))


def arithmetic(p: Pools) -> Turn:
    """Sums and differences in many phrasings; two-digit ones above all."""
    rng = p.rng
    roll = rng.random()
    if roll < 0.55:
        return two_digit(p)
    sign = rng.choice("+-")
    low, high = rng.choice(((0, 9), (0, 99), (0, 99), (0, 99), (10, 99), (10, 99), (100, 999), (0, 999)))
    a, b = _operands(p, sign, low, high)
    result = a + b if sign == "+" else a - b
    if roll < 0.70:
        ask = vary(p, rng.choice(_ADD if sign == "+" else _SUB).format(a=a, b=b))
        return Turn(ask, f"{a} {sign} {b} = {result}", "arithmetic", str(result))
    if roll < 0.78:
        ask = rng.choice(_ADD if sign == "+" else _SUB).format(a=a, b=b)
        only = rng.choice(("Answer with the number only.", "Just the number.", "Only give the result.", "Reply with only the number."))
        return Turn(f"{ask} {only}" if rng.random() < 0.8 else f"{only} {ask}", str(result), "arithmetic", str(result))
    if roll < 0.92:
        return _word_problem(p, a, b, sign)
    if roll < 0.95:
        (a, b), c = _operands(p, "+", 1, 60), rng.randint(1, 60)
        while arithmetic_split(a + b, c, "+") != p.split:
            c = rng.randint(1, 60)
        ask = rng.choice(("What is {a} + {b} + {c}?", "Add {a}, {b} and {c}.", "{a} + {b} + {c}")).format(a=a, b=b, c=c)
        return Turn(vary(p, ask), f"{a} + {b} = {a + b}, and {a + b} + {c} = {a + b + c}", "arithmetic", str(a + b + c))
    if roll < 0.975:
        while a == b:
            b = rng.randint(low, high)
        larger = rng.random() < 0.5
        word = rng.choice(("larger", "bigger", "greater") if larger else ("smaller", "lower"))
        ask = rng.choice(("Which is {w}, {a} or {b}?", "Which number is {w}: {a} or {b}?")).format(w=word, a=a, b=b)
        best = max(a, b) if larger else min(a, b)
        return Turn(vary(p, ask), f"{best} is {word}.", "arithmetic", str(best))
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    ask = rng.choice(("What is {a} times {b}?", "{a} * {b}", "What is {a} x {b}?", "Multiply {a} by {b}.")).format(a=a, b=b)
    return Turn(vary(p, ask), f"{a} * {b} = {a * b}", "arithmetic", str(a * b))


def _word_problem(p: Pools, a: int, b: int, sign: str) -> Turn:
    rng = p.rng
    who, things, friend = p.name(), p.pick(pools.PLURALS), p.name()
    if sign == "+":
        total = a + b
        text, tail = rng.choice((
            (f"{who} has {a} {things} and buys {b} more. How many {things} does {who} have now?", f"{who} has {total} {things}."),
            (f"{who} has {a} {things}. {friend} gives {who} {b} more. How many {things} does {who} have?", f"{who} has {total} {things}."),
            (f"There are {a} {things} in one box and {b} in another. How many {things} are there in all?", f"there are {total} {things}."),
            (f"{who} finds {a} {things} and {friend} finds {b}. How many {things} do they have together?", f"they have {total} {things}."),
        ))  # fmt: skip
        return Turn(text, f"{a} + {b} = {total}, so {tail}", "arithmetic", str(total))
    while a < b or arithmetic_split(a, b, "-") != p.split:
        a, b = rng.randint(0, 99), rng.randint(0, 99)
    left = a - b
    text, tail = rng.choice((
        (f"{who} has {a} {things} and gives {b} to {friend}. How many {things} does {who} have left?", f"{who} has {left} {things} left."),
        (f"There are {a} {things} on the table. {who} takes {b}. How many are left?", f"{left} {things} are left."),
        (f"{who} had {a} {things} and lost {b} of them. How many {things} are left?", f"{left} {things} are left."),
    ))  # fmt: skip
    return Turn(text, f"{a} - {b} = {left}, so {tail}", "arithmetic", str(left))


def counting(p: Pools) -> Turn:
    """Counting up, down and in steps."""
    while True:
        turn = _any_counting(p)
        if pools.split_of(turn.assistant) == p.split:
            return turn


def _any_counting(p: Pools) -> Turn:
    rng = p.rng
    step = rng.choice((1, 1, 1, 1, 2, 2, 3, 5, 10))
    size = rng.randint(3, 20)
    start = rng.randint(0, 80) if rng.random() < 0.7 else rng.choice((0, 1))
    if step > 1 and rng.random() < 0.5:
        start -= start % step
    numbers = [start + step * index for index in range(size)]
    down = rng.random() < 0.3
    if down:
        numbers.reverse()
    a, b = numbers[0], numbers[-1]
    by = ""
    if step > 1:
        by = rng.choice((f" by {step}s", f" in steps of {step}", f" by {NUMBER_WORDS[step]}s" if step != 1 else ""))
    way = rng.choice((" down", " backwards", "")) if down else ""
    ask = rng.choice(("Count{way} from {a} to {b}{by}.", "Please count{way} from {a} to {b}{by}.",
                      "Count{way}{by} from {a} to {b}.", "Can you count{way} from {a} to {b}{by}?"))  # fmt: skip
    if not down and step == 1 and a == 1 and rng.random() < 0.5:
        ask = rng.choice(("Count to {b}.", "Count up to {b}.", "Can you count to {b}?"))
    if down and step == 1 and b == 0 and rng.random() < 0.5:
        ask = "Count down from {a}."
    answer = ", ".join(map(str, numbers))
    return Turn(vary(p, ask.format(way=way, a=a, b=b, by=by)), answer, "counting", answer)


# --- lists and little facts -----------------------------------------------------------------------------------


def listing(p: Pools) -> Turn:
    """Naming members of a category."""
    rng = p.rng
    category, members = rng.choice(list(pools.CATEGORIES.items()))
    count = rng.choice((2, 3, 3, 3, 4, 5, 5, 6, 7))
    chosen = rng.sample(members, count)
    spoken = NUMBER_WORDS[count] if rng.random() < 0.6 else str(count)
    style = rng.random()
    verb = rng.choice(("Name", "List", "Give me", "Tell me", "Write down", "Can you name", "Please name", "I need"))
    mark = "?" if verb.startswith("Can") else "."
    if style < 0.55:
        answer = ", ".join(chosen[:-1]) + " and " + chosen[-1]
        answer = answer[0].upper() + answer[1:] + "."
        ask = f"{verb} {spoken} {category}{mark}"
    elif style < 0.85:
        answer = "\n".join(f"{index}. {word}" for index, word in enumerate(chosen, 1))
        ask = rng.choice((f"Make a numbered list of {spoken} {category}.", f"{verb} {spoken} {category} as a numbered list{mark}"))
    else:
        answer = "\n".join(f"- {word}" for word in chosen)
        ask = rng.choice((f"Make a bullet list of {spoken} {category}.", f"{verb} {spoken} {category} as bullet points{mark}"))
    return Turn(vary(p, ask), answer, "listing")


_CAPITALS: Final = _pairs("Austria:Vienna Belgium:Brussels Bulgaria:Sofia Canada:Ottawa China:Beijing Croatia:Zagreb Cuba:Havana Denmark:Copenhagen "
    "Egypt:Cairo Estonia:Tallinn Finland:Helsinki France:Paris Germany:Berlin Ghana:Accra Greece:Athens Hungary:Budapest "
    "Iceland:Reykjavik India:Delhi Ireland:Dublin Italy:Rome Japan:Tokyo Kenya:Nairobi Latvia:Riga Norway:Oslo Peru:Lima "
    "Poland:Warsaw Portugal:Lisbon Romania:Bucharest Russia:Moscow Serbia:Belgrade Spain:Madrid Sweden:Stockholm "
    "Switzerland:Bern Thailand:Bangkok Turkey:Ankara Ukraine:Kyiv")  # fmt: skip
_OPPOSITES: Final = _pairs("hot:cold big:small up:down left:right open:closed day:night black:white fast:slow old:new high:low long:short "
    "happy:sad rich:poor wet:dry full:empty hard:soft light:dark loud:quiet strong:weak early:late near:far good:bad "
    "clean:dirty thick:thin wide:narrow deep:shallow true:false first:last inside:outside")  # fmt: skip
_SOUNDS: Final = _pairs("cat:meow dog:woof cow:moo sheep:baa duck:quack pig:oink frog:croak bee:buzz crow:caw lion:roar owl:hoot "
    "snake:hiss")  # fmt: skip
_MIXES: Final = (("blue", "yellow", "green"), ("red", "yellow", "orange"), ("red", "blue", "purple"),
                 ("white", "black", "gray"), ("red", "white", "pink"))  # fmt: skip


def trivia(p: Pools) -> Turn:
    """A few facts of the kind a child knows."""
    rng = p.rng
    kind = rng.randrange(7)
    if kind == 0:
        country, city = rng.choice(_CAPITALS)
        if rng.random() < 0.75:
            ask = rng.choice(("What is the capital of {x}?", "Name the capital of {x}.", "Which city is the capital of {x}?",
                              "capital of {x}", "Tell me the capital of {x}."))  # fmt: skip
            return Turn(vary(p, ask.format(x=country)), f"The capital of {country} is {city}.", "trivia", city)
        ask = vary(p, f"Which country has the capital {city}?")
        return Turn(ask, f"{city} is the capital of {country}.", "trivia", country)
    if kind == 1:
        left, right = rng.choice(_OPPOSITES)
        if rng.random() < 0.5:
            left, right = right, left
        ask = rng.choice(("What is the opposite of {x}?", "Give me the opposite of {x}.", "What is the antonym of {x}?"))
        return Turn(vary(p, ask.format(x=left)), f"The opposite of {left} is {right}.", "trivia", right)
    if kind == 2:
        animal, sound = rng.choice(_SOUNDS)
        return Turn(vary(p, f"What sound does a {animal} make?"), f"A {animal} goes {sound}.", "trivia", sound)
    if kind == 3:
        row, unit = rng.choice(((pools.DAYS, "day"), (pools.MONTHS, "month")))
        index = rng.randrange(len(row))
        if rng.random() < 0.5:
            return Turn(vary(p, f"Which {unit} comes after {row[index]}?"), f"{row[(index + 1) % len(row)]} comes after {row[index]}.",
                        "trivia", row[(index + 1) % len(row)])  # fmt: skip
        return Turn(vary(p, f"Which {unit} comes before {row[index]}?"), f"{row[index - 1]} comes before {row[index]}.",
                    "trivia", row[index - 1])  # fmt: skip
    if kind == 4:
        one, two, mixed = rng.choice(_MIXES)
        if rng.random() < 0.5:
            one, two = two, one
        return Turn(vary(p, f"What colour do you get if you mix {one} and {two}?"), f"{one.capitalize()} and {two} make {mixed}.",
                    "trivia", mixed)  # fmt: skip
    if kind == 5:
        count, things = rng.choice(((7, "days are in a week"), (12, "months are in a year"), (24, "hours are in a day"),
                                    (60, "minutes are in an hour"), (60, "seconds are in a minute"), (4, "seasons are there"),
                                    (8, "planets are there"), (26, "letters are in the alphabet")))  # fmt: skip
        return Turn(vary(p, f"How many {things}?"), f"{count} {things}." if "there" not in things else f"There are {count} {things.split()[0]}.",
                    "trivia", str(count))  # fmt: skip
    groups = ("fruits", "animals", "colours", "rivers", "countries", "trees", "metals", "instruments", "vegetables")
    one, two = rng.sample(groups, 2)
    inside = rng.random() < 0.5
    word = rng.choice(pools.CATEGORIES[one])
    if not inside and word in pools.CATEGORIES[two]:
        inside, two = True, one
    single = {"countries": "country"}.get(one if inside else two, (one if inside else two)[:-1])
    article = "an" if single[0] in "aeiou" else "a"
    verdict = f"Yes, {word} is {article} {single}." if inside else f"No, {word} is not {article} {single}."
    return Turn(vary(p, f"Is {word} {article} {single}?"), verdict, "trivia", verdict.split(",")[0])


# --- rewriting ------------------------------------------------------------------------------------------------


def rewriting(p: Pools) -> Turn:
    """Changing a text that the user gives."""
    while True:
        turn = _any_rewriting(p)
        if pools.split_of(turn.user.lower()) == p.split:
            return turn


def _any_rewriting(p: Pools) -> Turn:
    rng = p.rng
    if rng.random() < 0.5:
        text = p.phrase()
    else:
        text = " ".join(rng.choice((p.word(), p.pick(pools.ADJECTIVES), p.pick(pools.OBJECTS), p.pick(pools.ANIMALS)))
                        for _ in range(rng.randint(1, 7)))  # fmt: skip
    if rng.random() < 0.15:
        text = filler_sentence(p)
    if rng.random() < 0.25:
        text = text[0].upper() + text[1:]
    text = text.replace("'", "")
    words = text.split()
    quote = rng.choice(("'{}'", '"{}"', ": {}"))

    def ask(*forms: str) -> str:
        form = rng.choice(forms)
        given = quote.format(text)
        return form.replace(" {t}", given) if given.startswith(":") else form.format(t=given)

    kind = rng.randrange(15)
    if kind in (0, 1):
        user = ask("Write this in uppercase {t}", "Convert to uppercase {t}", "Uppercase {t}", "Make this upper case {t}",
                   "Put this in capital letters {t}", "Write in capitals {t}", "Rewrite in all caps {t}")  # fmt: skip
        answer = text.upper()
    elif kind == 2:
        if rng.random() < 0.7:
            text = text.upper() if rng.random() < 0.5 else text.title()
        user = ask("Write this in lowercase {t}", "Convert to lowercase {t}", "Lowercase {t}", "Make this lower case {t}")
        answer = text.lower()
    elif kind == 3:
        user = ask("Write this in title case {t}", "Convert to title case {t}", "Title case {t}", "Capitalize each word {t}")
        answer = " ".join(word[0].upper() + word[1:] for word in words)
    elif kind in (4, 5):
        user = ask("Reverse the order of the words {t}", "Reverse the words {t}", "Put the words in reverse order {t}",
                   "Write the words backwards {t}")  # fmt: skip
        answer = " ".join(reversed(words))
    elif kind in (6, 7):
        old, new = rng.choice(words), p.word() if rng.random() < 0.5 else p.pick(pools.OBJECTS)
        user = ask(f"Replace '{old}' with '{new}' in {{t}}", f"Replace {old} by {new} {{t}}", f"Swap the word {old} for {new} {{t}}")
        answer = " ".join(new if word == old else word for word in words)
    elif kind in (8, 9):
        while rng.random() < 0.35 and len(text) < 200:
            text = f"{text} {p.phrase()}"
        user = ask("Repeat {t}", "Repeat after me {t}", "Say {t}", "Echo {t}", "Repeat this exactly {t}", "Copy this text {t}")
        answer = text
    elif kind == 10:
        word = rng.choice(words)
        text = word
        user = ask("Spell {t}", "Spell the word {t}", "Spell this letter by letter {t}", "Write this with a hyphen between the letters {t}")
        answer = "-".join(word)
    elif kind == 11:
        user = ask("How many words are in {t}", "Count the words {t}", "How many words does this have {t}")
        answer = str(len(words))
    elif kind == 12:
        first = rng.random() < 0.5
        user = ask(*(("What is the first word of {t}", "Give me the first word {t}") if first else
                     ("What is the last word of {t}", "Give me the last word {t}")))  # fmt: skip
        answer = words[0] if first else words[-1]
    elif kind == 13:
        mark = rng.choice((", ", "-", "_", " | ", "/"))
        name = {", ": "commas", "-": "hyphens", "_": "underscores", " | ": "bars", "/": "slashes"}[mark]
        user = ask(f"Join the words with {name} {{t}}", f"Put {name} between the words {{t}}")
        answer = mark.join(words)
    else:
        old = rng.choice(words)
        user = ask(f"Remove the word '{old}' from {{t}}", f"Delete the word {old} {{t}}", f"Leave out {old} {{t}}")
        answer = " ".join(word for word in words if word != old) or "(empty)"
    return Turn(user, answer, "rewriting", answer)


# --- stories --------------------------------------------------------------------------------------------------

_OPENINGS: Final = ("Once there was {a} {adj} {hero} named {name}.", "{name} was {a} {adj} {hero} who lived near the {place}.",
                    "In a {adj2} {place} lived {a} {adj} {hero} called {name}.")  # fmt: skip
_WANTS: Final = ("Every day {name} dreamed of finding the {thing}.", "One morning {name} lost a {thing}.",
                 "One day {name} found a {thing} by the road.", "{name} wanted nothing more than a {thing}.")  # fmt: skip
_TRIES: Final = ("So {name} walked to the {place2} and asked {friend} the {animal} for help.",
                 "{name} looked in the {place2}, but only {friend} the {animal} was there.",
                 "On the way to the {place2}, {name} met {friend}, {a2} {adj2} {animal}.")  # fmt: skip
_TURNS: Final = ("{friend} smiled and said, 'Look under the {colour} {thing2}.'", "Together they looked all day and all night.",
                 "It began to rain, and they hid in a {thing2} until the sun came back.",
                 "{friend} knew a secret path, and they took it at once.")  # fmt: skip
_ENDS: Final = ("At last they found it, and they shared some {food}.", "In the end {name} was happy, and so was {friend}.",
                "From then on {name} and {friend} were best friends.", "They went home and ate {food} until the stars came out.")  # fmt: skip


def story(p: Pools) -> Turn:
    """A short template story, about what the user names if anything is named."""
    rng = p.rng
    hero, name = p.pick(pools.ANIMALS if rng.random() < 0.6 else pools.PROFESSIONS), p.name()
    adjective = p.pick(pools.ADJECTIVES)
    fields = {
        "hero": hero, "name": name, "adj": adjective, "adj2": p.pick(pools.ADJECTIVES), "place": p.pick(pools.PLACES),
        "place2": p.pick(pools.PLACES), "thing": p.pick(pools.OBJECTS), "thing2": p.pick(pools.OBJECTS), "friend": p.name(),
        "animal": p.pick(pools.ANIMALS), "colour": p.pick(pools.COLOURS), "food": p.pick(pools.FOODS),
        "a": "an" if adjective[0] in "aeiou" else "a",
    }  # fmt: skip
    fields["a2"] = "an" if fields["adj2"][0] in "aeiou" else "a"
    article = "an" if hero[0] in "aeiou" else "a"
    ask = rng.choice((
        "Tell me a story.", "Tell me a short story.", "Write a short story.", f"Tell me a story about {article} {hero}.",
        f"Write a short story about {article} {hero} named {name}.", f"Tell me a short story about {name} the {hero}.",
        f"I would like a story about {article} {hero}.", f"Write a story about a {fields['thing']} and {article} {hero}.",
        f"Can you tell me a story about {article} {hero} called {name}?", "Make up a story.",
    ))  # fmt: skip
    lines = [rng.choice(part).format(**fields) for part in (_OPENINGS, _WANTS, _TRIES, _TURNS, _ENDS)]
    return Turn(vary(p, ask), " ".join(lines), "story")


# --- facts to recall ------------------------------------------------------------------------------------------


class Fact(NamedTuple):
    """A planted fact: how it is stated, how it is asked for, the right answer and its value."""

    statement: str
    questions: tuple[str, ...]
    answer: str
    value: str


_CODE_NOUNS: Final = ("code", "code word", "password", "secret code", "secret word", "access code", "number", "magic number", "key",
                      "PIN", "passphrase", "serial number", "reference", "tracking number", "secret", "magic word",
                      "launch code", "special number", "security code", "passcode")  # fmt: skip
_LIKES: Final = (("fruit", pools.FRUITS), ("animal", pools.ANIMALS), ("colour", pools.COLOURS), ("color", pools.COLOURS),
                 ("food", pools.FOODS), ("city", pools.CITIES), ("instrument", pools.INSTRUMENTS), ("sport", pools.SPORTS),
                 ("tree", pools.TREES), ("flower", pools.FLOWERS), ("country", pools.COUNTRIES), ("river", pools.RIVERS))  # fmt: skip
_SELF: Final = (("name", None), ("dog's name", None), ("cat's name", None), ("sister's name", None), ("favourite colour", pools.COLOURS),
                ("favorite color", pools.COLOURS), ("favourite fruit", pools.FRUITS), ("favourite animal", pools.ANIMALS),
                ("favourite food", pools.FOODS), ("home town", pools.CITIES), ("job", pools.PROFESSIONS),
                ("lucky number", ()), ("room number", ()), ("birthday", ()))  # fmt: skip


def fact(p: Pools) -> Fact:
    """A random fact. The value never follows from anything but its own statement."""
    rng = p.rng
    kind = rng.randrange(13)
    if kind < 4:
        noun = rng.choice(_CODE_NOUNS)
        value = p.word() if "word" in noun and rng.random() < 0.5 else p.code()
        if rng.random() < 0.3:
            value = rng.choice((p.word(), p.pick(pools.FRUITS), p.pick(pools.ANIMALS), p.pick(pools.OBJECTS)))
        if kind == 0:
            return Fact(rng.choice((f"The {noun} is {value}.", f"The {noun} is '{value}'.")),
                        (f"What is the {noun}?", f"Tell me the {noun}.", f"What was the {noun}?", f"Do you remember the {noun}?"),
                        f"The {noun} is {value}.", value)  # fmt: skip
        if kind == 1:
            who = p.name()
            return Fact(rng.choice((f"{who}'s {noun} is {value}.", f"The {noun} of {who} is {value}.")),
                        (f"What is {who}'s {noun}?", f"Tell me {who}'s {noun}.", f"What is the {noun} of {who}?"),
                        f"{who}'s {noun} is {value}.", value)  # fmt: skip
        thing = p.noun_phrase()
        link = rng.choice(("for", "of"))
        return Fact(rng.choice((f"The {noun} {link} the {thing} is {value}.", f"The {noun} {link} the {thing} is {value}.",
                                f"For the {thing}, the {noun} is {value}.")),
                    (f"What is the {noun} {link} the {thing}?", f"Tell me the {noun} {link} the {thing}.",
                     f"Which {noun} belongs to the {thing}?", f"What was the {noun} {link} the {thing}?"),
                    f"The {noun} {link} the {thing} is {value}.", value)  # fmt: skip
    who = p.name() if rng.random() < 0.8 else p.full_name()
    if kind < 7:
        like, pool = rng.choice(_LIKES)
        value = p.pick(pool) if rng.random() < 0.85 else p.word()
        spelling = rng.choice(("favourite", "favorite"))
        return Fact(rng.choice((f"{who}'s {spelling} {like} is {value}.", f"The {spelling} {like} of {who} is {value}.")),
                    (f"What is {who}'s {spelling} {like}?", f"Which {like} does {who} like best?", f"Tell me {who}'s {spelling} {like}.",
                     f"What is the {spelling} {like} of {who}?"),
                    f"{who}'s {spelling} {like} is {value}.", value)  # fmt: skip
    if kind == 7:
        value = p.city()
        return Fact(f"{who} lives in {value}.", (f"Where does {who} live?", f"Which city does {who} live in?", f"In which city does {who} live?"),
                    f"{who} lives in {value}.", value)  # fmt: skip
    if kind == 8:
        value = p.pick(pools.PROFESSIONS)
        return Fact(f"{who} works as a {value}.", (f"What does {who} do for work?", f"What is {who}'s job?", f"What does {who} work as?"),
                    f"{who} works as a {value}.", value)  # fmt: skip
    if kind == 9:
        thing, value = p.noun_phrase(), p.pick(pools.PLACES)
        verb = rng.choice(("is in", "is hidden in", "is kept in", "was left in", "stands in"))
        return Fact(f"The {thing} {verb} the {value}.", (f"Where is the {thing}?", f"Where can I find the {thing}?"),
                    f"The {thing} {verb} the {value}.", value)  # fmt: skip
    if kind == 10:
        value, day = p.clock(), rng.choice(pools.DAYS)
        return Fact(rng.choice((f"The meeting with {who} is on {day} at {value}.", f"The meeting with {who} is at {value}.")),
                    (f"When is the meeting with {who}?", f"At what time is the meeting with {who}?"),
                    f"The meeting with {who} is at {value}.", value)  # fmt: skip
    if kind == 11:
        value, noun = str(rng.randint(2, 99)), p.pick(pools.PLURALS)
        return Fact(f"{who} has {value} {noun}.", (f"How many {noun} does {who} have?", f"How many {noun} has {who}?"),
                    f"{who} has {value} {noun}.", value)  # fmt: skip
    what, own = rng.choice(_SELF)
    if own is None:
        value = p.name()
    elif own:
        value = p.pick(own)
    else:
        value = p.date() if what == "birthday" else p.digits(1, 4)
    return Fact(f"My {what} is {value}.", (f"What is my {what}?", f"Do you remember my {what}?", f"Tell me my {what}.", f"What's my {what}?"),
                f"Your {what} is {value}.", value)  # fmt: skip


def facts(p: Pools, count: int) -> list[Fact]:
    """Several facts, no two of them about the same key."""
    found: dict[str, Fact] = {}
    while len(found) < count:
        one = fact(p)
        if pools.split_of(one.answer) != p.split:
            continue
        # Two facts may share a person or a thing, which makes good distractors, but never the whole question.
        found.setdefault(one.answer.removesuffix(f"{one.value}.").lower(), one)
    return list(found.values())


_FILLERS: Final[tuple[Callable[[Pools], str], ...]] = (
    lambda p: f"The {p.rng.choice(pools.ADJECTIVES)} {p.rng.choice(pools.ANIMALS)} slept beside the {p.rng.choice(pools.PLACES)}.",
    lambda p: f"In {p.rng.choice(pools.MONTHS)} the {p.rng.choice(pools.PLACES)} smells of {p.rng.choice(pools.FRUITS)} and {p.rng.choice(pools.FLOWERS)}.",
    lambda p: f"{p.name()} carried a {p.rng.choice(pools.OBJECTS)} to the {p.rng.choice(pools.PLACES)}.",
    lambda p: f"It rained in {p.city()} on {p.rng.choice(pools.DAYS)}.",
    lambda p: f"A {p.rng.choice(pools.PROFESSIONS)} sold {p.rng.randint(2, 90)} {p.rng.choice(pools.PLURALS)} at the {p.rng.choice(pools.PLACES)}.",
    lambda p: f"Nobody knew why the {p.rng.choice(pools.OBJECTS)} was so {p.rng.choice(pools.ADJECTIVES)}.",
    lambda p: f"The road from {p.city()} to {p.city()} is {p.rng.choice(pools.ADJECTIVES)} and {p.rng.choice(pools.ADJECTIVES)}.",
    lambda p: f"{p.name()} and {p.name()} talked about {p.rng.choice(pools.SPORTS)} for hours.",
    lambda p: f"There is a {p.rng.choice(pools.COLOURS)} {p.rng.choice(pools.OBJECTS)} in the {p.rng.choice(pools.PLACES)}.",
    lambda p: f"Page {p.rng.randint(1, 400)} shows a {p.rng.choice(pools.TREES)} and a {p.rng.choice(pools.ANIMALS)}.",
    lambda p: "The wind moved slowly over the water, and the boats moved with it.",
    lambda p: f"For lunch they had {p.rng.choice(pools.FOODS)} with {p.rng.choice(pools.VEGETABLES)}.",
    lambda p: f"The {p.word()} {p.rng.choice(pools.OBJECTS)} costs {p.rng.randint(2, 300)} coins.",
    lambda p: f"{p.name()} plays the {p.rng.choice(pools.INSTRUMENTS)} every {p.rng.choice(pools.DAYS)}.",
    lambda p: f"When the {p.rng.choice(pools.ANIMALS)} saw the {p.rng.choice(pools.ANIMALS)}, it ran into the {p.rng.choice(pools.PLACES)}.",
    lambda p: f"At {p.clock()} the train left for {p.city()}.",
    lambda p: f"Old maps call this place {p.word().capitalize()}.",
    lambda p: f"The {p.rng.choice(pools.PROFESSIONS)} from {p.rng.choice(pools.COUNTRIES)} painted the {p.rng.choice(pools.PLACES)} {p.rng.choice(pools.COLOURS)}.",
    lambda p: f"Most {p.rng.choice(pools.PLURALS)} are made of {p.rng.choice(pools.METALS)} or {p.rng.choice(pools.TREES)}.",
    lambda p: f"Somebody wrote '{p.word()} {p.word()}' on the {p.rng.choice(pools.OBJECTS)}.",
    lambda p: f"The river {p.rng.choice(pools.RIVERS)} was {p.rng.choice(pools.ADJECTIVES)} that year.",
    lambda p: "Then the evening came, and the lamps were lit one after another.",
    lambda p: f"Item {p.rng.randint(1, 999)}: {p.rng.choice(pools.ADJECTIVES)} {p.rng.choice(pools.OBJECTS)}, {p.rng.randint(1, 60)} pieces.",
    lambda p: f"[{p.clock()}] {p.rng.choice(('info', 'warning', 'debug'))}: {p.rng.choice(pools.NOUNS)} {p.code()} was {p.rng.choice(('opened', 'closed', 'moved', 'checked'))}.",
)  # fmt: skip


def filler_sentence(p: Pools) -> str:
    """One sentence that states no fact anyone asks for."""
    return p.rng.choice(_FILLERS)(p)
