"""Byte pair encoding: a vocabulary made from a text, as GPT-2's was, in any language.

    tokens = the 256 bytes
    while there are too few:
        of all pairs of neighbours in the text, the most frequent one becomes a token

Words are counted first, and a token never crosses from one into the next. So a pair that has become
a token changes only the words that hold it: seconds, where recounting the text would take hours.
tiktoken then encodes with what was learned.
"""

import heapq
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from plumbing.corpora import DataError
from plumbing.terminal import Progress

# \s, \d and \w mean one thing in Python, which counts, and another in tiktoken's Rust, which
# encodes. Spelled out, a class means the same to both.
SPACE = r" \t\n\v\f\r\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
DIGITS = "0-9"
MARKS = (r"!-/:-@\[-`{-~\xa1-\xa9\xab-\xb4\xb6-\xb9\xbb-\xbf"
         r"\u2010-\u2027\u2030-\u205e\u3001-\u301f")
PATTERN = "|".join([
    f"[ ']?[^{SPACE}{DIGITS}{MARKS}]+",  # letters of any script, with the space before; 't of don't
    f"[{DIGITS}]",  # one by one: a model then sees how a number is made
    f" ?[{MARKS}]+",
    f"[{SPACE}]{{1,999}}(?![^{SPACE}])",  # all but the last space, which the next word begins with
    f"[{SPACE}]+",
])
DIFFERENT = 2**22  # bytes of different words, the memory to spend; 33 MB of novels have 0.8 million
LONGEST = 32  # characters of a word that are looked at together: some scripts have no spaces


def count_words(texts: Iterable[str]) -> Counter[bytes]:
    """How often each word occurs, long ones cut into parts."""
    found: Counter[str] = Counter()
    room = DIFFERENT
    for match in (match for text in texts for match in re.finditer(PATTERN, text)):
        word = match[0]
        if word not in found:
            if room < 0:
                break
            room -= len(word.encode())
        found[word] += 1
    counts: Counter[bytes] = Counter()
    for word, count in found.items():
        for start in range(0, len(word), LONGEST):
            counts[word[start : start + LONGEST].encode()] += count
    return counts


def merge(word: list[bytes], token: bytes) -> tuple[list[bytes], list[bytes]]:
    """Join, in place and from left to right, the pairs of neighbours that spell `token`.

    Returns the pairs that were lost and those that were won by it.
    """
    lost = []
    won = []
    i = 0
    while i + 1 < len(word):
        if word[i] + word[i + 1] == token:
            if i > 0:
                lost.append(word[i - 1] + word[i])
                won.append(word[i - 1] + token)
            if i + 2 < len(word):
                lost.append(word[i + 1] + word[i + 2])
                won.append(token + word[i + 2])
            word[i : i + 2] = [token]
        i += 1
    return lost, won


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """{token: rank}, the 256 bytes first; the last of the `vocab_size` ids is for end-of-text.

    Of pairs that are equally frequent, the first in the order of bytes becomes a token.
    """
    counts = count_words(texts)
    frequencies = list(counts.values())
    words = [[bytes([byte]) for byte in word] for word in counts]
    ranks = {bytes([byte]): byte for byte in range(256)}
    # A pair is what it spells, as tiktoken knows it: how often it occurs, and in which words (or
    # once did).
    count_of = defaultdict(int)
    where = defaultdict(set)
    for i, word in enumerate(words):
        for first, second in itertools.pairwise(word):
            count_of[first + second] += frequencies[i]
            where[first + second].add(i)
    queue = [(-count, pair) for pair, count in count_of.items()]
    heapq.heapify(queue)
    progress = Progress("learning", vocab_size - 1 - 256, unit="tokens")
    while len(ranks) < vocab_size - 1:
        if not queue:
            raise DataError(f"bpe:{vocab_size} is too much for this text: it has "
                            f"{len(ranks) + 1} tokens at most (--tokenizer byte suits any text)")
        count, token = heapq.heappop(queue)
        if -count != count_of[token]:  # it has become rarer since: back into the queue
            if count_of[token]:
                heapq.heappush(queue, (-count_of[token], token))
            continue
        ranks[token] = len(ranks)
        born = set()  # the pairs with the new token; all others can only become rarer
        for i in where.pop(token):
            lost, won = merge(words[i], token)
            for pair in lost:
                count_of[pair] -= frequencies[i]
            for pair in won:
                count_of[pair] += frequencies[i]
                where[pair].add(i)
            born.update(won)
        for pair in born:
            if count_of[pair]:  # in "aaaa" the second merge takes back a pair that the first won
                heapq.heappush(queue, (-count_of[pair], pair))
        progress.advance(1)
    return ranks
