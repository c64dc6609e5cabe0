"""The structured tasks of Brook's corpus: JSON that fits a schema, and tool calls with answers from their results.

Tools come in two sorts: about thirty written by hand, as people's first examples have them, and random ones made of
a verb, a noun and parameters, so that the model reads the offered signatures rather than knowing them.

This module knows nothing about chat templates or tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import brook_pools as pools
from brook_pools import Pools
from brook_tasks import vary

Json = Any
Value = tuple[Json, str]  # what the JSON holds, and how the text says it


class StructuredTurn(NamedTuple):
    """One exchange whose answer is checked by parsing it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    task: str
    expected: Json
    schema: dict[str, Any] | None = None


# --- values ---------------------------------------------------------------------------------------------------


def _text(draw: Callable[[Pools], str]) -> Callable[[Pools], Value]:
    def value(p: Pools) -> Value:
        text = draw(p)
        return text, text

    return value


def _integer(low: int, high: int) -> Callable[[Pools], Value]:
    def value(p: Pools) -> Value:
        number = p.rng.randint(low, high)
        return number, str(number)

    return value


def _decimal(low: int, high: int) -> Callable[[Pools], Value]:
    def value(p: Pools) -> Value:
        cents = p.rng.choice((0, 50, 25, 75, 90, p.rng.randint(1, 99)))
        number = float(f"{p.rng.randint(low, high)}.{cents:02d}")
        if p.rng.random() < 0.3:
            whole = int(number)
            return whole, str(whole)
        return number, str(number)

    return value


def _one_of(*options: str) -> Callable[[Pools], Value]:
    def value(p: Pools) -> Value:
        choice = p.rng.choice(options)
        return choice, choice

    return value


def _list_of(draw: Callable[[Pools], str]) -> Callable[[Pools], Value]:
    def value(p: Pools) -> Value:
        items: list[str] = []
        for _ in range(p.rng.randint(1, 4)):
            item = draw(p)
            if item not in items:
                items.append(item)
        return items, items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]

    return value


class Param(NamedTuple):
    """A parameter: the names it goes by, its JSON type, its values and what it is."""

    names: tuple[str, ...]
    type: str
    draw: Callable[[Pools], Value]
    about: str
    options: tuple[str, ...] = ()


def _schema_of(p: Pools, param: Param, *, described: bool) -> dict[str, Any]:
    out: dict[str, Any] = {"type": param.type}
    if param.type == "array":
        out["items"] = {"type": "string"}
    if described:
        out["description"] = param.about
    if param.options:
        out["enum"] = list(param.options)
    return out


_A_CITY: Final = _text(Pools.city)
_A_CODE: Final = _text(Pools.code)
_CITY: Final = Param(("city", "location", "place"), "string", _A_CITY, "Name of the city")
# Values that can stand in a row without quotes.
_SHORT: Final = (_A_CITY, _A_CODE)
_UNIT: Final = Param(("unit", "units"), "string", _one_of("celsius", "fahrenheit"), "Unit of temperature", ("celsius", "fahrenheit"))
_TEXT: Final = Param(("text", "message", "body", "content"), "string", _text(Pools.phrase), "The text")
_QUERY: Final = Param(("query", "q", "search_term"), "string", _text(Pools.phrase), "What to search for")


def _expression(p: Pools) -> str:
    rng = p.rng
    parts = [str(rng.randint(1, 999))]
    for _ in range(rng.choice((1, 1, 1, 2))):
        parts += [rng.choice("+-*/"), str(rng.randint(1, 999))]
    return " ".join(parts)


def _path(p: Pools) -> str:
    rng = p.rng
    folders = "/".join(rng.choice((p.word(), p.pick(pools.NOUNS))) for _ in range(rng.randint(1, 2)))
    return f"{rng.choice(('', '/', '/home/'))}{folders}/{p.word()}.{rng.choice(('txt', 'md', 'csv', 'json', 'py'))}"


class Known(NamedTuple):
    """A hand-written tool. Each request is (text, the parameters it mentions)."""

    names: tuple[str, ...]
    about: str
    params: tuple[Param, ...]
    required: int
    requests: tuple[str, ...]
    result: Callable[[Pools, dict[str, str]], tuple[Json, str]]


def _weather(p: Pools, said: dict[str, str]) -> tuple[Json, str]:
    rng = p.rng
    sky, degrees = rng.choice(("sunny", "cloudy", "rainy", "windy", "foggy", "clear", "snowy")), rng.randint(-9, 39)
    key = rng.choice(("temperature", "temp", "degrees"))
    sky_key = rng.choice(("condition", "conditions", "sky", "weather"))
    return {key: degrees, sky_key: sky}, f"It is {sky} in {said['0']}, with {degrees} degrees."


def _field(key: str, draw: Callable[[Pools], Value], answer: str) -> Callable[[Pools, dict[str, str]], tuple[Json, str]]:
    def result(p: Pools, said: dict[str, str]) -> tuple[Json, str]:
        value, text = draw(p)
        return {key: value}, answer.replace("{r}", text).format(*(said.get(str(index), "") for index in range(4)))

    return result


def _done(answer: str) -> Callable[[Pools, dict[str, str]], tuple[Json, str]]:
    def result(p: Pools, said: dict[str, str]) -> tuple[Json, str]:
        status = p.rng.choice(({"status": "ok"}, {"success": True}, {"ok": True}, {"status": "done"}))
        return status, answer.format(*(said.get(str(index), "") for index in range(4)))

    return result


_KNOWN: Final[tuple[Known, ...]] = (
    Known(("get_weather", "get_current_weather", "weather", "fetch_weather", "current_weather", "weather_lookup"),
          "Get the current weather in a city", (_CITY, _UNIT), 1,
          ("What is the weather in {0}?", "What's the weather like in {0}?", "How is the weather in {0}?", "How warm is it in {0}?",
           "Is it raining in {0}?", "Weather in {0}, please.", "Tell me the weather in {0} in {1}.", "What is the temperature in {0} in {1}?",
           "What's the weather in {0} today?", "Do I need an umbrella in {0}?", "Check the weather for {0}."), _weather),
    Known(("get_forecast", "weather_forecast"), "Get the weather forecast for a city",
          (_CITY, Param(("days", "num_days"), "integer", _integer(1, 10), "How many days ahead")), 2,
          ("Give me the forecast for {0} for {1} days.", "What will the weather be in {0} over the next {1} days?"), _weather),
    Known(("get_time", "get_current_time", "current_time", "time_in_city"), "Get the current time in a city", (_CITY,), 1,
          ("What time is it in {0}?", "Tell me the time in {0}.", "What is the time in {0}?", "Current time in {0}?"),
          _field("time", _text(Pools.clock), "It is {r} in {0}.")),
    Known(("calculator", "calculate", "compute", "evaluate", "calc"), "Evaluate an arithmetic expression",
          (Param(("expression", "expr", "formula"), "string", _text(_expression), "The expression"),), 1,
          ("Calculate {0}.", "What is {0}?", "Use the calculator for {0}.", "Compute {0}.", "How much is {0}?", "Evaluate {0}"),
          _field("result", _integer(1, 99999), "{0} = {r}")),
    Known(("add", "add_numbers", "sum_numbers", "plus"), "Add two numbers",
          (Param(("a", "x", "first"), "integer", _integer(1, 9999), "First number"),
           Param(("b", "y", "second"), "integer", _integer(1, 9999), "Second number")), 2,
          ("Add {0} and {1}.", "What is {0} + {1}?", "What is {0} plus {1}?", "Use the tool to add {0} and {1}."),
          _field("result", _integer(2, 19999), "{0} + {1} = {r}")),
    Known(("multiply", "multiply_numbers", "product"), "Multiply two numbers",
          (Param(("a", "x", "first"), "integer", _integer(1, 999), "First number"),
           Param(("b", "y", "second"), "integer", _integer(1, 999), "Second number")), 2,
          ("Multiply {0} by {1}.", "What is {0} times {1}?", "What is {0} * {1}?"), _field("result", _integer(2, 99999), "{0} * {1} = {r}")),
    Known(("search", "web_search", "search_web", "internet_search"), "Search the web", (_QUERY,), 1,
          ("Search for {0}.", "Search the web for {0}.", "Look up {0}.", "Find pages about {0}.", "Please search: {0}"),
          _field("top_result", _text(Pools.title), "The first result is {r}.")),
    Known(("send_email", "send_mail", "email"), "Send an e-mail",
          (Param(("to", "recipient", "address"), "string", _text(Pools.email), "Address of the recipient"),
           Param(("subject", "title"), "string", _text(Pools.title), "Subject line"), _TEXT), 3,
          ("Send an email to {0} with the subject '{1}' and the text '{2}'.", "Email {0}: subject {1}, body {2}",
           "Write to {0} with subject \"{1}\" saying \"{2}\"."), _done("I sent the e-mail to {0}.")),
    Known(("send_message", "send_text", "message", "send_sms"), "Send a message to a person",
          (Param(("to", "recipient", "contact", "name"), "string", _text(Pools.name), "Who gets the message"), _TEXT), 2,
          ("Send {0} a message: {1}", "Text {0} '{1}'.", "Tell {0} that {1}", "Message {0} saying \"{1}\"."), _done("I sent the message to {0}.")),
    Known(("set_timer", "start_timer", "timer"), "Start a timer",
          (Param(("minutes", "duration", "duration_minutes"), "integer", _integer(1, 120), "Length in minutes"),), 1,
          ("Set a timer for {0} minutes.", "Start a {0} minute timer.", "Timer for {0} minutes, please.", "Wake me in {0} minutes."),
          _done("The timer is set for {0} minutes.")),
    Known(("set_alarm", "create_alarm"), "Set an alarm", (Param(("time", "at"), "string", _text(Pools.clock), "Time of day"),), 1,
          ("Set an alarm for {0}.", "Wake me up at {0}.", "Alarm at {0}, please."), _done("The alarm is set for {0}.")),
    Known(("create_event", "add_event", "schedule_event", "create_calendar_event"), "Create a calendar event",
          (Param(("title", "name", "summary"), "string", _text(Pools.title), "Title of the event"),
           Param(("date", "day"), "string", _text(Pools.date), "Date of the event"),
           Param(("time", "start_time"), "string", _text(Pools.clock), "Start time")), 2,
          ("Create an event '{0}' on {1}.", "Add {0} to my calendar on {1} at {2}.", "Schedule '{0}' for {1} at {2}."),
          _done("The event {0} is in the calendar for {1}.")),
    Known(("convert_currency", "exchange", "currency_convert"), "Convert an amount from one currency to another",
          (Param(("amount", "value"), "number", _decimal(1, 900), "Amount of money"),
           Param(("from_currency", "source", "from"), "string", _one_of(*pools.CURRENCIES), "Currency to convert from"),
           Param(("to_currency", "target", "to"), "string", _one_of(*pools.CURRENCIES), "Currency to convert to")), 3,
          ("Convert {0} {1} to {2}.", "How much is {0} {1} in {2}?", "What is {0} {1} in {2}?"),
          _field("result", _decimal(1, 9000), "{0} {1} is {r} {2}.")),
    Known(("translate", "translate_text"), "Translate a text",
          (_TEXT, Param(("target_language", "language", "to", "target"), "string", _one_of(*pools.LANGUAGES), "Language to translate to")), 2,
          ("Translate '{0}' into {1}.", "Translate \"{0}\" to {1}.", "How do you say '{0}' in {1}?"),
          _field("translation", _text(lambda p: f"{p.word()} {p.word()}"), "In {1} that is: {r}")),
    Known(("get_stock_price", "stock_price", "get_quote"), "Get the price of a stock",
          (Param(("symbol", "ticker"), "string", _text(lambda p: "".join(p.rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(p.rng.randint(3, 4)))), "Ticker symbol"),), 1,
          ("What is the stock price of {0}?", "How is {0} trading?", "Price of {0}, please.", "Get the stock price for {0}."),
          _field("price", _decimal(1, 900), "{0} is at {r}.")),
    Known(("book_table", "reserve_table", "make_reservation"), "Book a table in a restaurant",
          (Param(("restaurant", "name"), "string", _text(Pools.title), "Name of the restaurant"),
           Param(("people", "guests", "party_size"), "integer", _integer(1, 12), "Number of guests"),
           Param(("time", "at"), "string", _text(Pools.clock), "Time of day")), 3,
          ("Book a table at {0} for {1} people at {2}.", "Reserve {0} for {1} at {2}.", "I need a table for {1} at {0} at {2}."),
          _done("The table at {0} is booked for {1} at {2}.")),
    Known(("play_music", "play_song", "play"), "Play a song",
          (Param(("song", "title", "track"), "string", _text(Pools.title), "Title of the song"),
           Param(("artist", "by"), "string", _text(Pools.full_name), "Name of the artist")), 1,
          ("Play {0}.", "Play {0} by {1}.", "Put on '{0}' by {1}.", "I want to hear {0}."), _done("Now playing {0}.")),
    Known(("turn_on_light", "switch_light", "set_light", "control_light"), "Switch the light in a room",
          (Param(("room", "location"), "string", _text(lambda p: p.pick(pools.PLACES)), "The room"),
           Param(("state", "mode"), "string", _one_of("on", "off"), "New state", ("on", "off"))), 2,
          ("Turn {1} the light in the {0}.", "Switch {1} the {0} light.", "Lights {1} in the {0}, please."), _done("The light in the {0} is {1}.")),
    Known(("set_temperature", "set_thermostat", "heat_room"), "Set the temperature of a room",
          (Param(("room", "zone"), "string", _text(lambda p: p.pick(pools.PLACES)), "The room"),
           Param(("degrees", "temperature", "value"), "integer", _integer(10, 30), "Degrees Celsius")), 2,
          ("Set the {0} to {1} degrees.", "Heat the {0} to {1} degrees.", "Make the {0} {1} degrees warm."), _done("The {0} is set to {1} degrees.")),
    Known(("get_order_status", "track_order", "order_status", "lookup_order"), "Look up the status of an order",
          (Param(("order_id", "id", "order"), "string", _A_CODE, "Number of the order"),), 1,
          ("Where is my order {0}?", "What is the status of order {0}?", "Track order {0}.", "Check order {0}, please."),
          _field("status", _one_of("shipped", "delivered", "pending", "cancelled", "packed", "delayed"), "Order {0} is {r}.")),
    Known(("get_user", "lookup_user", "find_user", "get_user_info"), "Look up a user",
          (Param(("user_id", "id", "user"), "string", _A_CODE, "Id of the user"),), 1,
          ("Who is user {0}?", "Look up user {0}.", "Find the user with id {0}.", "Get the name of user {0}."),
          _field("name", _text(Pools.full_name), "User {0} is {r}.")),
    Known(("read_file", "open_file", "cat_file", "get_file"), "Read a file",
          (Param(("path", "filename", "file"), "string", _text(_path), "Path of the file"),), 1,
          ("Read {0}.", "Show me the file {0}.", "What is in {0}?", "Open {0}."), _field("content", _text(Pools.phrase), "The file {0} says: {r}")),
    Known(("list_files", "ls", "list_directory"), "List the files of a folder",
          (Param(("path", "directory", "folder"), "string", _text(lambda p: "/" + p.word()), "Path of the folder"),), 1,
          ("List the files in {0}.", "What is in the folder {0}?", "Show {0}."),
          _field("files", _list_of(lambda p: p.word() + ".txt"), "The folder {0} holds {r}.")),
    Known(("search_flights", "find_flights", "book_flight"), "Search for flights",
          (Param(("origin", "from", "departure"), "string", _text(Pools.city), "City of departure"),
           Param(("destination", "to", "arrival"), "string", _text(Pools.city), "City of arrival"),
           Param(("date", "day"), "string", _text(Pools.date), "Date of departure")), 3,
          ("Find a flight from {0} to {1} on {2}.", "I want to fly from {0} to {1} on {2}.", "Book me a flight to {1} from {0} on {2}."),
          _field("flight", _text(Pools.code), "Flight {r} goes from {0} to {1} on {2}.")),
    Known(("get_distance", "distance", "route_length"), "Get the distance between two cities",
          (Param(("origin", "from_city", "start"), "string", _text(Pools.city), "First city"),
           Param(("destination", "to_city", "end"), "string", _text(Pools.city), "Second city")), 2,
          ("How far is it from {0} to {1}?", "What is the distance between {0} and {1}?"),
          _field("kilometers", _integer(20, 9000), "It is {r} kilometers from {0} to {1}.")),
    Known(("add_todo", "create_task", "add_task", "add_to_list"), "Add an item to the to-do list",
          (Param(("item", "task", "title", "text"), "string", _text(Pools.phrase), "What is to be done"),
           Param(("priority",), "string", _one_of("low", "medium", "high"), "Priority", ("low", "medium", "high"))), 1,
          ("Add '{0}' to my to-do list.", "Put \"{0}\" on my list.", "New task: {0}", "Add '{0}' with {1} priority."), _done("I added it to the list.")),
    Known(("roll_dice", "roll_die", "roll"), "Roll dice",
          (Param(("sides", "num_sides"), "integer", _integer(4, 20), "Sides of each die"),
           Param(("count", "rolls", "n"), "integer", _integer(1, 6), "How many dice")), 1,
          ("Roll a die with {0} sides.", "Roll {1} dice with {0} sides.", "Throw a {0}-sided die."), _field("total", _integer(1, 99), "You rolled {r}.")),
    Known(("get_capital", "capital_of"), "Get the capital of a country",
          (Param(("country", "name"), "string", _text(lambda p: p.pick(pools.COUNTRIES)), "Name of the country"),), 1,
          ("What is the capital of {0}?", "Look up the capital of {0}."), _field("capital", _text(Pools.city), "The capital of {0} is {r}.")),
    Known(("get_recipe", "find_recipe"), "Find a recipe", (Param(("dish", "name"), "string", _text(lambda p: p.pick(pools.FOODS)), "Name of the dish"),), 1,
          ("Find a recipe for {0}.", "How do I cook {0}?", "I want to make {0}."), _field("recipe", _text(Pools.title), "Try the recipe {r}.")),
    Known(("remember", "save_note", "take_note", "create_note"), "Save a note", (Param(("note", "text", "content"), "string", _text(Pools.phrase), "The note"),), 1,
          ("Note: {0}", "Take a note: {0}", "Remember that {0}", "Save a note saying '{0}'."), _done("I saved the note.")),
    Known(("get_news", "news", "headlines"), "Get the newest headline about a topic",
          (Param(("topic", "about", "subject"), "string", _text(lambda p: p.pick(pools.SPORTS) if p.rng.random() < 0.5 else p.word()), "The topic"),), 1,
          ("What is the news about {0}?", "News on {0}, please.", "Any headlines about {0}?"), _field("headline", _text(Pools.title), "The newest headline is: {r}")),
    Known(("random_number", "get_random_number"), "Draw a random number",
          (Param(("min", "low", "minimum"), "integer", _integer(0, 50), "Smallest number"),
           Param(("max", "high", "maximum"), "integer", _integer(51, 1000), "Largest number")), 2,
          ("Give me a random number between {0} and {1}.", "Draw a number from {0} to {1}."), _field("number", _integer(1, 999), "Your number is {r}.")),
)  # fmt: skip

_GENERIC: Final[tuple[Param, ...]] = (
    Param(("name", "customer", "owner", "person", "author", "assignee"), "string", _text(Pools.name), "Name of a person"),
    Param(("full_name", "contact_name", "driver"), "string", _text(Pools.full_name), "Full name"),
    Param(("city", "destination", "origin"), "string", _text(Pools.city), "Name of a city"),
    Param(("id", "code", "reference", "number", "key", "token"), "string", _text(Pools.code), "The identifier"),
    Param(("date", "due_date", "deadline", "start_date"), "string", _text(Pools.date), "A date"),
    Param(("time", "start_time", "pickup_time"), "string", _text(Pools.clock), "A time of day"),
    Param(("email", "address", "contact"), "string", _text(Pools.email), "An e-mail address"),
    Param(("quantity", "count", "limit", "amount", "size", "level", "pages", "seats"), "integer", _integer(1, 999), "How many"),
    Param(("price", "weight", "budget", "rate", "length"), "number", _decimal(1, 500), "A number"),
    Param(("title", "label", "subject", "heading"), "string", _text(Pools.title), "The title"),
    Param(("color", "colour"), "string", _text(lambda p: p.pick(pools.COLOURS)), "The colour"),
    Param(("item", "product", "object", "part"), "string", _text(Pools.noun_phrase), "The thing"),
    Param(("note", "comment", "message", "text", "description"), "string", _text(Pools.phrase), "Free text"),
    Param(("priority", "severity"), "string", _one_of("low", "medium", "high"), "Priority", ("low", "medium", "high")),
    Param(("language", "lang"), "string", _one_of(*pools.LANGUAGES), "Language"),
    Param(
        ("tags", "names", "guests", "labels"), "array", _list_of(lambda p: p.word() if p.rng.random() < 0.5 else p.name()), "Several names"
    ),
    Param(("category", "kind", "type", "group"), "string", _text(Pools.word), "The sort"),
)


def _one_boolean(p: Pools) -> Value:
    value = p.rng.random() < 0.5
    return value, "true" if value else "false"


_BOOLEAN: Final = Param(("urgent", "express", "public", "active", "gift", "draft", "notify"), "boolean", _one_boolean, "Yes or no")


def _spelled(p: Pools, name: str) -> str:
    """A function's name, in camel case now and then."""
    if p.rng.random() < 0.12:
        head, *tail = name.split("_")
        return head + "".join(part.capitalize() for part in tail)
    return name


_LINKS: Final = (" and ", " and in ", " and for ", " and also ")


class Offer(NamedTuple):
    """A tool as offered in one conversation, with what is needed to ask for it."""

    definition: dict[str, Any]
    ask: Callable[[Pools], tuple[str, dict[str, Json], dict[str, str]]]
    result: Callable[[Pools, dict[str, str]], tuple[Json, str]]
    name: str
    sort: str
    pair: Callable[[Pools], tuple[str, list[tuple[dict[str, Json], dict[str, str]]]]] | None = None


def _sorted_keys(value: Json) -> Json:
    if isinstance(value, dict):
        return {key: _sorted_keys(value[key]) for key in sorted(value)}
    return [_sorted_keys(item) for item in value] if isinstance(value, list) else value


def _definition(p: Pools, name: str, about: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required or p.rng.random() < 0.5:
        parameters["required"] = required
    tool: dict[str, Any] = {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}
    if p.rng.random() < 0.08:
        del tool["function"]["description"]
    # A Jinja environment that is not transformers' own sorts the keys.
    return tool if p.rng.random() < 0.75 else dict(_sorted_keys(tool))


def known_offer(p: Pools) -> Offer:
    """One of the hand-written tools, under one of its names."""
    rng = p.rng
    known = rng.choice(_KNOWN)
    if rng.random() < 0.06:
        known = _KNOWN[0]
    chosen: list[str] = []
    params = list(known.params)
    if len(params) > known.required and rng.random() < 0.4:
        params = params[: known.required]
    for param in params:
        free = [name for name in param.names if name not in chosen]
        chosen.append(free[0] if rng.random() < 0.5 else rng.choice(free) if rng.random() < 0.8 else p.word())
    described = rng.random() < 0.6
    properties = {name: _schema_of(p, param, described=described) for name, param in zip(chosen, params, strict=True)}
    name = known.names[0] if rng.random() < 0.3 else rng.choice(known.names)
    if rng.random() < 0.3:  # the name must be read, not known
        extra = p.pick(pools.NOUNS) if rng.random() < 0.7 else p.word()
        name = rng.choice((f"{name}_{extra}", f"{extra}_{name}", f"{name.split('_')[0]}_{extra}"))
    name = _spelled(p, name)
    about = known.about + rng.choice(("", "", "."))
    definition = _definition(p, name, about, properties, chosen[: known.required])
    requests = [text for text in known.requests if f"{{{len(params)}}}" not in text]

    def ask(p: Pools) -> tuple[str, dict[str, Json], dict[str, str]]:
        text = p.rng.choice(requests)
        arguments: dict[str, Json] = {}
        said: dict[str, str] = {}
        for index, (key, param) in enumerate(zip(chosen, params, strict=True)):
            if f"{{{index}}}" in text:
                arguments[key], said[str(index)] = param.draw(p)
        return text.format(*(said.get(str(index), "") for index in range(4))), arguments, said

    def pair(p: Pools) -> tuple[str, list[tuple[dict[str, Json], dict[str, str]]]]:
        """One sentence that asks the same for two or three values of the first parameter."""
        rng = p.rng
        text = rng.choice([text for text in requests if "{1}" not in text and "{0}" in text] or [""])
        drawn = [params[0].draw(p) for _ in range(rng.choice((2, 2, 3)))]
        names = [said for _, said in drawn]
        link = rng.choice(_LINKS)
        joined = ", ".join(names[:-1]) + link + names[-1]
        return (text.format(joined) if text else ""), [({chosen[0]: value}, {"0": said}) for value, said in drawn]

    fit = known.required == 1 and params[0].type == "string" and params[0].draw in _SHORT
    sort = "weather" if known.result is _weather else known.names[0]
    return Offer(definition, ask, known.result, name, sort, pair if fit else None)


def param_type(param: Param) -> str:
    """The JSON type of a parameter."""
    return param.type


def random_offer(p: Pools) -> Offer:
    """A tool made of a verb, a noun and random parameters."""
    rng = p.rng
    verb = noun = ""
    while not noun or pools.split_of(f"{verb} {noun}") != p.split:
        verb, noun = p.pick(pools.VERBS), p.pick(pools.NOUNS) if rng.random() < 0.8 else p.word()
    name = _spelled(p, f"{verb}_{noun.replace(' ', '_')}")
    params: dict[str, Param] = {}
    for param in rng.sample((*_GENERIC, _BOOLEAN), rng.choice((0, 1, 1, 2, 2, 2, 3, 3, 4))):
        params[rng.choice(param.names) if rng.random() < 0.85 else p.word()] = param
    described = rng.random() < 0.4
    properties = {key: _schema_of(p, param, described=described) for key, param in params.items()}
    keys = list(params)
    required = keys if rng.random() < 0.6 else keys[: rng.randint(0, len(keys))]
    about = rng.choice((f"{verb.capitalize()} a {noun}", f"{verb.capitalize()} the {noun}", f"Use this to {verb} a {noun}"))

    def ask(p: Pools) -> tuple[str, dict[str, Json], dict[str, str]]:
        rng = p.rng
        used = [key for key in keys if key in required or rng.random() < 0.6]
        arguments: dict[str, Json] = {}
        spoken: list[str] = []
        style = rng.random()
        for key in used:
            value, text = params[key].draw(p)
            arguments[key] = value
            words = key.replace("_", " ")
            if isinstance(value, bool) and style < 0.6:
                spoken.append(f"{words} {rng.choice(('on', 'yes', 'true')) if value else rng.choice(('off', 'no', 'false'))}")
            elif style < 0.25:
                spoken.append(f"{key}={text}")
            elif style < 0.32:
                spoken.append(f"{key} is {text}")
            elif style < 0.44:
                spoken.append(f"{words} of {text}")
            elif style < 0.54 and param_type(params[key]) in ("integer", "number"):
                spoken.append(f"{text} {words}")
            elif style < 0.60:
                spoken.append(f"the {words} {text}")
            elif " " in text and rng.random() < 0.5:
                spoken.append(f"{words} '{text}'")
            else:
                spoken.append(f"{words} {text}")
        order = list(spoken)
        if rng.random() < 0.2:
            rng.shuffle(order)
        tail = ""
        if order:
            tail = rng.choice((" with ", " with ", " with ", " for ", " of ", ": ")) + (
                order[0] if len(order) == 1 else ", ".join(order[:-1]) + " and " + order[-1]
            )
        if len(used) == 1 and rng.random() < 0.35 and not isinstance(arguments[used[0]], bool):
            value, bare = arguments[used[0]], order[0]
            bare = ", ".join(value) if isinstance(value, list) else str(value)
            tail = rng.choice((" {}", " for {}", " '{}'", ": {}", " of {}")).format(bare)
        article = "an" if noun[0] in "aeiou" else "a"
        text = rng.choice((f"Please {verb} the {noun}{tail}.", f"{verb.capitalize()} {article} {noun}{tail}.",
                           f"I want to {verb} {article} {noun}{tail}.", f"Can you {verb} the {noun}{tail}?",
                           f"Call {name}{tail}.", f"{verb.capitalize()} my {noun}{tail}."))  # fmt: skip
        return text, arguments, {}

    def result(p: Pools, said: dict[str, str]) -> tuple[Json, str]:
        del said
        rng = p.rng
        kind = rng.random()
        if kind < 0.35:
            return rng.choice(({"status": "ok"}, {"success": True}, {"ok": True})), f"Done: the {noun} call succeeded."
        if kind < 0.5:
            reason = p.phrase()
            return {"error": reason}, f"The {noun} call failed: {reason}"
        param = rng.choice(_GENERIC)
        key = rng.choice(param.names)
        value, text = param.draw(p)
        return {key: value}, f"Done. The {key.replace('_', ' ')} is {text}."

    return Offer(_definition(p, name, about, properties, required), ask, result, name, f"{verb} {noun}")


def offers(p: Pools, count: int) -> list[Offer]:
    """Different tools, offered together."""
    found: dict[str, Offer] = {}
    while len(found) < count:
        one = known_offer(p) if p.rng.random() < 0.5 else random_offer(p)
        # Two tools that do the same would leave open which of them is right.
        if one.sort not in {other.sort for other in found.values()}:
            found.setdefault(one.name, one)
    return list(found.values())


def _call(name: str, arguments: dict[str, Json]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _result_text(p: Pools, content: Json) -> str:
    return json.dumps(content, ensure_ascii=False) if p.rng.random() < 0.85 else json.dumps(content, separators=(",", ":"))


def tool_turns(p: Pools, offered: list[Offer], *, follow: bool) -> tuple[list[dict[str, Any]], Json]:
    """A request, the right call or calls, and (if ``follow``) the results and an answer made from them."""
    while True:
        messages, expected = _any_tool_turns(p, offered, follow=follow)
        # A request without arguments can be told apart by its function alone.
        if pools.split_of(messages[0]["content"]) == p.split or not any(call["arguments"] for call in expected):
            return messages, expected


def _any_tool_turns(p: Pools, offered: list[Offer], *, follow: bool) -> tuple[list[dict[str, Any]], Json]:
    rng = p.rng
    roll = rng.random()
    if roll < 0.82 or len(offered) == 1:
        chosen = [rng.choice(offered)]
        if roll < 0.10:
            chosen = chosen * rng.choice((2, 2, 3))
    else:
        chosen = rng.sample(offered, 2)
    if len(chosen) == 1 and chosen[0].pair and rng.random() < 0.15:
        together, parts = chosen[0].pair(p)
        if together and len({said["0"] for _, said in parts}) == len(parts):
            asked = [(together if index == 0 else "", arguments, said) for index, (arguments, said) in enumerate(parts)]
            chosen = chosen * len(parts)
        else:
            asked = [chosen[0].ask(p)]
    else:
        asked = [offer.ask(p) for offer in chosen]
    if len({json.dumps([offer.name, one[1]]) for offer, one in zip(chosen, asked, strict=True)}) < len(asked):
        chosen, asked = chosen[:1], asked[:1]
    texts = [text for text, _, _ in asked if text]
    if len(texts) == 1:
        user = vary(p, texts[0])
    else:
        joiner = rng.choice((" Also: ", " And: ", " Then: ", " ", "\n"))
        user = joiner.join(texts)
    calls = [_call(offer.name, arguments) for offer, (_, arguments, _) in zip(chosen, asked, strict=True)]
    messages: list[dict[str, Any]] = [{"role": "user", "content": user}, {"role": "assistant", "content": None, "tool_calls": calls}]
    expected = [{"name": call["function"]["name"], "arguments": call["function"]["arguments"]} for call in calls]
    if follow:
        answers = []
        for offer, (_, _, said) in zip(chosen, asked, strict=True):
            content, answer = offer.result(p, said)
            plain = rng.random() < 0.12  # many tools answer in words
            messages.append({"role": "tool", "content": answer if plain else _result_text(p, content)})
            answers.append(answer)
        messages.append({"role": "assistant", "content": " ".join(answers)})
    return messages, expected


# --- JSON by schema -------------------------------------------------------------------------------------------


class Attribute(NamedTuple):
    """A property of a record: its names, type, values and the ways a text says it of ``{s}``."""

    names: tuple[str, ...]
    type: str
    draw: Callable[[Pools], Value]
    said: tuple[str, ...]
    options: tuple[str, ...] = ()


def _who(p: Pools) -> str:
    return p.name() if p.rng.random() < 0.65 else p.full_name()


_STATES: Final = ("new", "used", "broken")
_SKIES: Final = ("sunny", "cloudy", "rainy", "snowy")

_RECORDS: Final[tuple[tuple[str, Callable[[Pools], str], tuple[str, ...], tuple[Attribute, ...]], ...]] = (
    ("person", _who, ("name", "first_name", "person"), (
        Attribute(("age", "years"), "integer", _integer(5, 95), ("{s} is {v} years old", "{s} is {v}", "{v}-year-old {s} is here")),
        Attribute(("city", "home", "town"), "string", _text(Pools.city), ("{s} lives in {v}", "{s} comes from {v}", "the home of {s} is {v}")),
        Attribute(("job", "profession", "occupation"), "string", _text(lambda p: p.pick(pools.PROFESSIONS)), ("{s} works as a {v}", "{s} is a {v} by trade")),
        Attribute(("email", "email_address"), "string", _text(Pools.email), ("the e-mail address is {v}", "you can write to {v}")),
        Attribute(("hobby", "sport"), "string", _text(lambda p: p.pick(pools.SPORTS)), ("{s} likes {v}", "the hobby of {s} is {v}")),
        Attribute(("surname", "last_name"), "string", _text(Pools.surname), ("the family name is {v}",)),
        Attribute(("children", "kids"), "integer", _integer(0, 9), ("{s} has {v} children",)),
        Attribute(("phone", "phone_number"), "string", _text(lambda p: f"555-{p.rng.randint(1000, 9999)}"), ("the phone number is {v}",)))),
    ("product", Pools.noun_phrase, ("product", "name", "item"), (
        Attribute(("price", "cost"), "number", _decimal(1, 900), ("the {s} costs {v} euros", "the price of the {s} is {v}", "it costs {v}")),
        Attribute(("color", "colour"), "string", _text(lambda p: p.pick(pools.COLOURS)), ("its colour is {v}", "it comes in {v}")),
        Attribute(("quantity", "stock", "count"), "integer", _integer(0, 500), ("there are {v} pieces left", "{v} are in the store")),
        Attribute(("material", "made_of"), "string", _text(lambda p: p.pick(pools.METALS)), ("it is made of {v}",)),
        Attribute(("sku", "code", "id"), "string", _text(Pools.code), ("its code is {v}", "it has the number {v}")),
        Attribute(("condition", "state"), "string", _one_of(*_STATES), ("it is {v}",), _STATES),
        Attribute(("in_stock", "available"), "boolean", _one_boolean, ("it is in stock", "it is sold out")))),
    ("event", Pools.title, ("title", "event", "name"), (
        Attribute(("date", "day"), "string", _text(Pools.date), ("{s} takes place on {v}", "the date is {v}", "it happens on {v}")),
        Attribute(("time", "start"), "string", _text(Pools.clock), ("it starts at {v}", "the start is at {v}")),
        Attribute(("place", "location", "venue"), "string", _text(Pools.city), ("the place is {v}", "it is held in {v}")),
        Attribute(("guests", "attendees", "speakers"), "array", _list_of(Pools.name), ("{v} will come", "the guests are {v}")),
        Attribute(("seats", "capacity"), "integer", _integer(10, 900), ("there are {v} seats", "the hall holds {v} people")),
        Attribute(("free", "free_entry"), "boolean", _one_boolean, ("entry is free", "entry is not free")))),
    ("order", Pools.code, ("order_id", "order", "id"), (
        Attribute(("item", "product"), "string", _text(Pools.noun_phrase), ("order {s} is for a {v}", "it contains a {v}")),
        Attribute(("quantity", "count"), "integer", _integer(1, 99), ("the quantity is {v}", "{v} pieces were ordered")),
        Attribute(("total", "price", "amount"), "number", _decimal(5, 900), ("the total is {v}", "it comes to {v} euros")),
        Attribute(("customer", "buyer"), "string", _text(Pools.full_name), ("the customer is {v}", "it was placed by {v}")),
        Attribute(("status",), "string", _one_of("open", "shipped", "paid"), ("its status is {v}", "the order is {v}"), ("open", "shipped", "paid")),
        Attribute(("express", "urgent"), "boolean", _one_boolean, ("it is urgent", "it is not urgent")))),
    ("trip", Pools.city, ("from", "origin", "start"), (
        Attribute(("to", "destination"), "string", _text(Pools.city), ("the trip goes from {s} to {v}", "the destination is {v}")),
        Attribute(("date", "departure"), "string", _text(Pools.date), ("it leaves on {v}", "the date is {v}")),
        Attribute(("passengers", "travellers"), "integer", _integer(1, 9), ("there are {v} passengers",)),
        Attribute(("transport", "by"), "string", _one_of("train", "bus", "plane"), ("they go by {v}",), ("train", "bus", "plane")))),
    ("weather", Pools.city, ("city", "location"), (
        Attribute(("temperature", "degrees"), "integer", _integer(-15, 40), ("in {s} it is {v} degrees", "the temperature is {v}")),
        Attribute(("condition", "sky"), "string", _one_of(*_SKIES), ("it is {v} in {s}", "the sky is {v}"), _SKIES),
        Attribute(("wind", "wind_speed"), "integer", _integer(0, 90), ("the wind blows at {v} kilometers per hour",)))),
    ("book", Pools.title, ("title", "book", "name"), (
        Attribute(("author", "writer"), "string", _text(Pools.full_name), ("{s} was written by {v}", "its author is {v}")),
        Attribute(("year", "published"), "integer", _integer(1800, 2030), ("it came out in {v}", "it was published in {v}")),
        Attribute(("pages", "length"), "integer", _integer(40, 990), ("it has {v} pages",)),
        Attribute(("language",), "string", _one_of(*pools.LANGUAGES), ("it is in {v}", "it was written in {v}")))),
    ("pet", Pools.name, ("name", "pet"), (
        Attribute(("species", "animal", "kind"), "string", _text(lambda p: p.pick(pools.ANIMALS)), ("{s} is a {v}",)),
        Attribute(("age",), "integer", _integer(1, 20), ("{s} is {v} years old", "it is {v} years old")),
        Attribute(("owner",), "string", _text(Pools.name), ("it belongs to {v}", "the owner is {v}")),
        Attribute(("color", "colour"), "string", _text(lambda p: p.pick(pools.COLOURS)), ("its colour is {v}",)))),
)  # fmt: skip


def _record(p: Pools) -> tuple[dict[str, Any], dict[str, Json], str, str]:
    """A schema, the right record, the text that states it and what it is about."""
    rng = p.rng
    about, subject_of, subject_names, attributes = rng.choice(_RECORDS)
    subject = subject_of(p)
    chosen = rng.sample(attributes, rng.randint(1, min(4, len(attributes))))
    key = rng.choice(subject_names)
    properties: dict[str, Any] = {key: {"type": "string"}}
    record: dict[str, Json] = {key: subject}
    spoken: list[str] = []
    named = False
    required = [key]
    for attribute in chosen:
        name = rng.choice([one for one in attribute.names if one not in properties] or [p.word()])
        schema: dict[str, Any] = {"type": attribute.type}
        if attribute.type == "array":
            schema["items"] = {"type": "string"}
        if attribute.options:
            schema["enum"] = list(attribute.options)
        properties[name] = schema
        if rng.random() < 0.06:
            continue  # an optional property that the text does not mention is left out
        value, text = attribute.draw(p)
        record[name] = value
        required.append(name)
        form = attribute.said[0 if value else 1] if attribute.type == "boolean" else rng.choice(attribute.said)
        named = named or "{s}" in form
        spoken.append(form.format(s=subject, v=text))
    if not named:
        lead = {"person": "This is about {s}", "product": "We sell a {s}", "event": "{s} is near", "order": "Order {s} arrived",
                "trip": "The trip starts in {s}", "weather": "Here is the weather of {s}", "book": "I read {s}",
                "pet": "The pet is called {s}"}[about]  # fmt: skip
        spoken.insert(0, lead.format(s=subject))
    if rng.random() < 0.3:
        text = " and ".join(spoken) if len(spoken) < 3 else ", ".join(spoken[:-1]) + " and " + spoken[-1]
        text = text[0].upper() + text[1:] + "."
    else:
        text = " ".join(one[0].upper() + one[1:] + "." for one in spoken)
    keys = list(properties)
    if rng.random() < 0.25:
        rng.shuffle(keys)
    full: dict[str, Any] = {"type": "object", "properties": {name: properties[name] for name in keys}}
    if rng.random() < 0.85:
        full["required"] = [name for name in keys if name in required]
    if rng.random() < 0.4:
        full["additionalProperties"] = False
    if rng.random() < 0.15:
        full = {"title": about.capitalize(), **full}
    return full, {name: record[name] for name in keys if name in record}, text, about


def _pairs_record(p: Pools) -> tuple[dict[str, Any], dict[str, Json], str, str]:
    """A record of random properties, stated as a list of pairs."""
    rng = p.rng
    properties: dict[str, Any] = {}
    record: dict[str, Json] = {}
    spoken: list[str] = []
    link = rng.choice((" is ", ": ", " = ", " "))
    for param in rng.sample((*_GENERIC, _BOOLEAN), rng.randint(1, 6)):
        key = rng.choice(param.names) if rng.random() < 0.7 else p.word()
        if key in properties:
            continue
        value, text = param.draw(p)
        properties[key] = _schema_of(p, param, described=False)
        record[key] = value
        if isinstance(value, bool):
            text = rng.choice(("yes", "true")) if value else rng.choice(("no", "false"))
        spoken.append(f"{key.replace('_', ' ')}{link}{text}")
    if rng.random() < 0.3:
        rng.shuffle(spoken)
    text = rng.choice(("; ", ", ", "\n", " and ")).join(spoken)
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return schema, record, text, p.pick(pools.NOUNS)


def json_task(p: Pools) -> StructuredTurn:
    """Extraction of a record from a text by a JSON schema, or by the names of its keys."""
    while True:
        turn = _any_json_task(p)
        if pools.split_of(json.dumps(turn.expected)) == p.split:
            return turn


def _any_json_task(p: Pools) -> StructuredTurn:
    rng = p.rng
    told = rng.random() < 0.7
    schema, record, text, about = _record(p) if told else _pairs_record(p)
    style = rng.random()
    written = (
        json.dumps(schema) if style < 0.7 else json.dumps(schema, separators=(",", ":")) if style < 0.85 else json.dumps(schema, indent=2)
    )
    # Without a schema only known keys say whether 17 is a number or a string.
    form = rng.random() * (1.0 if told else 0.85)
    messages: list[dict[str, Any]]
    if form < 0.3:
        lead = rng.choice(("Answer with JSON that fits this schema:", "Reply only with JSON that matches this schema:",
                           "Extract the data as JSON with this schema:", "You extract data. The answer is a JSON object with the schema",
                           "Respond in JSON. Schema:"))  # fmt: skip
        messages = [{"role": "system", "content": f"{lead}\n{written}"}, {"role": "user", "content": text}]
    elif form < 0.85:
        lead = rng.choice((f"Extract the {about} as JSON with this schema:", "Extract the data as JSON that fits this schema:",
                           "Fill in this JSON schema:", "Return JSON for the schema", "Answer in JSON with this schema:",
                           f"Give me the {about} as JSON. Schema:"))  # fmt: skip
        label = rng.choice(("Text: ", "", "Sentence: ", "Input: "))
        content = f"{lead}\n{written}\n{label}{text}" if rng.random() < 0.8 else f"{label}{text}\n{lead}\n{written}"
        messages = [{"role": "user", "content": content}]
    else:
        names = list(record)
        keys = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
        lead = rng.choice((f"Extract {keys} as JSON.", f"Return a JSON object with the keys {keys}.", f"Write this as JSON with the keys {keys}:",
                           f"Answer in JSON with {keys}."))  # fmt: skip
        messages = [{"role": "user", "content": f"{lead} {text}" if rng.random() < 0.7 else f"{text}\n{lead}"}]
    messages.append({"role": "assistant", "content": json.dumps(record, ensure_ascii=False)})
    return StructuredTurn(messages, None, "json", record, schema)


def fits(value: Json, schema: dict[str, Any]) -> bool:
    """Whether a value fits the few words of JSON Schema that the corpus uses."""
    kinds: dict[str, tuple[type, ...]] = {"string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
                                          "array": (list,), "object": (dict,)}  # fmt: skip
    kind = schema["type"]
    if not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    inner: Any = value
    if kind == "array":
        return all(fits(item, schema["items"]) for item in inner)
    if kind == "object":
        known = schema["properties"]
        return (all(name in inner for name in schema.get("required", ()))
                and all(name in known and fits(item, known[name]) for name, item in inner.items()))  # fmt: skip
    return True
