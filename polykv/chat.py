"""Chat format for instruct models: the document opens the user's turn, and questions continue that turn.

Agents share (in a pool or card) the chat template's tokens up to the end of the document: the system turn, if the
template writes one by default, and the beginning of the user's turn. A question adds the rest: itself, the end of the
user's turn, and the header of the assistant's. Special tokens, including BOS, are those that the template writes; the
tokenizer adds none.
"""

from collections.abc import Sequence
from textwrap import shorten
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor

from polykv.errors import PolyKVError
from polykv.tokens import encode

STYLES = ("chat", "plain", "auto")
SEPARATOR = "\n\n"  # between document and question
PLAIN = "use question_style=plain"
# (question, asked on another day): the prefix must be the same for all of these. A tokenizer may merge line breaks
# differently before a letter and before a digit.
PROBES = (("Why?", False), ("7 or 8?", False), ('"Why?"', True))
LONGEST = 80  # characters of a text in an error
REPLY = "Because."  # in place of an assistant's reply, or of a document
# Templates write today's date with a function of transformers, which a macro of the same name overrides.
OTHER_DAY = "{%- macro strftime_now(format) %}1 January 1970{% endmacro %}"


def settle(model: Any) -> None:
    """Remove `question_style` from a model config (mapping of conf/model) if no question is asked in chat format.

    Cells then keep the identity they had before the setting existed. The tokenizer of random weights has no template.
    """
    if model.get("question_style") == "plain" or model.weights == "random":
        model.pop("question_style", None)


def is_wanted(style: str, tokenizer: Any) -> bool:
    """Whether questions are asked in chat format; with style `auto`, if the tokenizer has a chat template.

    Raises:
        PolyKVError: an unknown style, or `chat` without a template.
    """
    if style not in STYLES:
        raise PolyKVError(f"question_style={style!r} is not known; there are: {', '.join(STYLES)}")
    if style == "chat" and not tokenizer.chat_template:
        raise PolyKVError(f"question_style=chat, but the tokenizer has no chat template; {PLAIN}")
    return style != "plain" and bool(tokenizer.chat_template)


class Chat:
    """A document as the shared prefix of chats about it.

    `ids_BT` (1, tokens), followed by the tokens of `prompt(question)` encoded without special tokens, is exactly the
    chat template's encoding of [user: document, question] up to the assistant's header.

    Raises:
        PolyKVError: an empty document, one with special tokens of the template, or a template whose prefix depends on
            question or date; names the token.
    """

    def __init__(self, tokenizer: Any, document: str) -> None:
        # Templates may strip what they are given.
        self._tokenizer, self._document = tokenizer, document.strip()
        if not self._document:
            raise PolyKVError("the document is empty; give at least one token of text")
        self._marks = _marks(tokenizer)
        _check_unmarked(self._marks, document, "document")
        self._opening = self._cut([self._render(*probe) for probe in PROBES])
        self.ids_BT: Tensor = torch.tensor([_encode(tokenizer, self._opening)])

    def prompt(self, question: str) -> str:
        """The text after the shared prefix: the question, the end of the user's turn, the assistant's header.

        Raises:
            PolyKVError: an empty question, one with special tokens of the template, or one that changes the prefix.
        """
        if not question.strip():
            raise PolyKVError("a question is empty; an agent has to ask something")
        _check_unmarked(self._marks, question, "question")
        whole = self._render(question.strip())
        if not whole.startswith(self._opening):
            raise PolyKVError(
                f"the question {question!r} changes the shared prefix of the chat; {PLAIN}"
            )
        return whole[len(self._opening) :]

    def _render(self, question: str, other_day: bool = False) -> str:
        content = self._document + SEPARATOR + question
        return _render(self._tokenizer, [("user", content)], True, other_day)

    def _cut(self, conversations: list[str]) -> str:
        """The longest common prefix of the conversations that ends at a token boundary in all of them."""
        start = conversations[0].find(self._document + SEPARATOR)
        if start < 0:
            raise PolyKVError(f"the chat template changes the text of the document; {PLAIN}")
        end = start + len(self._document)
        expected = [_encode(self._tokenizer, whole) for whole in conversations]
        # Tokenizers may merge the separator's line breaks with each other, or with a full stop before them.
        for n_kept in range(len(SEPARATOR), -1, -1):
            opening = conversations[0][: end + n_kept]
            ids = _encode(self._tokenizer, opening)
            found = [
                ids + _encode(self._tokenizer, whole[len(opening) :]) for whole in conversations
            ]
            if found == expected and all(whole.startswith(opening) for whole in conversations):
                return opening
        raise PolyKVError(f"{self._first_difference(found, expected)}; {PLAIN}")

    def _first_difference(self, found: list[list[int]], expected: list[list[int]]) -> str:
        for (question, _), ours, theirs in zip(PROBES, found, expected, strict=True):
            for index, pair in enumerate(zip(ours, theirs, strict=False)):
                if len(set(pair)) == 2:
                    shared, whole = self._tokenizer.convert_ids_to_tokens(pair)
                    return (
                        f"the prefix of the chat template moves: token {index} is {shared!r}, but "
                        f"{whole!r} if {question!r} is asked, or on another day"
                    )
        return "the chat template is tokenised differently in two parts and as a whole"


def turn(tokenizer: Any, text: str) -> str:
    """One turn of a user in the tokenizer's chat template, up to the assistant's header.

    Raises:
        PolyKVError: the template cannot be used, or the text has its special tokens.
    """
    _check_unmarked(_marks(tokenizer), text, "text")
    return _render(tokenizer, [("user", text)], add_generation_prompt=True)


def before_document(tokenizer: Any) -> Tensor:
    """Ids (tokens,) of what the chat template writes before a document: the system turn, the header of the user's.

    Raises:
        PolyKVError: the template cannot be used, or changes the text of the document.
    """
    before, found, _ = turn(tokenizer, REPLY).partition(REPLY)
    if not found:
        raise PolyKVError(f"the chat template changes the text of the document; {PLAIN}")
    return encode(tokenizer, before)[0]


def around_replies(tokenizer: Any, messages: Sequence[str]) -> list[str]:
    """What the chat template writes before each reply, if these are the user's turns.

    The first text begins the sequence; the others end the assistant's turn and have the user's next one.

    Raises:
        PolyKVError: a message with special tokens of the template, or a template that rewrites earlier turns, depends
            on the date, or ends only the last reply.
    """
    end, marks = end_of_turn(tokenizer), _marks(tokenizer)
    turns: list[tuple[str, str]] = []
    texts: list[str] = []
    so_far = ""
    for message in messages:
        _check_unmarked(marks, message, "message")
        turns.append(("user", message))
        whole = _render(tokenizer, turns, True)
        if not whole.startswith(so_far) or whole != _render(tokenizer, turns, True, True):
            raise PolyKVError(
                f"the chat template rewrites earlier turns as a chat goes on, or on another day; {PLAIN}"
            )
        texts.append(whole[len(so_far) :])
        if so_far and end is not None and _encode(tokenizer, texts[-1].lstrip())[:1] != [end]:
            raise PolyKVError(
                f"the chat template ends a reply otherwise as a chat goes on; {PLAIN}"
            )
        turns.append(("assistant", REPLY))
        so_far = whole + REPLY
    return texts


def _marks(tokenizer: Any) -> list[str]:
    """The special tokens that the chat template writes."""
    whole, end = _render(tokenizer, [("user", REPLY)], True), end_of_turn(tokenizer)
    added = tokenizer.added_tokens_decoder.items()
    special = [(number, token.content) for number, token in added if token.special]
    return [content for number, content in special if content in whole or number == end]


def _check_unmarked(marks: Sequence[str], text: str, what: str) -> None:
    """Refuse special tokens of the template in the text of a turn, which they would end."""
    for mark in marks:
        if mark in text:
            said = shorten(text, LONGEST)
            raise PolyKVError(
                f"the {what} {said!r} has the special token {mark}; take it out, or {PLAIN}"
            )


def text_of(tokenizer: Any, ids_T: Tensor) -> str:
    """The text of a window of tokens (tokens,), without characters cut by its ends."""
    text = tokenizer.decode(ids_T.tolist(), clean_up_tokenization_spaces=False)
    return text.strip("\N{REPLACEMENT CHARACTER}")


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token with which the chat template ends an assistant's turn, if there is one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        whole = _render(tokenizer, [("user", "Why?"), ("assistant", REPLY)])
    except PolyKVError:
        return None
    ids = _encode(tokenizer, whole.rpartition(REPLY)[2].lstrip())
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def _render(
    tokenizer: Any,
    turns: list[tuple[str, str]],
    add_generation_prompt: bool = False,
    other_day: bool = False,
) -> str:
    try:
        return tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            chat_template=OTHER_DAY + tokenizer.get_chat_template() if other_day else None,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except TemplateError as error:
        raise PolyKVError(f"the chat template cannot be used ({error}); {PLAIN}") from error


def _encode(tokenizer: Any, text: str) -> list[int]:
    return encode(tokenizer, text)[0].tolist()
