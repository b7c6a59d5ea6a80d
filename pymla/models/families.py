"""The family of each architecture."""

from pymla.models.deepseek2 import DeepSeek2
from pymla.models.deepseek32 import DeepSeek32
from pymla.models.minicpm3 import MiniCPM3
from pymla.models.mistral4 import Mistral4
from pymla.models.plm import PLM

#: Architectures that run, as ``general.architecture`` names them, and the class that computes each.
FAMILIES: dict[str, type[DeepSeek2]] = {
    "deepseek2": DeepSeek2,
    "deepseek32": DeepSeek32,
    "glm-dsa": DeepSeek32,
    "minicpm3": MiniCPM3,
    "mistral4": Mistral4,
    "plm": PLM,
}
