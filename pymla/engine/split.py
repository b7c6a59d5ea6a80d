"""Which part of a model goes to the GPU.

As in llama.cpp the last layers go to the GPU, with their cache, and behind them the output matrix; the first stay with
the CPU. Routed experts are most of a model's bytes, of which a token reads few: they can stay with the CPU by
themselves (``--cpu-moe``).
"""

from typing import NamedTuple

from pymla.backend import Backend
from pymla.models.config import ModelConfig
from pymla.models.placement import Placement


class Split(NamedTuple):
    """The part of a model that is on the GPU."""

    gpu_layers: int  # how many of the last of L layers; L + 1: all of them, and the output matrix
    cpu_moe: bool = False  # the experts that the router chooses from stay with the CPU

    @classmethod
    def all(cls, config: ModelConfig) -> "Split":
        """Everything on the GPU."""
        return cls(config.num_hidden_layers + 1)

    def first(self, config: ModelConfig) -> int:
        """The first layer on the GPU; L where there is none."""
        return max(0, config.num_hidden_layers - self.gpu_layers)

    def output(self, config: ModelConfig) -> bool:
        """Whether the output matrix is on the GPU."""
        return self.gpu_layers > config.num_hidden_layers

    def apart(self, config: ModelConfig) -> bool:
        """Whether experts of layers on the GPU are on the CPU."""
        return self.cpu_moe and max(self.first(config), config.first_k_dense_replace) < config.num_hidden_layers

    def whole(self, config: ModelConfig) -> bool:
        """Whether everything is on the GPU; with it the embedding, of which a token needs a single row."""
        return self.output(config) and not self.apart(config)

    def placement(self, config: ModelConfig, host: Backend, device: Backend) -> Placement:
        """The backend of every part of a model: `device` of the parts on the GPU, `host` of the others."""
        first, layers = self.first(config), range(config.num_hidden_layers)
        routed = range(max(first, config.first_k_dense_replace) if self.cpu_moe else len(layers), len(layers))
        return Placement(
            embedding=device if self.whole(config) else host,
            layers=tuple(device if i >= first else host for i in layers),
            experts=tuple(device if i >= first and i not in routed else host for i in layers),
            output=device if self.output(config) else host,
        )

    def describe(self, config: ModelConfig) -> str:
        """In words."""
        layers = config.num_hidden_layers
        if self.output(config):
            text = f"all {layers} layers"
        elif self.gpu_layers == layers:
            text = f"all {layers} layers, the output matrix on the CPU"
        else:
            number = f" {self.gpu_layers}" if self.gpu_layers > 1 else ""
            text = f"the last{number} of {layers} layers"
        return text + (", routed experts on the CPU" if self.apart(config) else "")

    def options(self, config: ModelConfig) -> str:
        """As arguments of `pymla.load`, for messages."""
        layers = "" if self.output(config) else f"`gpu_layers` {self.gpu_layers}"
        return f"{layers} {'`cpu_moe`' if self.cpu_moe else ''}".strip()
