"""The samplers of llama.cpp, called in its built library."""

import ctypes
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from pymla.text.sampling import SamplingParams

_POINTER, _INT, _UINT, _FLOAT, _SIZE = (
    *(ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32, ctypes.c_float, ctypes.c_size_t),
)

#: Tokens that the exponent of Zipf's law is estimated from, as in ``common_sampler_init``.
_MIROSTAT_M = 100


class _ModelParams(ctypes.Structure):
    """``llama_model_params``."""

    _fields_ = (
        ("devices", _POINTER),
        ("tensor_buft_overrides", _POINTER),
        ("n_gpu_layers", _INT),
        ("split_mode", _INT),
        ("load_mode", _INT),
        ("lazy_mode", _INT),
        ("main_gpu", _INT),
        ("tensor_split", _POINTER),
        ("progress_callback", _POINTER),
        ("progress_callback_user_data", _POINTER),
        ("kv_overrides", _POINTER),
        *((name, ctypes.c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc")),
        ("load_mtp", ctypes.c_bool),
    )


class _Bias(ctypes.Structure):
    """``llama_logit_bias``."""

    _fields_ = (("token", _INT), ("bias", _FLOAT))


class _TokenData(ctypes.Structure):
    """``llama_token_data``."""

    _fields_ = (("id", _INT), ("logit", _FLOAT), ("p", _FLOAT))


class _TokenDataArray(ctypes.Structure):
    """``llama_token_data_array``."""

    _fields_ = (
        ("data", ctypes.POINTER(_TokenData)),
        ("size", _SIZE),
        ("selected", ctypes.c_int64),
        ("sorted", ctypes.c_bool),
    )


_INITS = {
    "penalties": (_INT, _INT, _FLOAT, _FLOAT, _FLOAT),
    "dry": (_POINTER, _FLOAT, _FLOAT, _INT, _INT, _POINTER, _SIZE),
    "top_n_sigma": (_FLOAT,),
    "top_k": (_INT,),
    "typical": (_FLOAT, _SIZE),
    "top_p": (_FLOAT, _SIZE),
    "min_p": (_FLOAT, _SIZE),
    "xtc": (_FLOAT, _FLOAT, _SIZE, _UINT),
    "temp": (_FLOAT,),
    "temp_ext": (_FLOAT, _FLOAT, _FLOAT),
    "mirostat": (_INT, _UINT, _FLOAT, _FLOAT, _INT),
    "mirostat_v2": (_UINT, _FLOAT, _FLOAT),
    "adaptive_p": (_FLOAT, _FLOAT, _UINT),
    "dist": (_UINT,),
    "logit_bias": (_INT, _INT, _POINTER),
}


class LlamaLibrary:
    """``libllama`` with the vocabulary of a file.

    Parameters
    ----------
    path : Path
        The shared library.
    model : Path
        A GGUF file.
    """

    def __init__(self, path: Path, model: Path):
        self.library = library = ctypes.CDLL(str(path))
        library.llama_model_default_params.restype = _ModelParams
        library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _ModelParams]
        for name in ("llama_model_load_from_file", "llama_model_get_vocab"):
            getattr(library, name).restype = _POINTER
        library.llama_model_get_vocab.argtypes = [_POINTER]
        library.llama_sampler_accept.argtypes = [_POINTER, _INT]
        library.llama_sampler_apply.argtypes = [_POINTER, ctypes.POINTER(_TokenDataArray)]
        library.llama_sampler_free.argtypes = [_POINTER]
        for name, arguments in _INITS.items():
            function = getattr(library, f"llama_sampler_init_{name}")
            function.argtypes, function.restype = list(arguments), _POINTER
        settings = library.llama_model_default_params()
        settings.vocab_only = True
        loaded = library.llama_model_load_from_file(str(model).encode(), settings)
        self.vocab = library.llama_model_get_vocab(loaded)

    def init(self, name: str, *arguments) -> int:
        """``llama_sampler_init_NAME``."""
        return getattr(self.library, f"llama_sampler_init_{name}")(*arguments)


class LlamaChain:
    """The samplers that llama.cpp's ``common_sampler_init`` makes of parameters, called one after the other.

    Parameters
    ----------
    library : LlamaLibrary
    params : SamplingParams
        DRY's sequence breakers are texts. Windows of 0 tokens, which are all tokens, are not known here.
    tokens : int
        Size of the vocabulary.
    history : sequence of int
    """

    def __init__(self, library: LlamaLibrary, params: SamplingParams, tokens: int, history: Iterable[int]):
        self._library = library.library
        self._samplers = [library.init(name, *arguments) for name, *arguments in _inits(library, params, tokens)]
        for token in history:
            self.accept(token)

    def apply(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Ids of the tokens that are left, the softmax of their logits, and the chosen token."""
        data = (_TokenData * len(logits))(*((i, float(x), 0.0) for i, x in enumerate(logits)))
        array = _TokenDataArray(data, len(logits), -1, False)
        for sampler in self._samplers:
            self._library.llama_sampler_apply(sampler, ctypes.byref(array))
        left = [array.data[i] for i in range(array.size)]
        found = np.array([each.logit for each in left])
        weights = np.exp(found - found.max())
        return np.array([each.id for each in left]), weights / weights.sum(), left[array.selected].id

    def accept(self, token: int) -> None:
        for sampler in self._samplers:
            self._library.llama_sampler_accept(sampler, token)

    def close(self) -> None:
        for sampler in self._samplers:
            self._library.llama_sampler_free(sampler)


def _inits(library: LlamaLibrary, p: SamplingParams, tokens: int) -> list[Sequence]:
    """Names and arguments of the samplers, in their order; the seed is 1."""
    found: list[Sequence] = []
    if p.logit_bias:
        biases = (_Bias * len(p.logit_bias))(*p.logit_bias.items())
        found.append(("logit_bias", tokens, len(p.logit_bias), ctypes.cast(biases, _POINTER)))
    if p.mirostat:
        found.append(("temp", p.temperature))
        if p.mirostat == 1:
            return [*found, ("mirostat", tokens, 1, p.mirostat_tau, p.mirostat_eta, _MIROSTAT_M)]
        return [*found, ("mirostat_v2", 1, p.mirostat_tau, p.mirostat_eta)]
    texts = [text.encode() for text in p.dry_sequence_breakers]
    breakers = ctypes.cast((ctypes.c_char_p * len(texts))(*texts), _POINTER)
    dry = (library.vocab, p.dry_multiplier, p.dry_base, p.dry_allowed_length, p.dry_window, breakers, len(texts))
    arguments = {
        "penalties": (tokens, p.penalty_window, p.repetition_penalty, p.frequency_penalty, p.presence_penalty),
        "dry": dry,
        "top_n_sigma": (p.top_n_sigma,),
        "top_k": (p.top_k,),
        "typ_p": (p.typical_p, p.min_keep),
        "top_p": (p.top_p, p.min_keep),
        "min_p": (p.min_p, p.min_keep),
        "xtc": (p.xtc_probability, p.xtc_threshold, p.min_keep, 1),
        "temperature": (p.temperature, p.dynatemp_range, p.dynatemp_exponent),
    }
    names = {"typ_p": "typical", "temperature": "temp_ext"}
    found += [(names.get(name, name), *arguments[name]) for name in p.samplers if name != "adaptive_p"]
    if "adaptive_p" in p.samplers:
        return [*found, ("adaptive_p", p.adaptive_target, p.adaptive_decay, 1)]
    return [*found, ("dist", 1)]
