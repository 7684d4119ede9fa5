"""Between what people read and type and what a model reads and writes."""

import codecs
import re

import tiktoken

HOLE = re.compile(r"\[MASK(?::(\d+))?\]")


def tokens_with_holes(text: str, tokenizer: tiktoken.Encoding, mask_id: int) -> list[int]:
    """"The [MASK:20] of": the tokens of what is given, and 20 mask tokens. [MASK] is just one."""
    # re.split with one group: given, size of the hole, given, size of the hole, ..., given
    parts = HOLE.split(text)
    if len(parts) == 1 or any("[MASK" in given for given in parts[::2]):
        raise ValueError("--text has no hole, or a broken one; write [MASK:20] for 20 tokens")
    ids = tokenizer.encode_ordinary(parts[0])  # as it is, spaces included
    for size, given in zip(parts[1::2], parts[2::2], strict=True):
        ids += [mask_id] * min(int(size or 1), 10**7)  # a typo must not fill the memory
        ids += tokenizer.encode_ordinary(given)
    return ids


def token_texts(ids: list[int], tokenizer: tiktoken.Encoding, mask_id: int,
                whole: bool) -> list[str | None]:
    """What each token adds to the text, None where hidden; up to the end-of-text token or `whole`.

    A character of several tokens comes with the last of them. It is the text itself, as a file
    should have it: before a terminal shows it, `terminal.harmless` spells out what could drive it.
    """
    if tokenizer.eot_token in ids and not whole:
        ids = ids[: ids.index(tokenizer.eot_token)]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = []
    for token, following in zip(ids, [*ids[1:], mask_id], strict=False):
        text = None
        if token != mask_id:
            given = tokenizer.decode_single_token_bytes(token)
            text = decoder.decode(given, final=following == mask_id)
        texts.append(text)
    return texts
