"""The family of each architecture."""

from pymla.models.deepseek2 import DeepSeek2
from pymla.models.deepseek32 import DeepSeek32, GlmDsa

#: Architectures that run, as ``general.architecture`` names them, and the class that computes each.
FAMILIES: dict[str, type[DeepSeek2]] = {
    "deepseek2": DeepSeek2,
    "deepseek32": DeepSeek32,
    "glm-dsa": GlmDsa,
}
