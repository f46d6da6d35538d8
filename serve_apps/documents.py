"""Prompts over real text that every Python has: the language reference in pydoc_data.topics.

A prompt is a chat: a system message that names the document, the document, a question.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tokenizers import Tokenizer

QUESTION = "\n\nIn one sentence: what is this text about?"
# More text than any document of n tokens has: English is about four characters a token.
CHARACTERS_PER_TOKEN = 8
FILLER = " ."  # one token, whatever stands before it: a text cut anywhere is some tokens short


@dataclass(frozen=True)
class Document:
    """One prompt. `tokens`: its exact length as the engine counts it, chat template included."""

    name: str
    tokens: int
    messages: tuple[dict[str, str], ...] = field(compare=False)


class Library:
    """Cuts documents, all different, out of one long text."""

    def __init__(self, model: Path) -> None:
        """model: a Hugging Face directory with tokenizer.json and SmolLM2's chat format."""
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._text = "\n".join(topics[name] for name in sorted(topics))
        self._position = 0
        self._made = 0

    def documents(self, lengths: Sequence[int], copies: int) -> Iterator[Document]:
        """`copies` documents of each length in tokens, lengths alternating."""
        for _ in range(copies):
            for length in lengths:
                yield self.document(length)

    def document(self, tokens: int) -> Document:
        """The next document of exactly `tokens` tokens. ValueError when the text is used up."""
        self._made += 1
        name = f"Document {self._made}"
        rest = self._text[self._position : self._position + CHARACTERS_PER_TOKEN * tokens]
        low, high = 0, len(rest)
        while low < high:  # the longest text that is not too long
            middle = (low + high + 1) // 2
            if self.count(_messages(name, rest[:middle])) <= tokens:
                low = middle
            else:
                high = middle - 1
        text = rest[:low].rstrip()
        missing = tokens - self.count(_messages(name, text))
        messages = _messages(name, text + FILLER * max(missing, 0))
        if low == len(rest) or self.count(messages) != tokens:
            raise ValueError(
                f"no text of {tokens} tokens from character {self._position} of "
                f"{len(self._text)}: ask for fewer, or for lengths from 64 tokens on"
            )
        self._position += low
        return Document(name, tokens, messages)

    def count(self, messages: Sequence[dict[str, str]]) -> int:
        """Tokens of a chat, with the opening of the answer."""
        chat = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        return len(self._tokenizer.encode(chat + "<|im_start|>assistant\n").ids)


def _messages(name: str, text: str) -> tuple[dict[str, Any], ...]:
    # The name comes first, so that no two prompts share a beginning.
    return (
        {"role": "system", "content": f"{name}, from the Python language reference."},
        {"role": "user", "content": text + QUESTION},
    )
