"""Prompts have exactly the tokens they claim, and share nothing."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from serve_apps.documents import Document, Library


def count(smollm2: Path, document: Document) -> int:
    """As the engine counts: with transformers and the model's own chat template."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = tokenizer.apply_chat_template(
        list(document.messages), add_generation_prompt=True, tokenize=False
    )
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_lengths_are_exact(smollm2: Path) -> None:
    library = Library(smollm2)
    lengths = [64, 333, 1048, 2072]
    documents = list(library.documents(lengths, copies=2))
    assert [document.tokens for document in documents] == lengths * 2
    assert [count(smollm2, document) for document in documents] == lengths * 2


def test_all_are_different_from_the_first_block_on(smollm2: Path) -> None:
    library = Library(smollm2)
    documents = list(library.documents([500], copies=8))
    assert len({document.messages[0]["content"] for document in documents}) == 8
    bodies = [document.messages[1]["content"][:200] for document in documents]
    assert len(set(bodies)) == 8


def test_the_same_library_gives_the_same_documents(smollm2: Path) -> None:
    first, second = Library(smollm2).document(700), Library(smollm2).document(700)
    assert first.messages == second.messages


@pytest.mark.parametrize("tokens", [10, 1_000_000])
def test_what_cannot_be_made_is_said(smollm2: Path, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"no text of {tokens} tokens"):
        Library(smollm2).document(tokens)
