"""How the weights of a Hugging Face checkpoint are quantised, by its config.json."""

from pymla.files.checkpoint_encodings import Quantisation
from pymla.make.hub_config import HubConfig
from pymla.models.metadata import MAX_SIZE

#: Values of ``quant_method`` whose weights are read, of ``quant_algo`` of modelopt, and of ``format`` of
#: compressed-tensors.
_METHODS = ("fp8", "compressed-tensors", "mxfp4", "quark", "modelopt", "gptq", "awq")
_ALGORITHMS = ("NVFP4", "FP8", "MIXED_PRECISION")
_FORMATS = ("pack-quantized", "mxfp4-pack-quantized", "float-quantized", "naive-quantized")


def read_quantisation(config: HubConfig) -> Quantisation:
    """What a config.json says of quantised weights.

    Raises
    ------
    PymlaError
        They are quantised in a way that is not read.
    """
    found = config.get("quantization_config", dict)
    if found is None:
        return Quantisation()
    method = found.get("quant_method")
    if method not in _METHODS:
        config.refuse("quantization_config.quant_method", method, f"{', '.join(_METHODS)} are converted")
    if method == "compressed-tensors":
        return _compressed_tensors(config, found)
    if method == "modelopt":
        return _modelopt(config, found)
    if method in ("gptq", "awq"):
        return _gptq_or_awq(config, found)
    # Null: the scales are of whole tensors.
    block = found.get("weight_block_size") or [128, 128]
    if not _is_block(block):
        config.refuse("quantization_config.weight_block_size", block, f"two sizes from 1 to {MAX_SIZE} are expected")
    return Quantisation(block=(block[0], block[1]))


def _modelopt(config: HubConfig, found: dict) -> Quantisation:
    """NVIDIA's Model Optimizer, whose float8 has one scale for a tensor."""
    kind = found.get("quant_algo")
    if kind not in _ALGORITHMS:
        config.refuse("quantization_config.quant_algo", kind, f"{', '.join(_ALGORITHMS)} are converted")
    return Quantisation()


def _gptq_or_awq(config: HubConfig, found: dict) -> Quantisation:
    """Integers of four bits with zero points. Sizes of groups follow from the tensors."""
    key, bits = "quantization_config", found.get("bits", found.get("w_bit"))
    if bits != 4:
        config.refuse(f"{key}.bits", bits, "only 4 is converted")
    if found["quant_method"] == "awq":
        version = found.get("version", "gemm")
        if not isinstance(version, str) or version.lower() != "gemm":
            config.refuse(f"{key}.version", version, "only gemm is converted")
        return Quantisation()
    form = found.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        config.refuse(f"{key}.checkpoint_format", form, "gptq and gptq_v2 are converted")
    return Quantisation(zeros_from=1 if form == "gptq" else 0)


def _compressed_tensors(config: HubConfig, found: dict) -> Quantisation:
    """The one group of weights of a file of compressed-tensors."""
    key, kind = "quantization_config", found.get("format")
    if kind not in _FORMATS:
        config.refuse(f"{key}.format", kind, f"{', '.join(_FORMATS)} are converted")
    groups = found.get("config_groups")
    tables = list(groups.values()) if isinstance(groups, dict) else []
    weights = [each.get("weights") if isinstance(each, dict) else None for each in tables]
    if not weights or not all(isinstance(each, dict) and each == weights[0] for each in weights):
        config.refuse(f"{key}.config_groups", groups, "groups with the same weights are expected")
    only: dict = weights[0] or {}
    if kind == "pack-quantized":
        bits, group = only.get("num_bits"), only.get("group_size")
        if bits != 4:
            config.refuse(f"{key}.config_groups.weights.num_bits", bits, "only 4 is converted")
        if type(group) is not int or not 0 < group <= MAX_SIZE:
            config.refuse(f"{key}.config_groups.weights.group_size", group, f"a number to {MAX_SIZE} is expected")
        return Quantisation(group=group)
    block = only.get("block_structure") or [128, 128]
    if not _is_block(block):
        config.refuse(f"{key}.config_groups.weights.block_structure", block, "two sizes are expected")
    return Quantisation(block=(block[0], block[1]))


def _is_block(block: object) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n <= MAX_SIZE for n in block)
