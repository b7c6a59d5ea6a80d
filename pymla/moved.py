"""Former names of modules, which scripts still import: the module under its new name, with a DeprecationWarning."""

import importlib
import importlib.machinery
import sys
import types
import warnings

#: Folders, and the modules that lay beside them before.
_FOLDERS = {
    "engine": ("cache", "costs", "filecheck", "loading", "model"),
    "files": ("checkpoint", "outputs", "textfile", "values"),
    "host": ("cgroups", "cores", "kernel_cache", "memory", "numba_check", "source_key"),
    "make": ("convert", "hub_config", "hub_tokenizer"),
    "measure": ("plot",),
    "models": ("config", "tensors", "weights"),
    "text": ("chat", "sampling", "templates", "tokenizer"),
}

#: Modules by their former names.
MOVED = {f"pymla.{name}": f"pymla.{folder}.{name}" for folder, names in _FOLDERS.items() for name in names} | {
    "pymla.backends": "pymla.models.placement",
    "pymla.bench": "pymla.measure.sweep",
    "pymla.generate": "pymla.engine.generation",
    "pymla.modelfile": "pymla.files.gguf_reader",
    "pymla.placement": "pymla.engine.planning",
}


class Finder:
    """Finds modules by their former names. No class of `importlib.abc` is its base: that imports for milliseconds."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Python's own empty one, which `exec_module` replaces."""

    def exec_module(self, module: types.ModuleType) -> None:
        new = MOVED[module.__name__]
        # The frame above, without the import system's own, which `warn` leaves out, is the import statement's.
        warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)
