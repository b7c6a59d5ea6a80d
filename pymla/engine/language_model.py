"""A model with its tokenizer: text in, text out."""

import gc
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from pymla import checks
from pymla.engine.engine import Engine
from pymla.engine.generation import Generation
from pymla.engine.model import Model
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.models.config import ModelConfig
from pymla.text.tokenizer import Tokenizer


class LanguageModel:
    """A model with its tokenizer. Use as a context manager, or `close` it, to unmap the file.

    Several threads and event loops may use one model. Texts that are generated at the same time are computed together
    (`engine`); a call of `logits` waits for a step of theirs.

    Attributes
    ----------
    config : ModelConfig
    tokenizer : Tokenizer
    model : Model
    file : ModelFile
    recommended : dict of str and (float or str)
        Defaults of sampling parameters that the file gives (`pymla.text.recommended`).
    """

    def __init__(
        self,
        file: ModelFile,
        config: ModelConfig,
        tokenizer: Tokenizer,
        model: Model,
        recommended: Mapping[str, float | str] | None = None,
    ):
        self.file, self.config, self.tokenizer = file, config, tokenizer
        self.recommended = dict(recommended or {})
        self._model: Model | None = model
        self._engine: Engine | None = None
        self._lock = threading.Lock()

    @property
    def device(self) -> str:
        """Where it runs: "cpu", "cuda" or "reference"; with a + between them where its layers are on several."""
        return "+".join(backend.NAME for backend in self.model.placement.backends)

    @property
    def model(self) -> Model:
        """The model.

        Raises
        ------
        PymlaError
            It was closed.
        """
        model = self._model
        if model is None:
            raise PymlaError(f"{self.file.path}: this model was closed; load it again")
        return model

    def tokenize(self, text: str, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text (`Tokenizer.encode`)."""
        if not isinstance(text, str):
            checks.refuse("text", text, "a text is expected")
        return self.tokenizer.encode(text, add_bos, parse_special)

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of token ids (`Tokenizer.decode`)."""
        return self.tokenizer.decode(self._checked("ids", ids, empty=True).tolist())

    def logits(self, ids: Iterable[int]) -> np.ndarray:
        """Logits after every token of a sequence, from an empty cache: float32 (T, vocabulary).

        Raises
        ------
        PymlaError
            The ids are none, too many for the context, or a logit is not finite.
        """
        ids = self._checked("ids", ids)
        model = self.model
        self.file.check_unchanged()
        sequence = model.new_sequence()
        try:
            logits = model.forward([(sequence, ids)], logits="all")
        finally:
            model.free(sequence)
        if not np.isfinite(logits).all():
            position, token = np.argwhere(~np.isfinite(logits))[0].tolist()
            raise PymlaError(
                f"{self.file.path}: the logit of token {token} after position {position} is {logits[position, token]}: "
                "the model's weights are damaged, or overflow"
            )
        return logits

    @property
    def engine(self) -> Engine:
        """The engine, which computes all texts of this model, for `asyncio` and for several texts with one prompt."""
        with self._lock:
            if self._engine is None:
                self._engine = Engine(self)
            return self._engine

    def generation(self, prompt: str | Iterable[int], **options: Any) -> Generation:
        """A text to be generated.

        Parameters
        ----------
        prompt : str, or sequence of int
            A text or token ids.
        max_tokens : int, optional
            By default until the model ends the text or the context is full.
        stop : str, or sequence of str
            Texts that end the generation.
        progress : callable(done, total), optional
            Told of the layers of the prompt's passes.
        special : bool
            Whether control tokens have their names in the text, the one that ends it too.
        shown_tokens : collection of int
            Control tokens that have their names in the text anyway (`AnswerParser.shown_tokens`).
        json_schema : dict, bool or str, optional
            The text is JSON that fits this schema.
        regex : str, optional
            The text matches this regular expression, of Rust's regex crate.
        grammar : str or Grammar, optional
            The text fits this grammar, in Lark's notation or in GBNF, or compiled already (`pymla.text.constraints`).
        constraint : Constraint, optional
            What the text may be, said by an object of the caller's.
        speculation : str or Speculation, optional
            Who drafts tokens of the text: "ngram", "mtp", or what `Engine.speculation` gives. The text stays the same,
            or has the same distribution (docs/speculation.md).
        **options
            The fields of `SamplingParams`; None stands for the file's default, or else the field's.

        Returns
        -------
        Generation
            To iterate over.

        Raises
        ------
        PymlaError
        """
        return self.engine.generation(prompt, **options)

    def stream(self, prompt: str | Iterable[int], **options: Any) -> Iterator[str]:
        """Pieces of text as they are generated; options as for `generation`."""
        return iter(self.generation(prompt, **options))

    def generate(self, prompt: str | Iterable[int], **options: Any) -> str:
        """The whole generated text; options as for `generation`."""
        return "".join(self.generation(prompt, **options))

    def prompt_ids(self, prompt: str | Iterable[int]) -> list[int]:
        """Token ids of a prompt, given as a text or as ids.

        Raises
        ------
        PymlaError
            It is neither, or the model or its file is gone.
        """
        ids = self.tokenize(prompt) if isinstance(prompt, str) else self._checked("prompt", prompt).tolist()
        self.model  # noqa: B018  raises where it was closed
        self.file.check_unchanged()
        return ids

    def close(self) -> None:
        """Let go of the weights and of the cache. Waits for a step that another thread runs; generations that are not
        at their end fail when they are read on."""
        model, self._model = self._model, None
        if model is None:
            return
        try:
            model.close()
        except PymlaError:
            self._model = model
            raise
        gc.collect()  # a recorded step knows its model, and the model knows it
        for backend in model.placement.backends:
            backend.memory.release()

    def __enter__(self) -> "LanguageModel":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _checked(self, name: str, ids: Any, empty: bool = False) -> np.ndarray:
        """Token ids as int32 (T,)."""
        try:
            array = np.asarray(ids)
        except Exception:  # rows of different length, and whatever a caller's own class does
            array = np.array(None)
        if empty and array.shape == (0,):
            return array.astype(np.int32)
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            texts = "a text, or " if name == "prompt" else ""
            checks.refuse(name, ids, f"{texts}token ids, a list of at least one integer, are expected")
        if array.min() < 0 or array.max() >= self.config.vocab_size:
            raise PymlaError(
                f"token ids go from {array.min()} to {array.max()}; the vocabulary has {self.config.vocab_size}"
            )
        return array.astype(np.int32)
