"""Constrained answers: the tokens that may come next by a JSON schema, choices or an expression.

llguidance keeps track of the grammar; it is imported by the first request that has a constraint.

Legend: V vocabulary.
"""

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from perception_rt.errors import BackendError, InputError
from perception_rt.processing.llm_tokenizer import Tokenizer
from perception_rt.runtime.generation.json_closer import JsonCloser
from perception_rt.runtime.request import CONSTRAINTS, Request

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Array = np.ndarray[Any, Any]

# The spelling of `json.dumps`: with free white space, a model could go on with it for ever.
_JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_REASON_CHARS = 300


class Constraint:
    """The constraint of one answer, and how far the answer has come."""

    def __init__(
        self,
        name: str,
        matcher: "LLMatcher",
        tokenizer: Tokenizer,
        closer: JsonCloser | None = None,
    ) -> None:
        """Starts before the first token.

        Args:
            name: field of the request, for messages.
            matcher: the grammar's matcher.
            tokenizer: the model's tokenizer.
            closer: finds where JSON can be closed; None for another constraint.

        Raises:
            InputError: as `allowed`.
        """
        self._name = name
        self._matcher = matcher
        self._vocab_size = tokenizer.vocab_size
        self._ends = np.zeros(tokenizer.vocab_size, np.bool_)
        self._ends[list(tokenizer.end_ids)] = True
        self._closer = closer
        self.allowed()  # now, so that a grammar without any answer is refused at once

    def allowed(self) -> Array:
        """Returns which tokens may come next, bool (V,): only end tokens after a whole answer.

        Raises:
            InputError: the grammar is too complex, or no token continues the answer.
        """
        self._check()
        if self._matcher.is_stopped():
            return self._ends
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        return mask.astype(np.bool_)

    def apply(self, logits: Array) -> Array:
        """Removes the tokens that may not come next; InputError as `allowed`.

        Where JSON is not complete, the token that closes a value is at least as likely as the end
        of the answer was.

        Args:
            logits: float (V,).

        Returns:
            Float (V,), -inf for removed tokens.
        """
        allowed = self.allowed()
        masked = np.where(allowed, logits, -np.inf)
        if self._closer is not None and not allowed[self._ends].any():
            token = self._closer.closer(allowed)
            if token is not None:
                masked[token] = max(masked[token], logits[self._ends].max())
        return masked

    def accept(self, token: int) -> None:
        """Takes the next token of the answer; InputError as `allowed`."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self._check()
            if self._closer is not None:
                self._closer.push(token)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"{self._name} cannot be followed: {_reason(self._matcher)}")


class ConstraintCompiler:
    """Makes the constraints of requests for one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._source: _TokenSource | None = None
        self._vocabulary: LLTokenizer | None = None

    def compile(self, request: Request) -> Constraint | None:
        """Returns the constraint of a checked request; None if it has none.

        Raises:
            InputError: llguidance refuses it; the message has its reason.
            BackendError: llguidance is not installed.
        """
        name = next((name for name in CONSTRAINTS if getattr(request, name) is not None), None)
        if name is None:
            return None
        try:
            import llguidance
        except ImportError:
            raise BackendError(
                f'{name} needs llguidance: pip install "perception_rt[guided]"'
            ) from None
        # Made twice if two threads are here: both are the same.
        source = self._source = self._source or _TokenSource(self._tokenizer)
        if self._vocabulary is None:
            self._vocabulary = llguidance.LLTokenizer(
                llguidance.TokenizerWrapper(source), eos_token=sorted(self._tokenizer.end_ids)
            )
        limits = llguidance.LLParserLimits(verbose_errors=False)  # no dump of the parser's state
        matcher = llguidance.LLMatcher(
            self._vocabulary, self._grammar(request), log_level=0, limits=limits
        )
        if matcher.is_error():
            raise InputError(f"{name} cannot be used: {_reason(matcher)}")
        is_json = request.json_schema is not None
        closer = JsonCloser(source.tokens, source.ids) if is_json else None
        return Constraint(name, matcher, self._tokenizer, closer)

    def _grammar(self, request: Request) -> str:
        """The answer after the prefix of the vocabulary, in llguidance's format for grammars."""
        from llguidance import LLMatcher

        if request.json_schema is not None:
            try:
                schema = json.dumps(request.json_schema)
                text = LLMatcher.grammar_from_json_schema(schema, defaults=_JSON_STYLE)
            except (ValueError, RecursionError) as error:
                raise InputError(f"json_schema cannot be used: {error}") from None
        elif request.choices is not None:
            # One terminal, which has no bound on the number of its alternatives.
            rule = "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, request.choices))
            text = json.dumps({"grammars": [{"lark_grammar": rule}]})
        else:
            assert request.regex is not None
            text = LLMatcher.grammar_from_regex(request.regex)
        prefix = self._tokenizer.prefix.decode("utf-8")
        if not prefix:
            return text
        (answer,) = json.loads(text)["grammars"]
        whole = {"lark_grammar": f"start: {json.dumps(prefix)} @answer"}
        return json.dumps({"grammars": [whole, {**answer, "name": "answer"}]})


class _TokenSource:
    """A tokenizer as llguidance wants it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = tokenizer.spellings()
        self.eos_token_id = min(tokenizer.end_ids)
        self.special_token_ids = sorted({*tokenizer.controls.values(), *tokenizer.end_ids})
        self._tokenizer = tokenizer
        self.ids = {data: i for i, data in enumerate(self.tokens) if data}
        self._longest = max(map(len, self.ids))

    def __call__(self, data: bytes) -> list[int]:
        """Encodes text that the grammar leaves no choice about."""
        prefix = self._tokenizer.prefix
        try:
            ids = self._tokenizer.encode_text(data.removeprefix(prefix).decode("utf-8"))
        except InputError:  # too long; an exception would be a panic in llguidance
            ids = []
        # A vocabulary with a prefix would put it before text within the answer too.
        return ids if self._tokenizer.decode_bytes(ids) == data else self._greedy(data)

    def _greedy(self, data: bytes) -> list[int]:
        """The longest token first."""
        ids: list[int] = []
        at = 0
        while at < len(data):
            pieces = (data[at : at + size] for size in range(self._longest, 0, -1))
            piece = next((piece for piece in pieces if piece in self.ids), None)
            if piece is None:
                break
            ids.append(self.ids[piece])
            at += len(piece)
        return ids


def _reason(matcher: "LLMatcher") -> str:
    """The message of llguidance on one line, without the source that it repeats."""
    lines = [line.strip() for line in matcher.get_error().splitlines()]
    if lines and lines[0].startswith("NoExtension"):
        return "no token of the vocabulary continues the answer"
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no reason given"])[0][:_REASON_CHARS]
