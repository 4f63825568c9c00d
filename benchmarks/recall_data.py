"""Recall questions: documents of records and questions that only the documents can answer.

Plain Python without torch, so that a benchmark client, a test and the training script of the demo model
all build the same sentences.  Text is made as *pieces*, short strings that each begin where the demo
tokenizer begins a token, so that encoding the pieces one by one equals encoding the joined text.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sized
from dataclasses import dataclass
from typing import Protocol

_NAMES = """Abel Ada Alan Alma Amos Ana Anton Aria Arno Asa Basil Bea Ben Bert Beth Boris Bram Bruno Carl Cara
Cass Cato Clara Cleo Cole Cora Cyrus Dan Dara Dean Della Dina Dora Dov Drew Edda Edith Egon Ella Elsa Emil Enid
Enzo Erik Erin Esme Eva Ewan Ezra Fay Felix Finn Flora Frida Gail Gary Gina Glen Greta Gus Hana Hans Hazel Hector
Helga Henk Hilda Hugo Ida Igor Ilse Ines Ira Iris Isaac Ivan Ivy Jack Jade Jan Jean Joel Jonas Jude Julia Kai Karl
Kate Kira Klaus Kurt Lara Leah Lena Leon Lev Lila Lois Lola Lotte Luca Lucy Luis Mabel Maja Marco Maria Mark Max
Mia Mila Milo Mira Moses Nadia Nell Nico Nina Noah Nora Odin Olaf Olga Omar Orla Oscar Otto Paul Pablo Pearl Petra
Pia Quinn Ralf Ravi Remy Rex Rita Robin Rosa Ruben Ruth Sam Sara Saul Sean Selma Simon Sofia Stan Sven Tara Tess
Theo Tim Tina Tobin Tom Uma Ugo Vera Vince Viola Wade Wanda Wes Willa Xena Yael Yuri Zane Zara Zeno Zoe"""


_WORDS = """acorn amber anchor apple apron arrow autumn bacon badge bamboo banjo barley basin basket beacon beaver
bell berry birch bottle bread bridge bronze brush bucket butter button cabin cactus camel candle canoe carpet carrot
castle cedar cello chalk cherry circle clay cloud clover coal cobalt coffee comet copper coral cotton crane crayon
cricket crown crystal daisy desert diamond dragon drum eagle ember engine falcon feather fern fiddle flute forest
fossil fox garlic garnet ginger glacier glove gold grape gravel hammer harbor harp helmet heron honey hornet igloo
indigo island ivory jacket jasper jungle kettle kite ladder lake lantern lemon lentil lily linen lizard lobster
magnet mango maple marble meadow melon mirror mitten moss mustard needle nickel oak oasis ocean olive onion opal
orange orchid otter oyster paddle panda pebble pencil pepper piano pigeon pillow pine planet plum pocket pond poppy
pumpkin puzzle quartz quilt rabbit raven reef ribbon river rocket ruby saddle salmon sapphire scarf shadow silver
spider spoon spruce stone storm summit sunset tiger timber tulip tunnel turtle valley velvet violin walnut whale
willow window winter wolf yarn zebra"""

NAMES, WORDS = _NAMES.split(), _WORDS.split()

FILLER_SUBJECTS = [
    "boy",
    "girl",
    "king",
    "queen",
    "farmer",
    "sailor",
    "baker",
    "teacher",
    "cat",
    "dog",
    "horse",
    "bird",
]
FILLER_ADJECTIVES = ["old", "young", "small", "tall", "happy", "quiet", "tired", "kind"]
FILLER_VERBS = ["walked", "ran", "went", "sailed", "looked", "came"]
FILLER_PLACES = ["house", "garden", "village", "market", "hill", "school", "boat", "road", "town", "field"]
FILLER_TIMES = ["in the morning", "at night", "after lunch", "in spring", "every day", "once more"]

MAX_RECORDS = 100
OPENING = "Notes:"

Pieces = list[str]


@dataclass(frozen=True)
class Record:
    """One key and its value: a name, and a word or a digit string that the model cannot guess."""

    name: str
    attribute: str
    value: str


class Encoder(Protocol):
    """Any tokenizer, ours or a library's: all that is asked of it is how long a text is."""

    def encode(self, text: str, /) -> Sized:
        """Something with a length."""


def make_value(rng: random.Random, attribute: str) -> str:
    """A word from the pool, or a code of two to four digits."""
    if attribute == "word":
        return rng.choice(WORDS)
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 4)))


def make_records(rng: random.Random, count: int, code_share: float = 0.4) -> list[Record]:
    """Records with distinct names, so that every question has one answer."""
    records = []
    for name in rng.sample(NAMES, count):
        attribute = "code" if rng.random() < code_share else "word"
        records.append(Record(name, attribute, make_value(rng, attribute)))
    return records


def record_pieces(record: Record, style: int) -> Pieces:
    """One record as a sentence, in one of `STYLES` wordings; every word brings its leading space."""
    name, attribute, value = " " + record.name, " " + record.attribute, " " + record.value
    return [
        [name, value, ";"],
        [name, ":", value, ";"],
        [name, " has", value, "."],
        [" The", attribute, " of", name, " is", value, "."],
        [name, " has", " the", attribute, value, "."],
        [" For", name, " the", attribute, " is", value, "."],
        [" We", " gave", name, " the", attribute, value, "."],
    ][style]


STYLES = 7


def filler_pieces(rng: random.Random) -> Pieces:
    """A sentence that holds no record: hay around the needles, and English for the stories."""
    words = ["The", rng.choice(FILLER_ADJECTIVES), rng.choice(FILLER_SUBJECTS), rng.choice(FILLER_VERBS)]
    words += ["to", "the", rng.choice(FILLER_PLACES)]
    if rng.random() < 0.5:
        words += rng.choice(FILLER_TIMES).split()
    return [" " + word for word in words] + ["."]


def question_pieces(record: Record, form: int) -> Pieces:
    """A question about one record, in one of `FORMS` wordings."""
    attribute, name = " " + record.attribute, " " + record.name
    return [
        ["What", " is", " the", attribute, " of", name, "?"],
        ["Tell", " me", " the", attribute, " of", name, "."],
        ["Which", attribute, " does", name, " have", "?"],
    ][form]


FORMS = 3


def is_correct(reply: str, expected: str) -> bool:
    """Whether the first sentence of a reply ends in the expected value, and in nothing more."""
    return reply.strip().split(".")[0].split(" ")[-1] == expected


def record_target(context_tokens: int) -> int:
    """How many records a document of this length holds: 10 at 128 tokens, rising to 100 at 2,048."""
    return max(2, min(MAX_RECORDS, round(10 * math.pow(context_tokens / 128, 0.85))))


def make_question(
    rng: random.Random, context_tokens: int, depth: float, tokenizer: Encoder
) -> tuple[list[dict[str, str]], str]:
    """A document that fills `context_tokens` of prompt, and a question about the record at `depth` of it.

    `depth` runs from 0 (the oldest record) to 1 (the newest).  `tokenizer` is anything whose `encode`
    turns text into a sequence.  The second value is the bare answer that `is_correct` looks for.
    """

    def count(pieces: Pieces) -> int:
        return len(tokenizer.encode("".join(pieces)))

    budget = context_tokens - 16
    records = make_records(rng, record_target(context_tokens))
    mixed, style = rng.random() < 0.5, rng.randrange(STYLES)
    sentences: list[Pieces] = []
    used, kept = 0, []
    for record in records:
        pieces = record_pieces(record, rng.randrange(STYLES) if mixed else style)
        used += count(pieces)
        if used > budget:
            break
        sentences.append(pieces)
        kept.append(record)
    for _ in range(context_tokens):
        pieces = filler_pieces(rng)
        used += count(pieces)
        if used > budget:
            break
        sentences.insert(rng.randrange(len(sentences) + 1), pieces)
    needle = kept[min(len(kept) - 1, int(depth * len(kept)))]
    text = OPENING + "".join("".join(pieces) for pieces in sentences)
    text += "\n" + "".join(question_pieces(needle, rng.randrange(FORMS)))
    return [{"role": "user", "content": text}], needle.value
