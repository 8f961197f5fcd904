"""Turn the default sources' mark-up into running text. A user's own files are never altered."""

from __future__ import annotations

import re
import unicodedata
from email import message_from_bytes

VERSION = 1  # raise it when any function here changes what it returns; corpora record it

_CLOSING = frozenset([",", ".", ";", ":", "?", "!", ")", "]", "''"])
_OPENING = frozenset(["(", "[", "``"])
_WRITTEN = {"``": '"', "''": '"'}


def normalise(text: str) -> str:
    """Unicode NFC, plain spaces, no spaces at line ends, at most one blank line in a row."""
    text = unicodedata.normalize("NFC", text).replace("\r", "").replace("\xa0", " ").replace("\ufeff", "")
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def unwrap_paragraphs(text: str) -> str:
    """Join the lines of every paragraph (blank lines part them) and collapse runs of spaces."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def join_tagged(text: str) -> str:
    """Turn the Brown corpus's ``word/tag`` lines back into prose.

    A sentence is a line; a blank line parts paragraphs; a headline (every tag ends in ``-hl``) stands alone.
    """
    paragraphs: list[list[str]] = [[]]
    for line in text.split("\n"):
        tagged = [token.rpartition("/") for token in line.split()]
        if not tagged:
            paragraphs.append([])
            continue
        sentence = _join_words([word for word, _, _ in tagged])
        if all(tag.endswith("-hl") for _, _, tag in tagged):
            paragraphs += [[sentence], []]
        else:
            paragraphs[-1].append(sentence)
    return "\n\n".join(" ".join(sentences) for sentences in paragraphs if sentences)


def _join_words(words: list[str]) -> str:
    pieces: list[str] = []
    glue = True  # whether the next word touches what stands before it
    inside_single_quotes = False
    previous = ""
    for word in words:
        if word == previous and word in (";", "?", "!", ":"):
            continue  # Brown doubles these marks at a sentence's end
        opens, closes = word in _OPENING, word in _CLOSING
        if word == "'":
            opens, closes = not inside_single_quotes, inside_single_quotes
            inside_single_quotes = opens
        if not glue and not closes:
            pieces.append(" ")
        pieces.append(_WRITTEN.get(word, word))
        glue = opens
        previous = word
    return "".join(pieces)


def email_body(data: bytes) -> str | None:
    """What the sender of a plain-text message wrote: no headers, quotations, signature marks or links.

    Returns:
        The text, or None for a message that is not plain text.
    """
    message = message_from_bytes(data)
    encoding = str(message.get("Content-Transfer-Encoding", "")).lower()
    if message.get_content_type() != "text/plain" or encoding in ("base64", "quoted-printable"):
        return None
    _, _, raw = data.replace(b"\r\n", b"\n").partition(b"\n\n")
    body = _decode_mail(raw)
    if "<html" in body.lower():
        return None
    kept = (line for line in body.split("\n") if not line.startswith((">", "--", "__")) and "http" not in line)
    return "\n".join(kept)


def _decode_mail(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")  # mail of 2002 that does not say its character set
