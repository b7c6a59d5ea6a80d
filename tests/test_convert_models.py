"""Every architecture that `pymla convert` knows: against llama.cpp's converter, and by the names of its tensors."""

import json
from pathlib import Path

import numpy as np
import pytest
from golden_converted import GOLDEN, TYPES, listing
from hub import safetensors, write_json
from hub_models import MODELS, SAMPLING, language_weights, stored_weights, write_folder

from pymla import ggml
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.make.checkpoint_names import CheckpointNames
from pymla.make.checkpoint_tensors import Plan
from pymla.make.convert import convert
from pymla.make.hub_config import CLASSES, HubConfig
from pymla.make.hub_weights import HubWeights
from pymla.models.config import ModelConfig
from pymla.models.families import FAMILIES
from pymla.models.tensors import nextn_tensors
from pymla.text.recommended import recommended_sampling
from pymla.text.tokenizer import Tokenizer

#: What llama.cpp guesses from the name of the folder and its model card. pymla takes the name as it is.
GUESSED = ("name", "basename", "size_label", "version", "finetune", "organization")

#: What llama.cpp's converter leaves unsaid, and engines guess or do without.
UNSAID = {
    "GLM-4.7-Flash": {"deepseek2.expert_gating_func"},
    "Mistral-Small-4": {
        f"mistral4.{key}"
        for key in ("expert_gating_func", "attention.temperature_scale", "attention.temperature_length")
    },
    "MiniCPM3": {
        "minicpm3.rope.freq_base",
        "minicpm3.rope.scaling.original_context_length",
        "tokenizer.ggml.eos_token_id",  # one of a list
    },
}
#: Ends of a text beside the first one, for which llama.cpp's converter has no rule.
MORE_ENDS = {"tokenizer.ggml.eot_token_id"}


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text(encoding="utf-8"))["models"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of each model, by its name."""
    place = tmp_path_factory.mktemp("hub")
    return {name: write_folder(place / name, name) for name in MODELS}


def converted(folder, path, **options):
    name = folder.name
    pre = {"bpe": "deepseek-coder", "glm": "glm4"}.get(MODELS[name].tokenizer) if name in MODELS else None
    return convert(folder, path, **{"qtype": "f32", "pre": pre} | options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("qtype", TYPES)
def test_as_llama_cpp_converts_it(name, qtype, golden, folders, tmp_path):
    """By the digest of every tensor and every value of the metadata."""
    found = listing(converted(folders[name], tmp_path / "m.gguf", qtype=qtype).path)
    assert found["tensors"] == golden[name]["tensors" if qtype == "f32" else "tensors_f16"]
    ours, theirs = found["metadata"], golden[name]["metadata"]
    for key in GUESSED:
        theirs.pop(f"general.{key}", None)
    assert ours.pop("general.name") == name
    if qtype != TYPES[0]:  # that of the metadata
        ours["general.file_type"] = theirs["general.file_type"]
    assert {key for key in theirs if ours.get(key) != theirs[key]} == set()
    more = UNSAID.get(name, set())
    assert more <= ours.keys() - theirs.keys() <= more | MORE_ENDS


def test_every_architecture_that_runs_is_converted():
    assert {each.architecture for each in CLASSES.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_converted_loads(name, folders, tmp_path):
    """In every layout, and all layers that predict further tokens are whole."""
    model = MODELS[name]
    for layout in ("split", "kv_b", "all"):
        done = converted(folders[name], tmp_path / f"{layout}.gguf", layout=layout, mtp=bool(model.nextn))
        file = ModelFile.open(done.path)
        config = ModelConfig.from_gguf(file)
        assert config.num_nextn_predict_layers == model.nextn
        assert config.num_hidden_layers == 2
        behind = [spec for layer in range(2, 2 + model.nextn) for spec in nextn_tensors(config, layer, file.tensors)]
        missing = {spec.name for spec in behind if spec.name not in file.tensors}
        assert missing == set()
        has = {each for each in ("k_b", "kv_b") if f"blk.0.attn_{each}.weight" in file.tensors}
        whole = name in ("MiniCPM3", "PLM")
        assert has == ({"kv_b"} if whole else {"split": {"k_b"}, "kv_b": {"kv_b"}, "all": {"k_b", "kv_b"}}[layout])
        assert any("are left out: the file holds the language model only" in note for note in done.notes) == (
            model.names != "plain"
        )


@pytest.mark.parametrize("name", ["V3", "V3.2", "GLM-4.7-Flash", "GLM-5"])
def test_layers_that_predict_further_tokens(name, folders, tmp_path):
    """By default as in llama.cpp's converter."""
    kept = {}
    for mtp in (None, False, True):
        done = converted(folders[name], tmp_path / "m.gguf", mtp=mtp)
        metadata = ModelFile.open(done.path).metadata
        architecture = metadata["general.architecture"]
        nextn, blocks = (metadata.get(f"{architecture}.{key}", 0) for key in ("nextn_predict_layers", "block_count"))
        assert blocks == 2 + nextn
        assert bool(nextn) == any(tensor.startswith("blk.2.") for tensor in ModelFile.open(done.path).tensors)
        assert bool(nextn) != ("layers 2 predict further tokens and are left out" in done.notes)
        kept[mtp] = bool(nextn)
    assert kept == {None: name != "V3", False: False, True: True}


def test_optional_tensors_of_a_layer_that_predicts_further_tokens(tmp_path):
    """V3's has an embedding and an output matrix of its own, others share those of the model."""
    folder = write_folder(tmp_path / "V3", "V3")
    weights = stored_weights(MODELS["V3"])
    for module in ("embed_tokens", "shared_head.head", "shared_head.norm"):
        del weights[f"model.layers.2.{module}.weight"]
    safetensors(folder / "model.safetensors", weights)
    names = set(ModelFile.open(converted(folder, tmp_path / "m.gguf", mtp=True).path).tensors)
    assert {name for name in names if ".nextn." in name} == {
        f"blk.2.nextn.{module}.weight" for module in ("eh_proj", "enorm", "hnorm")
    }
    assert "blk.2.ffn_down_exps.weight" in names
    del weights["model.layers.2.hnorm.weight"]
    safetensors(folder / "model.safetensors", weights)
    with pytest.raises(PymlaError, match=r"model\.layers\.2\.hnorm\.weight is missing"):
        converted(folder, tmp_path / "m.gguf", mtp=True)


def test_layers_that_are_not_there(folders, tmp_path):
    with pytest.raises(PymlaError, match=r"V2: no layers that predict further tokens, which `mtp` asks for"):
        converted(folders["V2"], tmp_path / "m.gguf", mtp=True)
    folder = write_folder(tmp_path / "V3", "V3")
    weights = {name.replace("layers.2.", "layers.3."): value for name, value in stored_weights(MODELS["V3"]).items()}
    safetensors(folder / "model.safetensors", weights)
    with pytest.raises(
        PymlaError, match="1 layers that predict further tokens are there, and not all of those up to 3"
    ):
        converted(folder, tmp_path / "m.gguf", mtp=True)
    assert not list(tmp_path.glob("m.gguf*"))


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.", "language_model.model.", "model.language_model."])
def test_prefixes_of_names(prefix, folders, golden, tmp_path):
    folder = write_folder(tmp_path / "V3", "V3")
    weights = language_weights(MODELS["V3"])
    head = "language_model." if prefix.startswith("language_model.") else ""
    named = {(head if name == "lm_head.weight" else prefix) + name: value for name, value in weights.items()}
    safetensors(folder / "model.safetensors", named)
    assert listing(converted(folder, tmp_path / "m.gguf").path)["tensors"] == golden["V3"]["tensors"]


def test_one_tensor_by_two_names(tmp_path):
    folder = write_folder(tmp_path / "V3", "V3")
    weights = stored_weights(MODELS["V3"])
    safetensors(folder / "model.safetensors", weights | {"language_model.norm.weight": weights["model.norm.weight"]})
    with pytest.raises(PymlaError, match=r"language_model\.norm\.weight and model\.norm\.weight are one tensor"):
        converted(folder, tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["model", "language_model.model", "layers", "layers.x.y", "", ".", "vision_tower"])
def test_names_that_are_no_tensors(name, tmp_path):
    """They are left out as parts of another model, or refused by name, whatever they are."""
    folder = write_folder(tmp_path / "V3", "V3")
    safetensors(folder / "model.safetensors", stored_weights(MODELS["V3"]) | {name: np.ones(2, np.float32)})
    if name == "vision_tower":
        assert "1 tensors of vision_tower are left out" in converted(folder, tmp_path / "m.gguf").notes[0]
    else:
        with pytest.raises(PymlaError, match=f"tensor {name} is not one of this architecture's"):
            converted(folder, tmp_path / "m.gguf")


def test_names_of_layers():
    names = CheckpointNames.of(["model.layers.3.x.weight", "layers.10.y", "layers.a.y", "layersx.4.y", "norm"], Path())
    assert names.layers() == {3, 10}


def test_experts_in_one_tensor_stay_so_in_files_of_mistral_4_only(folders, tmp_path):
    weights = language_weights(MODELS["Mistral-Small-4"])
    file = ModelFile.open(converted(folders["Mistral-Small-4"], tmp_path / "m.gguf").path)
    both = file.tensors["blk.1.ffn_gate_up_exps.weight"]
    assert (both.qtype, both.shape) == (ggml.F32, (4, 64, 64))
    wanted = [weights[f"layers.1.mlp.experts.3.{part}_proj.weight"] for part in ("gate", "up")]
    np.testing.assert_array_equal(both.data.view(np.float32).reshape(both.shape)[3], np.concatenate(wanted))


def test_sources_come_in_pieces_of_one_matrix(folders, monkeypatch):
    """Whatever their size."""
    config = HubConfig(folders["Mistral-Small-4"] / "config.json")
    for piece in (200, 1 << 22):
        monkeypatch.setattr("pymla.make.checkpoint_tensors.PIECE_WEIGHTS", piece)
        for source in Plan(config, HubWeights(folders["Mistral-Small-4"]), "split").sources():
            rows, matrix = 0, source.shape[-2] if len(source.shape) > 1 else 1
            for part in source.rows():
                assert part.dtype == np.float32
                assert part.shape[1] == source.shape[-1]
                assert rows // matrix == (rows + len(part) - 1) // matrix, source.name
                rows += len(part)
            assert rows * source.shape[-1] == np.prod(source.shape), source.name


def test_float8_as_mistral_stores_it(tmp_path):
    """A scale for a matrix, and one for what it is multiplied by, which nothing needs."""
    folder = write_folder(tmp_path / "Mistral-Large-3", "Mistral-Large-3")
    model = MODELS["Mistral-Large-3"]
    write_json(folder / "params.json", model.config | {"quantization": {"qformat_weight": "fp8_e4m3"}})
    weights = stored_weights(model)
    name = "layers.1.experts.2.w2"
    codes = np.full((64, 32), 0x38, np.uint8)  # 1
    codes[3, 5] = 0xC0  # -2
    weights |= {f"{name}.weight": ("F8_E4M3", codes), f"{name}.qscale_weight": np.float32([0.25]).reshape(())}
    weights[f"{name}.qscale_act"] = np.float32([2.0]).reshape(())
    safetensors(folder / "consolidated.safetensors", weights)
    found = ModelFile.open(converted(folder, tmp_path / "m.gguf").path).tensors["blk.1.ffn_down_exps.weight"]
    values = found.data.view(np.float32).reshape(found.shape)[2]
    assert (values[0, 0], values[3, 5], values[63, 31]) == (0.25, -0.5, 0.25)


def test_recommended_sampling(folders, tmp_path):
    file = ModelFile.open(converted(folders["V3"], tmp_path / "m.gguf").path)
    found = recommended_sampling(file)
    wanted = {key: value for key, value in SAMPLING.items() if key != "do_sample"}
    assert found.values == pytest.approx(wanted)
    assert found.warnings == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("temperature", "hot", r'temperature is "hot"; a value of type float or int'),
        ("top_p", 1e300, "top_p is 1e\\+300; a number that float32 holds"),
        ("top_k", 0.5, "top_k is 0.5; a value of type int"),
        ("top_k", -2, "top_k is -2; a number from -1"),
    ],
)
def test_sampling_that_is_refused(key, value, message, tmp_path):
    folder = write_folder(tmp_path / "V2", "V2")
    write_json(folder / "generation_config.json", {key: value})
    with pytest.raises(PymlaError, match=rf"generation_config\.json: {message}"):
        converted(folder, tmp_path / "m.gguf")


def test_glm_has_its_own_special_tokens(folders, tmp_path):
    metadata = ModelFile.open(converted(folders["GLM-5"], tmp_path / "m.gguf").path).metadata
    ids = {key: metadata[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "eot", "eom", "unknown")}
    assert ids == {"bos": 283, "eos": 282, "eot": 284, "eom": 285, "unknown": 282}


@pytest.mark.parametrize(
    ("name", "bos", "end"),
    [("Kimi-K2", None, ("<|im_end|>", 272)), ("Mistral-Large-3", 1, ("</s>", 2)), ("MiniCPM3", 1, ("<|im_end|>", 282))],
)
def test_vocabularies_encode(name, bos, end, folders, tmp_path):
    tokenizer = Tokenizer.from_gguf(converted(folders[name], tmp_path / "m.gguf").path)
    text, (special, token) = "the thing in the  end 12 " + "н" * 3, end
    ids = tokenizer.encode(text + special, parse_special=True)
    assert tokenizer.decode(ids) == text
    assert (ids[0] if tokenizer.add_bos else None) == bos
    assert ids[-1] == token
    assert token in tokenizer.eos_ids


def changed(tmp_path, name, **changes):
    """The folder of a model whose configuration has other values; None takes one out."""
    folder = write_folder(tmp_path / name, name)
    config = MODELS[name].config
    for key, value in changes.items():
        config = config | {key: value}
    kept = {key: value for key, value in config.items() if value is not ...}
    write_json(folder / MODELS[name].file, kept)
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Mistral-Small-4", {"text_config": {"model_type": "ministral3"}}, "text_config.model_type is .ministral3."),
        ("Mistral-Small-4", {"text_config": ...}, "text_config.model_type is null"),
        ("Kimi-K2.5", {"text_config": []}, "text_config is an array of 0"),
        ("Kimi-K2.5", {"text_config": {}}, "qk_rope_head_dim is missing"),
        ("Mistral-Large-3", {"moe": ...}, "moe is null; only models with latent attention and experts"),
        ("Mistral-Large-3", {"yarn": ...}, "yarn is null; llama_4_scaling without it"),
        ("Mistral-Large-3", {"yarn": {"apply_scale": True}}, "apply_scale is true; only false is converted"),
        ("Mistral-Large-3", {"yarn": {"apply_scale": False}}, "factor of the rope parameters is missing"),
        ("Mistral-Large-3", {"quantization": {"qformat_weight": "nvfp4"}}, "qformat_weight is .nvfp4."),
        ("MiniCPM3", {"rope_parameters": {"rope_type": "longrope"}}, "long_factor of the rope parameters is missing"),
        ("MiniCPM3", {"dim_model_base": 0}, "dim_model_base is 0"),
        ("PLM", {"hidden_act": "silu"}, 'hidden_act is "silu"; only "relu2" is converted'),
        ("GLM-4.7-Flash", {"first_k_dense_replace": ..., "mlp_layer_types": ["sparse", "dense"]}, "mlp_layer_types"),
        ("GLM-4.7-Flash", {"first_k_dense_replace": ..., "mlp_layer_types": ["dense"]}, "mlp_layer_types"),
        ("V3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_configurations_that_are_refused(name, changes, message, tmp_path):
    with pytest.raises(PymlaError, match=message) as error:
        converted(changed(tmp_path, name, **changes), tmp_path / "m.gguf")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("factors", ["long_factor", "short_factor"])
def test_factors_of_rope_that_are_refused(factors, count, tmp_path):
    rope = MODELS["MiniCPM3"].config["rope_parameters"] | {factors: [1.0] * count}
    with pytest.raises(PymlaError, match=f"{factors} is an array of {count}; 8 numbers above 0"):
        converted(changed(tmp_path, "MiniCPM3", rope_parameters=rope), tmp_path / "m.gguf")


def test_layers_without_experts_by_their_types(tmp_path):
    """As transformers 5 saves GLM's configuration."""
    folder = changed(tmp_path, "GLM-4.7-Flash", first_k_dense_replace=...)
    assert ModelConfig.from_gguf(ModelFile.open(converted(folder, tmp_path / "m.gguf").path)).first_k_dense_replace == 1


@pytest.mark.parametrize(
    ("changes", "scales", "said"),
    [
        ({}, (12.0, 1.4 / 2**0.5, 64 / 256), ()),
        (
            {"scale_emb": 3, "scale_depth": 2.0, "dim_model_base": 16},
            (3.0, 2.0 / 2**0.5, 4.0),
            ("embedding", "residual", "logit"),
        ),
        ({"scale_depth": None, "dim_model_base": None}, (12.0, 1.0, 1.0), ("residual", "logit")),
    ],
)
def test_scales_of_minicpm3(changes, scales, said, tmp_path):
    """Those of MiniCPM3-4B are in no file; others are."""
    file = ModelFile.open(converted(changed(tmp_path, "MiniCPM3", **changes), tmp_path / "m.gguf").path)
    config = ModelConfig.from_gguf(file)
    assert (config.embedding_scale, config.residual_scale, config.logit_scale) == pytest.approx(scales)
    for key in ("embedding", "residual", "logit"):
        assert (f"minicpm3.{key}_scale" in file.metadata) == (key in said)


def test_longrope_beyond_the_original_context(tmp_path):
    """transformers' factor on cos and sin."""
    rope = MODELS["MiniCPM3"].config["rope_parameters"] | {"original_max_position_embeddings": 64}
    file = ModelFile.open(converted(changed(tmp_path, "MiniCPM3", rope_parameters=rope), tmp_path / "m.gguf").path)
    config = ModelConfig.from_gguf(file)
    assert config.original_context_length == 64
    assert config.attention_factor == pytest.approx((1 + np.log(256 / 64) / np.log(64)) ** 0.5)


def test_the_weights_decide_between_config_json_and_params_json(tmp_path):
    folder = write_folder(tmp_path / "V2", "V2")
    write_json(folder / "params.json", {"dim": 1})
    assert HubConfig(folder / "config.json").path.name == "config.json"
    folder = write_folder(tmp_path / "Mistral-Large-3", "Mistral-Large-3")
    assert HubConfig(folder / "config.json").path.name == "params.json"
    (folder / "config.json").unlink()
    config = HubConfig(folder / "config.json")
    assert config.path.name == "params.json"
    assert config.shape("x").temperature_scale == pytest.approx(0.1)
