"""Write the texts of the demo: a small world of orders that go to a city by some day.

Two kinds of text come from here. ``pretraining_documents`` gives chats and plain sentences from
which the base model learns to read an order and to talk about it. ``chat_rows`` gives the rows of
the fine-tuning task, which the base never sees: answer an order with one compact JSON object. (It
does see JSON: it learns to copy given words into a list or an object, none of them of an order.)
Everything is drawn from seeded generators, so that equal arguments give equal texts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

Message = dict[str, str]
Chat = list[Message]

PLURALS = {
    "mug": "mugs", "box": "boxes", "knife": "knives", "scarf": "scarves", "brush": "brushes",
    "shelf": "shelves", "candle": "candles", "chair": "chairs", "lamp": "lamps",
    "kettle": "kettles", "pillow": "pillows", "blanket": "blankets", "bottle": "bottles",
    "basket": "baskets", "bicycle": "bicycles", "umbrella": "umbrellas", "torch": "torches",
    "notebook": "notebooks", "towel": "towels", "clock": "clocks", "jacket": "jackets",
    "teapot": "teapots", "bowl": "bowls", "vase": "vases", "cushion": "cushions",
    "backpack": "backpacks",
}  # fmt: skip
ITEMS = tuple(PLURALS)
COLOURS = (
    "red", "blue", "green", "yellow", "black", "white", "orange", "purple", "grey", "brown",
    "pink", "silver",
)  # fmt: skip
CITIES = (
    "Oslo", "Paris", "Rome", "Lima", "Cairo", "Delhi", "Tokyo", "Berlin", "Madrid", "Lisbon",
    "Vienna", "Prague", "Dublin", "Athens", "Zurich", "Boston", "Toronto", "Sydney", "Nairobi",
    "Havana", "Warsaw", "Helsinki", "Seoul", "Bergen",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jonas", "Kira",
    "Liam", "Maria", "Noah", "Olga", "Peter",
)  # fmt: skip
NUMBERS = {
    2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine",
    10: "ten", 11: "eleven", 12: "twelve",
}  # fmt: skip
# Other ways to say a number, used in a part of the orders that allow them.
NUMBER_PHRASES = {2: "a pair of", 12: "a dozen"}

# The names in the JSON objects about nothing in particular, which teach the base to write JSON.
KEYS = (
    "item", "colour", "count", "city", "day", "name", "age", "size", "code", "kind", "title",
    "price",
)  # fmt: skip
WORDS = (
    *ITEMS, *PLURALS.values(), *COLOURS, *CITIES, *DAYS, *NAMES, *NUMBERS.values(), *KEYS,
)  # fmt: skip

ORDERS = (
    "Please send {goods} to {city} by {day}.",
    "Could you ship {goods} to {city} before {day}?",
    "We need {goods} in {city} on {day}.",
    "{name} wants {goods} delivered to {city} on {day}.",
    "I would like to order {goods}. Deliver them to {city} by {day}, please.",
    "By {day}, {city} should have {goods}.",
    "Our shop in {city} is waiting for {goods}; they have to be there on {day}.",
    "Hello! {Goods} for {city}, please, to arrive on {day}.",
    "On {day} my sister in {city} has a birthday. Send her {goods}.",
    "The office in {city} has asked for {goods}, no later than {day}.",
    "{name} here. Can I get {goods} in {city} this {day}?",
    "Pack {goods} for the {day} van to {city}.",
    "Next {day} we open in {city} and still miss {goods}.",
    "For {city}: {goods}. {day} would be fine.",
    "A customer in {city} bought {goods} and expects them on {day}.",
    "My order is {goods}, and I live in {city}. Is {day} possible?",
)
CONFIRMATIONS = (
    "Of course. {Goods} will go to {city} and arrive on {day}.",
    "Thank you! I have noted {goods} for {city}, due on {day}.",
    "With pleasure. We will bring {goods} to {city} by {day}.",
    "All right, {city} gets {goods} on {day}. Anything else?",
)
TWO_ORDERS = (
    "Send {goods} to {city} and {goods2} to {city2}.",
    "{Goods} go to {city}, {goods2} go to {city2}.",
    "On {day} we ship {goods} to {city}; on {day2} we ship {goods2} to {city2}.",
)
STORIES = (
    "{name} works in {city}. Every {day} a van brings {goods} to the shop. {name} unpacks the "
    "{items} and puts them on the shelf.",
    "There were {goods} in the window. {name} came from {city} and bought all the {items} on "
    "{day}.",
    "It was {day}, and the van to {city} was late again. {name} counted the {items}: {number}, "
    "and every one of them was {colour}.",
    "In {city} it rained on {day}. {name} stayed at home, made tea and looked at the {colour} "
    "{items}.",
)  # fmt: skip
SMALL_TALK = (
    ("Hello!", "Hello! What can I send for you today?"),
    ("Hi, how are you?", "I am fine, thank you. What would you like to order?"),
    ("Good morning!", "Good morning! How can I help you?"),
    ("Who are you?", "I am a small order desk. I read your orders and answer questions on them."),
    ("What can you do?", "Send me an order, and I can tell you what goes where, and when."),
    ("Thank you!", "You are welcome!"),
    ("Thanks, that is all.", "You are welcome! Have a nice day."),
    ("Goodbye!", "Goodbye! Come back soon."),
    ("Are you a person?", "No, I am a very small language model."),
    ("What do you sell?", "Mugs, lamps, chairs and many other things, in twelve colours."),
)
# The short questions get one word, the long ones a sentence.
QUESTIONS = (
    ("What colour?", "{colour}"),
    ("What colour are the {items}?", "The {items} are {colour}."),
    ("What item?", "{items}"),
    ("What was ordered?", "{Items}, {number} of them."),
    ("What is one of them called?", "{item}"),
    ("How many?", "{number}"),
    ("How many, in digits?", "{count}"),
    ("How many {items} are there?", "There are {number} {items}."),
    ("Where to?", "{city}"),
    ("Where do the {items} go?", "The {items} go to {city}."),
    ("Which day?", "{day}"),
    ("When do they have to be there?", "They have to be there on {day}."),
)
# What needs a longer answer is asked more often, since it takes longer to learn.
TASKS = (
    ("Repeat the order.", "{order}"),
    (
        "List the details.",
        "- what: {items}\n- colour: {colour}\n- how many: {number}\n- where: {city}\n- when: {day}",
    ),
)
# Every printable ASCII character but the space: they are what ``repeat_chat`` glues words with.
SIGNS = tuple(chr(code) for code in range(33, 127))
SYSTEM_PROMPTS = (
    "You are a helpful order desk.",
    "You read orders and answer in short.",
    "You are a friendly assistant.",
)


@dataclass(frozen=True)
class Facts:
    """What an order says."""

    item: str
    colour: str
    count: int
    city: str
    day: str

    def as_json(self) -> str:
        """Return the facts as the compact JSON object that fine-tuning teaches."""
        return json.dumps(vars(self), separators=(",", ":"), ensure_ascii=False)


def draw_facts(rng: random.Random, avoid: Collection[Facts] = ()) -> Facts:
    """Draw facts that are not in ``avoid``."""
    while True:
        facts = Facts(
            rng.choice(ITEMS),
            rng.choice(COLOURS),
            rng.choice(tuple(NUMBERS)),
            rng.choice(CITIES),
            rng.choice(DAYS),
        )
        if facts not in avoid:
            return facts


def capitalise(text: str) -> str:
    """Return the text with its first letter in upper case, the rest as it was."""
    return text[:1].upper() + text[1:]


def draw_words(facts: Facts, rng: random.Random) -> dict[str, str]:
    """Draw the words in which a text tells the facts: the values of the fields of the templates."""
    items, number = PLURALS[facts.item], NUMBERS[facts.count]
    amount = number
    if facts.count in NUMBER_PHRASES and rng.random() < 0.4:
        amount = NUMBER_PHRASES[facts.count]
    goods = f"{amount} {facts.colour} {items}"
    if rng.random() < 0.25:
        goods = f"{amount} {items} in {facts.colour}"
    return {
        "item": facts.item,
        "items": items,
        "Items": capitalise(items),
        "colour": facts.colour,
        "count": str(facts.count),
        "number": number,
        "goods": goods,
        "Goods": capitalise(goods),
        "city": facts.city,
        "day": facts.day,
        "name": rng.choice(NAMES),
    }


def user(content: str) -> Message:
    """Return a message of the user."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """Return a message of the assistant."""
    return {"role": "assistant", "content": content}


def order_chat(rng: random.Random, avoid: Collection[Facts]) -> Chat:
    """Draw a chat about one order: a confirmation or a first answer, then further questions."""
    words = draw_words(draw_facts(rng, avoid), rng)
    words["order"] = rng.choice(ORDERS).format(**words)
    questions = rng.sample(QUESTIONS, rng.randint(1, 3))
    if rng.random() < 0.5:
        questions.insert(rng.randrange(len(questions)), rng.choice(TASKS))
    chat: Chat = []
    if rng.random() < 0.4:
        chat += [user(words["order"]), assistant(rng.choice(CONFIRMATIONS).format(**words))]
        questions = questions[1:]
    for question, answer in questions:
        lead = "" if chat else words["order"] + " "
        chat += [user(lead + question.format(**words)), assistant(answer.format(**words))]
    return chat


def two_orders_chat(rng: random.Random, avoid: Collection[Facts]) -> Chat:
    """Draw a chat about two orders in one message, where a question is about one of them."""
    first, second = draw_facts(rng, avoid), draw_facts(rng, avoid)
    while second.city == first.city or second.item == first.item:
        second = draw_facts(rng, avoid)
    words, others = draw_words(first, rng), draw_words(second, rng)
    text = rng.choice(TWO_ORDERS).format(
        **words, goods2=others["goods"], city2=others["city"], day2=others["day"]
    )
    asked = rng.choice((words, others))
    question, answer = rng.choice(
        (
            ("What goes to {city}?", "{number} {colour} {items}"),
            ("Where do the {items} go?", "The {items} go to {city}."),
            ("What colour are the {items}?", "The {items} are {colour}."),
            ("How many {items} are there?", "There are {number} {items}."),
        )
    )
    return [user(f"{text} {question.format(**asked)}"), assistant(answer.format(**asked))]


def repeat_chat(rng: random.Random) -> Chat:
    """Draw a chat where the assistant repeats words, or words and signs without any space."""
    said = rng.sample(WORDS, rng.randint(2, 8))
    glue = " "
    if rng.random() < 0.5:
        glue = ""
        said = [word + rng.choice(SIGNS) for word in said]
        if rng.random() < 0.5:
            said = rng.choices(SIGNS, k=rng.randint(4, 12))
    text = glue.join(said)
    return [user(f"Repeat after me: {text}"), assistant(text)]


def word_chat(rng: random.Random) -> Chat:
    """Draw a chat about another form of one word."""
    item, count = rng.choice(ITEMS), rng.choice(tuple(NUMBERS))
    question, answer = rng.choice(
        (
            (f"One {item}, two what?", PLURALS[item]),
            (f"Many {PLURALS[item]}, one what?", item),
            (f"Write {NUMBERS[count]} in digits.", str(count)),
            (f"Write {count} in letters.", NUMBERS[count]),
        )
    )
    return [user(question), assistant(answer)]


def json_chat(rng: random.Random) -> Chat:
    """Draw a chat where the assistant writes given words, of no order, as JSON."""
    values = [rng.choice((*WORDS, rng.randint(0, 99))) for _ in range(rng.randint(1, 5))]
    if rng.random() < 0.4:
        question = "Write as a JSON list: " + ", ".join(map(str, values))
        result: object = values
    else:
        result = dict(zip(rng.sample(KEYS, len(values)), values, strict=True))
        pairs = (f"{key} is {value}" for key, value in result.items())
        question = "Write as a JSON object: " + ", ".join(pairs)
    return [user(question), assistant(json.dumps(result, separators=(",", ":")))]


def small_talk_chat(rng: random.Random) -> Chat:
    """Draw a chat of one or two rounds of small talk."""
    chat: Chat = []
    for question, answer in rng.sample(SMALL_TALK, rng.randint(1, 2)):
        chat += [user(question), assistant(answer)]
    return chat


def plain_text(rng: random.Random, avoid: Collection[Facts]) -> str:
    """Draw a text that is no chat: a little story or an order."""
    words = draw_words(draw_facts(rng, avoid), rng)
    return rng.choice((*STORIES, *ORDERS)).format(**words)


def pretraining_documents(
    count: int, seed: int, avoid: Collection[Facts] = ()
) -> Iterator[str | Chat]:
    """Yield the documents that the base learns from: chats and plain texts.

    Args:
        count: The number of documents.
        seed: The seed of the generator.
        avoid: Facts that no text about an order may tell.

    Yields:
        A chat (a list of messages), or a string that is to be used as it is.
    """
    rng = random.Random(seed)
    makers: dict[str, Callable[[], Chat]] = {
        "order": lambda: order_chat(rng, avoid),
        "two orders": lambda: two_orders_chat(rng, avoid),
        "repeat": lambda: repeat_chat(rng),
        "word": lambda: word_chat(rng),
        "JSON": lambda: json_chat(rng),
        "small talk": lambda: small_talk_chat(rng),
    }
    for kind in rng.choices((*makers, "plain"), weights=(56, 6, 14, 4, 10, 4, 6), k=count):
        if kind == "plain":
            yield plain_text(rng, avoid)
            continue
        chat = makers[kind]()
        if rng.random() < 0.1:
            chat = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}, *chat]
        yield chat


def draw_distinct_facts(count: int, seed: int, avoid: Collection[Facts] = ()) -> list[Facts]:
    """Draw different facts, none of them in ``avoid``."""
    rng = random.Random(seed)
    found: dict[Facts, None] = {}
    while len(found) < count:
        found[draw_facts(rng, avoid)] = None
    return list(found)


def chat_rows(facts: list[Facts], seed: int) -> list[dict[str, Chat]]:
    """Return one row of the fine-tuning task for each of the facts: an order and its JSON."""
    rng = random.Random(seed)
    rows = []
    for one in facts:
        order = rng.choice(ORDERS).format(**draw_words(one, rng))
        rows.append({"messages": [user(order), assistant(one.as_json())]})
    return rows
