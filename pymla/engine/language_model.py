"""A model with its tokenizer: text in, text out."""

import gc
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from pymla import checks
from pymla.backend import Progress
from pymla.engine.generation import Generation
from pymla.engine.model import Model
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.models.config import ModelConfig
from pymla.text.sampling import SamplingParams
from pymla.text.tokenizer import Tokenizer


class LanguageModel:
    """A model with its tokenizer. Use as a context manager, or `close` it, to unmap the file.

    Several threads may use one model. Calls of `generate` and `logits` wait for each other; the steps of streams take
    turns.

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

    def generation(
        self,
        prompt: str | Iterable[int],
        *,
        max_tokens: int | None = None,
        stop: str | Iterable[str] | None = (),
        progress: Progress | None = None,
        special: bool = False,
        **sampling: Any,
    ) -> Generation:
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
            Told of the layers of the prompt's pass.
        special : bool
            Whether control tokens have their names in the text, the one that ends it too.
        **sampling
            The fields of `SamplingParams`; None stands for the file's default, or else the field's.

        Returns
        -------
        Generation
            To iterate over.

        Raises
        ------
        PymlaError
        """
        params = SamplingParams.of(sampling, self.recommended).for_tokenizer(self.tokenizer)
        ids = self.tokenize(prompt) if isinstance(prompt, str) else self._checked("prompt", prompt).tolist()
        model = self.model
        self.file.check_unchanged()
        return Generation(model, self.tokenizer, ids, params, max_tokens, stop, progress, special)

    def stream(self, prompt: str | Iterable[int], **options: Any) -> Iterator[str]:
        """Pieces of text as they are generated; options as for `generation`."""
        return iter(self.generation(prompt, **options))

    def generate(self, prompt: str | Iterable[int], **options: Any) -> str:
        """The whole generated text; options as for `generation`."""
        generation = self.generation(prompt, **options)
        with generation.model.turn:
            return "".join(generation)

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
