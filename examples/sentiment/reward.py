"""The sentiment reward: a logistic regression on words and word pairs, trained on the labels."""

from __future__ import annotations

import numpy as np
from data import Review, sentences_of
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import SGDClassifier
from sklearn.pipeline import make_pipeline
from tqdm import tqdm


class SentimentReward:
    """Probability that a sentence comes from a positive review."""

    def __init__(self, reviews: list[Review], seed: int) -> None:
        self.pipeline = make_pipeline(
            HashingVectorizer(ngram_range=(1, 2), tokenizer=str.split, token_pattern=None),
            SGDClassifier(loss="log_loss", alpha=2e-6, max_iter=8, tol=None, random_state=seed),
        )
        self.pipeline.fit(*labelled_sentences(reviews))

    def __call__(self, sentences: list[str]) -> np.ndarray:
        return self.pipeline.predict_proba(sentences)[:, 1]

    def accuracy(self, reviews: list[Review]) -> dict[str, float]:
        """On single sentences, as it is used here, and on whole reviews, by their mean sentence."""
        sentences, labels = labelled_sentences(reviews)
        right = (self(sentences) > 0.5) == labels
        judged = [review for review in reviews if sentences_of(review)]
        of_reviews = [[" ".join(words) for words in sentences_of(review)] for review in judged]
        # All sentences in one call: a call for each review takes a hundred times as long.
        rewards = self([sentence for sentences in of_reviews for sentence in sentences])
        starts = np.cumsum([0, *(len(sentences) for sentences in of_reviews)])[:-1]
        means = np.add.reduceat(rewards, starts) / [len(sentences) for sentences in of_reviews]
        verdicts = (means > 0.5) == [review.positive for review in judged]
        return {"sentence": float(right.mean()), "review": float(verdicts.mean())}


def labelled_sentences(reviews: list[Review]) -> tuple[list[str], np.ndarray]:
    """Sentences of at least four words, each with the label of its review, which is noisy."""
    pairs = [
        (" ".join(sentence), review.positive)
        for review in tqdm(reviews, desc="Reading reviews", unit="review")
        for sentence in sentences_of(review)
        if len(sentence) > 4
    ]
    return [text for text, _ in pairs], np.array([label for _, label in pairs])
