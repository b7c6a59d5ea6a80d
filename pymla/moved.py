"""Former names of modules, which scripts still import: the module under its new name, with a DeprecationWarning."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings

#: Folders, and the modules that lay beside them before.
_FOLDERS = {
    "engine": ("cache", "costs", "filecheck", "loading"),
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
    "pymla.model": "pymla.models.deepseek2",
    "pymla.modelfile": "pymla.files.gguf_reader",
    "pymla.placement": "pymla.engine.planning",
}


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules by their former names."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec):
        """Python's own empty one, which `exec_module` replaces."""

    def exec_module(self, module):
        new = MOVED[module.__name__]
        # The frame above, without the import system's own, which `warn` leaves out, is the import statement's.
        warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)
