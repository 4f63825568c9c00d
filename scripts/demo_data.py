"""Tokenizer and training data of the demo model, made from nothing but word lists and a seed.

A row is one conversation of exactly `length + 1` tokens together with a weight for each token.  What cannot be
predicted (questions, the random content of documents) weighs nothing; what the context determines (a recalled
value, a copied word) weighs most, because on a CPU every token of the budget has to teach attention something.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import recall_data as recall

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [PAD, BOS, END, SYSTEM, USER, ASSISTANT]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{{ message['content'] | trim }}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# A word keeps its leading space and every digit stands alone, so that a value is the same tokens everywhere.
PRE_TOKEN = r" ?\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s+"

VALUE, PLAIN = 1.0, 0.2
Weighted = list[tuple[str, float]]


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE in which every word of the data is one token, and any other text falls into bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    corpus = [" " + " ".join(recall.NAMES + recall.WORDS)] * 3
    corpus += ["Sure", "Repeat", " with", " for"] * 3
    for _ in range(400):
        for task in (recall_turns, chain_turns, sum_turns, story_turns):
            turns = task(rng, 200)
            corpus += [piece for user, answer in turns for piece in user + [text for text, _ in answer]]
    trainer = trainers.BpeTrainer(
        vocab_size=1536,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator(sorted(corpus), trainer)
    return tokenizer


Turns = list[tuple[list[str], Weighted]]


def plain(*pieces: str) -> Weighted:
    """Pieces of an answer that the template determines."""
    return [(piece, PLAIN) for piece in pieces]


def single_question(rng: random.Random, record: recall.Record) -> tuple[list[str], Weighted]:
    """A question about one record with the answer sentence that the benchmark expects."""
    answer = plain("The", " " + record.attribute, " of", " " + record.name, " is")
    return recall.question_pieces(record, rng.randrange(recall.FORMS)), [
        *answer,
        (" " + record.value, VALUE),
        (".", PLAIN),
    ]


def list_question(rng: random.Random, records: list[recall.Record]) -> tuple[list[str], Weighted]:
    """A question about several records at once: most recalled values per token of training.

    The answer puts each value right behind its name, where a plain induction head finds it: the first step of
    recall, from which the wordings with words in between are learned.
    """
    asked, answer = ["Give", " the", " entries", " of"], plain("The", " entries", ":")
    for place, record in enumerate(records):
        comma = [","] if place else []
        asked += [*comma, " " + record.name]
        answer += [*plain(*comma, " " + record.name), (" " + record.value, VALUE)]
    return [*asked, "."], [*answer, *plain(".")]


def recall_turns(rng: random.Random, length: int, dense: float = 0.6) -> Turns:
    """A document followed by questions about it until the row is full."""
    share = rng.uniform(0.15, 0.9 if rng.random() < 0.3 else 0.55)
    count = max(2, min(recall.MAX_RECORDS, int(share * length / 7)))
    records = recall.make_records(rng, count, rng.choice((0.0, 0.3, 0.6)))
    mixed, style = rng.random() < 0.5, rng.randrange(recall.STYLES)
    doc = [recall.record_pieces(r, rng.randrange(recall.STYLES) if mixed else style) for r in records]
    if rng.random() < 0.5:
        room = share * length - sum(map(len, doc))
        for _ in range(int(room / 9)):
            doc.insert(rng.randrange(len(doc) + 1), recall.filler_pieces(rng))
    head = [recall.OPENING, *(piece for sentence in doc for piece in sentence), "\n"]
    turns: Turns = []
    used = len(head)
    while used < length:
        if rng.random() < dense:
            asked = rng.sample(records, min(len(records), rng.randint(2, 16)))
            user, answer = list_question(rng, asked)
        else:
            user, answer = single_question(rng, rng.choice(records))
        used += len(user) + len(answer) + 4
        turns.append((head + user, answer))
        head = []
    return turns


def copy_turns(rng: random.Random, length: int) -> Turns:
    """Repeat a random sequence, as it is or with one word replaced: the shortest way to induction heads."""
    turns: Turns = []
    used = 0
    while used < length:
        size = rng.randint(3, max(4, min(60, length // 4)))
        items = [rng.choice(recall.WORDS + recall.NAMES) for _ in range(size)]
        if rng.random() < 0.2:
            items = [
                "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 5))) for _ in range(size)
            ]
        user, result = ["Repeat"], items
        if rng.random() < 0.3:
            old, new = rng.choice(items), rng.choice(recall.WORDS)
            user += [" with", " " + new, " for", " " + old]
            result = [new if item == old else item for item in items]
        user += [":", *(" " + item for item in items), "."]
        answer = plain("Sure", ":") + [(" " + item, VALUE / 2) for item in result] + plain(".")
        turns.append((user, answer))
        used += len(user) + len(answer) + 4
    return turns


def chain_turns(rng: random.Random, length: int) -> Turns:
    """Who points to whom: follow one to four arrows of a shuffled ring."""
    turns: Turns = []
    used = 0
    size = rng.randint(3, max(4, min(40, length // 8)))
    ring = rng.sample(recall.NAMES, size)
    links = [(name, ring[(place + 1) % size]) for place, name in enumerate(ring)]
    rng.shuffle(links)
    head = ["Links", ":", *(p for a, b in links for p in (" " + a, " points", " to", " " + b, ".")), "\n"]
    while used < length:
        place, steps = rng.randrange(size), rng.randint(1, 4)
        path = [ring[(place + step) % size] for step in range(steps + 1)]
        user = [*head, "Follow", f" {steps}", " links", " from", " " + path[0], "."]
        answer = plain("Path", ":", " " + path[0])
        for name in path[1:]:
            answer += [(" to", PLAIN), (" " + name, VALUE)]
        turns.append((user, answer + plain(".")))
        used += len(user) + len(answer) + 4
        head = []
    return turns


def sum_turns(rng: random.Random, length: int) -> Turns:
    """Additions worked column by column, so that the carry is written down and copied."""
    turns: Turns = []
    used = 0
    while used < length:
        digits = rng.randint(1, 3)
        a, b = rng.randrange(10**digits), rng.randrange(10**digits)
        user = ["What", " is", f" {a}", " +", f" {b}", "?"]
        answer: Weighted = []
        carry, left, right = 0, str(a)[::-1], str(b)[::-1]
        for column in range(max(len(left), len(right))):
            x, y = int(left[column : column + 1] or 0), int(right[column : column + 1] or 0)
            total = x + y + carry
            lead = "Add" if not answer else ","
            answer += plain(lead)
            answer += [(f" {x}", VALUE / 2), (" +", PLAIN), (f" {y}", VALUE / 2), (" +", PLAIN)]
            answer += [(f" {carry}", VALUE / 2), (" =", PLAIN), (f" {total}", VALUE / 2)]
            carry = total // 10
        answer += [*plain(".", " The", " sum", " is"), (f" {a + b}", VALUE / 2), *plain(".")]
        turns.append((user, answer))
        used += len(answer) + 12
    return turns


def story_turns(rng: random.Random, length: int) -> Turns:
    """Template stories: the only rows in which plain text is predicted, so that free text looks like English."""
    turns: Turns = []
    used = 0
    while used < length:
        name, thing = rng.choice(recall.NAMES), rng.choice(recall.WORDS)
        user = ["Tell", " a", " story", " about", " " + name, " and", " the", " " + thing, "."]
        story = ["Once", " there", " was", " a", " " + rng.choice(recall.FILLER_ADJECTIVES)]
        story += [" " + rng.choice(recall.FILLER_SUBJECTS), " called", " " + name, "."]
        for _ in range(rng.randint(1, 4)):
            story += recall.filler_pieces(rng)
            if rng.random() < 0.6:
                story += [" " + name, " found", " the", " " + thing, "."]
        story += [" " + name, " was", " happy", " with", " the", " " + thing, "."]
        turns.append((user, [(piece, PLAIN) for piece in story]))
        used += len(user) + len(story) + 4
    return turns


TASKS: dict[str, Callable[[random.Random, int], Turns]] = {
    "recall": recall_turns,
    "copy": copy_turns,
    "chain": chain_turns,
    "sum": sum_turns,
    "story": story_turns,
}


class RowMaker:
    """Encodes conversations piece by piece, remembering each piece, because most pieces are single words."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def encode(self, piece: str) -> list[int]:
        """The tokens of one piece."""
        ids = self.known.get(piece)
        if ids is None:
            ids = self.tokenizer.encode(piece, add_special_tokens=False).ids
            if len(self.known) < 50_000:
                self.known[piece] = ids
        return ids

    def row(
        self, rng: random.Random, task: str, length: int, dense: float = 0.6
    ) -> tuple[list[int], list[float]]:
        """One conversation cut (or padded) to `length + 1` tokens, and the loss weight of each token."""
        ids, weights = [self.encode(BOS)[0]], [0.0]

        def add(piece: str, weight: float) -> None:
            tokens = self.encode(piece)
            ids.extend(tokens)
            weights.extend([weight] * len(tokens))

        if rng.random() < 0.1:
            for piece in (SYSTEM, "You", " are", " a", " helpful", " assistant", ".", END):
                add(piece, 0.0)
        turns = recall_turns(rng, length, dense) if task == "recall" else TASKS[task](rng, length)
        for user, answer in turns:
            for piece in (USER, *user, END, ASSISTANT):
                add(piece, 0.0)
            for piece, weight in answer:
                add(piece, weight)
            add(END, PLAIN)
        pad = self.encode(PAD)[0]
        short = max(0, length + 1 - len(ids))
        return (ids + [pad] * short)[: length + 1], (weights + [0.0] * short)[: length + 1]
