"""Recipes: rules of the user, what is kept, what is protected, and reasons."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pymla import ggml
from pymla.cpu.quantise import QUANTISERS
from pymla.errors import PymlaError
from pymla.make.mixes import MIXES, bits
from pymla.make.recipe import PROTECTED, TYPES, TensorInfo, needs_importance, read_rules, recipe_for

#: A layer with experts of a small model, whose rows are multiples of 256 but for those of k_b and of the experts' down.
MODEL = [
    TensorInfo("token_embd.weight", (512, 256), ggml.BF16),
    TensorInfo("output_norm.weight", (256,)),
    TensorInfo("output.weight", (512, 256), ggml.BF16),
    TensorInfo("blk.0.attn_norm.weight", (256,)),
    TensorInfo("blk.0.attn_q.weight", (384, 256), ggml.BF16),
    TensorInfo("blk.0.attn_kv_a_mqa.weight", (320, 256), ggml.BF16),
    TensorInfo("blk.0.attn_kv_a_norm.weight", (256,)),
    TensorInfo("blk.0.attn_k_b.weight", (4, 256, 64), ggml.BF16),
    TensorInfo("blk.0.attn_v_b.weight", (4, 64, 256), ggml.BF16),
    TensorInfo("blk.0.attn_output.weight", (256, 256), ggml.BF16),
    TensorInfo("blk.0.indexer.proj.weight", (4, 256), ggml.BF16),
    TensorInfo("blk.0.indexer.k_norm.bias", (64,)),
    TensorInfo("blk.0.ffn_gate_inp.weight", (4, 256)),
    TensorInfo("blk.0.exp_probs_b.bias", (4,)),
    TensorInfo("blk.0.ffn_gate_exps.weight", (4, 96, 256), ggml.BF16),
    TensorInfo("blk.0.ffn_down_exps.weight", (4, 256, 96), ggml.BF16),
    TensorInfo("blk.0.ffn_gate_shexp.weight", (96, 256), ggml.BF16),
    TensorInfo("blk.0.ffn_down_shexp.weight", (256, 96), ggml.BF16),
    TensorInfo("blk.0.nextn.enorm.weight", (1, 256)),
]
KEPT = {
    "output_norm.weight": "a vector",
    "blk.0.attn_norm.weight": "a vector",
    "blk.0.attn_kv_a_norm.weight": "a vector",
    "blk.0.indexer.proj.weight": "weights of the indexer's heads",
    "blk.0.indexer.k_norm.bias": "no matrix of weights",
    "blk.0.ffn_gate_inp.weight": "a router",
    "blk.0.exp_probs_b.bias": "no matrix of weights",
    "blk.0.nextn.enorm.weight": "a vector",
}


def chosen(name, tensors=MODEL, **options):
    """Names of types by tensors, and reasons by tensors."""
    choices = recipe_for(name, **options).choose(tensors, "deepseek2", 1)
    assert list(choices) == [tensor.name for tensor in tensors]
    return (
        {tensor: ggml.NAME[choice.qtype] for tensor, choice in choices.items()},
        {tensor: choice.reason for tensor, choice in choices.items()},
    )


def rules(tmp_path, text):
    path = tmp_path / "recipe.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_rules(path)


def test_every_type_can_be_written():
    """Those of rules, of mixes, of protection, and those that they fall back to."""
    wanted = {qtype for mix in MIXES.values() for qtype in (mix.qtype, *(ggml.ID[rule.qtype] for rule in mix.rules))}
    assert wanted | set(PROTECTED.values()) <= set(TYPES.values())
    assert set(TYPES.values()) <= set(QUANTISERS)
    for qtype in TYPES.values():
        choice = recipe_for("F16", tensor_types=[f"down={ggml.NAME[qtype]}"]).choose(MODEL, "deepseek2", 1)
        assert choice["blk.0.ffn_down_exps.weight"].qtype in QUANTISERS


@pytest.mark.parametrize("name", [*MIXES, "COPY"])
def test_what_is_no_matrix_is_kept(name):
    types, reasons = chosen(name)
    assert {tensor: reasons[tensor] for tensor in KEPT} == KEPT
    assert {types[tensor] for tensor in KEPT} == {"F32", "BF16"}
    assert types["blk.0.indexer.proj.weight"] == "BF16"


def test_a_single_type():
    types, reasons = chosen("q8_0")
    assert {each for tensor, each in types.items() if tensor not in KEPT} == {"Q8_0"}
    assert reasons["blk.0.attn_q.weight"] == "mix Q8_0"


def test_copy_changes_nothing():
    types, reasons = chosen("copy")
    assert types == {tensor.name: ggml.NAME[tensor.qtype] for tensor in MODEL}
    assert reasons["output.weight"] == "copied"


def test_fall_backs_are_explained():
    types, reasons = chosen("Q4_K_S", exact_mix=True)
    assert types["blk.0.attn_k_b.weight"] == "Q5_0"
    assert reasons["blk.0.attn_k_b.weight"] == "mix Q4_K_S; 64 columns are no multiple of 256: Q5_0 for Q4_K"
    types, reasons = chosen("IQ5_K")
    assert types["blk.0.ffn_down_exps.weight"] == "Q6_0"
    assert reasons["blk.0.ffn_down_exps.weight"] == "mix IQ5_K; 96 columns are no multiple of 256: Q6_0 for IQ5_K"


def test_low_bit_mixes_protect_keys_values_and_shared_experts():
    types, reasons = chosen("IQ2_XXS")
    exact, _ = chosen("IQ2_XXS", exact_mix=True)
    changed = {tensor: (exact[tensor], types[tensor]) for tensor in types if exact[tensor] != types[tensor]}
    assert changed == {
        "blk.0.indexer.proj.weight": ("IQ2_XXS", "BF16"),
        "blk.0.attn_kv_a_mqa.weight": ("IQ2_XXS", "Q8_0"),
        "blk.0.attn_k_b.weight": ("IQ4_NL", "Q8_0"),
        "blk.0.attn_v_b.weight": ("IQ2_XXS", "Q8_0"),
        "blk.0.ffn_gate_shexp.weight": ("IQ2_XXS", "Q5_K"),
        "blk.0.ffn_down_shexp.weight": ("IQ4_NL", "Q8_0"),  # Q6_K does not fit
    }
    assert reasons["blk.0.attn_v_b.weight"] == "protected, IQ2_XXS in the mix IQ2_XXS of llama.cpp"


@pytest.mark.parametrize("name", [name for name, mix in MIXES.items() if bits(mix.qtype) >= 4 and name != "MXFP4_MOE"])
def test_mixes_from_four_bits_on_are_those_of_llama_cpp(name):
    tensors = [tensor for tensor in MODEL if "indexer" not in tensor.name]
    assert chosen(name, tensors)[0] == chosen(name, tensors, exact_mix=True)[0]


def test_heads_are_no_experts():
    """llama.cpp's MXFP4_MOE takes k_b and v_b, which are stacked as experts are, for experts."""
    types, _ = chosen("MXFP4_MOE")
    exact, _ = chosen("MXFP4_MOE", exact_mix=True)
    assert types["blk.0.ffn_gate_exps.weight"] == exact["blk.0.ffn_gate_exps.weight"] == "MXFP4"
    assert (types["blk.0.attn_v_b.weight"], exact["blk.0.attn_v_b.weight"]) == ("Q8_0", "MXFP4")
    assert types["blk.0.attn_q.weight"] == "Q8_0"


def test_pure():
    types, reasons = chosen("Q4_0", pure=True)
    assert {each for tensor, each in types.items() if tensor not in KEPT} == {"Q4_0"}
    assert reasons["output.weight"] == "pure Q4_0"


def test_order_of_what_counts(tmp_path):
    """Options for the outer matrices, rules of the command line, the file's rules, the mix."""
    path = tmp_path / "recipe.txt"
    path.write_text("exps = Q4_K\nffn_gate = Q6_K\n^token = F16\n")
    types, reasons = chosen(
        "Q3_K_S",
        tensor_types=["GATE_EXPS=iq4_xs", "gate_exps=Q8_0"],
        recipe=path,
        output_type="bf16",
        token_embedding_type="Q5_K",
    )
    assert types["output.weight"] == "BF16"
    assert (types["token_embd.weight"], reasons["token_embd.weight"]) == ("Q5_K", "asked for the embeddings")
    assert types["blk.0.ffn_gate_exps.weight"] == "IQ4_XS"
    assert reasons["blk.0.ffn_gate_exps.weight"] == "rule 'GATE_EXPS=iq4_xs'"
    assert types["blk.0.ffn_down_exps.weight"] == "Q5_0"
    assert reasons["blk.0.ffn_down_exps.weight"].startswith("recipe line 1; 96 columns")
    assert types["blk.0.ffn_gate_shexp.weight"] == "Q6_K"
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"
    assert types["blk.0.attn_q.weight"] == "Q3_K"


def test_embeddings_that_are_the_output():
    tied = [tensor for tensor in MODEL if tensor.name != "output.weight"]
    assert chosen("IQ2_XXS", tied)[0]["token_embd.weight"] == "Q5_K"
    assert chosen("IQ2_XXS")[0]["token_embd.weight"] == "Q2_K"
    assert chosen("IQ2_XXS", tied, output_type="Q8_0")[0]["token_embd.weight"] == "Q8_0"


def test_the_output_is_left():
    types, reasons = chosen("Q4_K_M", leave_output=True)
    assert (types["output.weight"], reasons["output.weight"]) == ("BF16", "the output is left as it is")


def test_rules_without_effect_are_named():
    recipe = recipe_for("Q8_0", tensor_types=["attn_q=Q6_K", "ffn_gate_inp=F16", "attn_q_b=Q4_K"])
    assert [rule.where for rule in recipe.unused(MODEL)] == ["rule 'ffn_gate_inp=F16'", "rule 'attn_q_b=Q4_K'"]


def test_free_tensors_have_no_type_of_the_user():
    recipe = recipe_for("Q8_0", tensor_types=["attn=Q6_K"], output_type="Q6_K")
    free = {tensor.name for tensor in recipe.free(MODEL)}
    matrices = {tensor.name for tensor in MODEL} - set(KEPT)
    assert free == {name for name in matrices if "attn" not in name and name != "output.weight"}


def test_types_that_need_an_importance_matrix():
    recipe, small = recipe_for("IQ2_XXS"), recipe_for("Q2_K_S")
    assert needs_importance("blk.0.attn_q.weight", ggml.IQ1_M, recipe)
    assert not needs_importance("token_embd.weight", ggml.IQ1_M, recipe)
    assert not needs_importance("blk.0.attn_q.weight", ggml.IQ3_S, recipe)
    assert not needs_importance("blk.0.attn_q.weight", ggml.Q2_K, recipe)
    assert needs_importance("blk.0.attn_q.weight", ggml.Q2_K, small)


def test_a_recipe_file(tmp_path):
    found = rules(
        tmp_path,
        "# experts\n\n  blk\\.(3|4)\\.ffn_.*_exps = iq2_xs  # the first ones\r\nattn_(?=kv_b)=Q8_0\n",
    )
    assert [(rule.pattern.pattern, ggml.NAME[rule.qtype], rule.where) for rule in found] == [
        (r"blk\.(3|4)\.ffn_.*_exps", "IQ2_XS", "recipe line 3"),
        ("attn_(?=kv_b)", "Q8_0", "recipe line 4"),
    ]
    assert found[0].pattern.search("blk.3.ffn_down_exps.weight")
    assert not found[0].pattern.search("blk.13.ffn_down.weight")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ffn_down", r"line 2: 'ffn_down' is no rule; write REGEX = TYPE, as in ffn_down_exps = Q4_K"),
        ("= Q4_K", "line 2: '= Q4_K' is no rule"),
        ("ffn_down =", "line 2: 'ffn_down =' is no rule"),
        ("ffn_down = Q4_9", "line 2: unknown type 'Q4_9'; choose F32, F16"),
        ("ffn_down = Q4_K_M", "line 2: unknown type 'Q4_K_M'; choose F32, F16"),
        ("ffn_down = Q4_0_R8", "line 2: unknown type 'Q4_0_R8'"),
        ("ffn_(down = Q4_K", r"line 2: 'ffn_\(down' is no regular expression: missing \)"),
        ("a{99999999999} = Q4_K", r"line 2: 'a\{99999999999\}' is no regular expression"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, message):
    with pytest.raises(PymlaError, match=message) as raised:
        rules(tmp_path, f"attn = Q8_0\n{line}\n")
    assert str(raised.value).startswith(str(tmp_path / "recipe.txt"))


def test_files_that_are_no_text(tmp_path):
    with pytest.raises(PymlaError, match="byte 1 is not valid UTF-8"):
        rules(tmp_path, b"a\xff = Q8_0")
    with pytest.raises(PymlaError, match="No such file"):
        read_rules(tmp_path / "missing.txt")
    with pytest.raises(PymlaError, match="directory"):
        read_rules(tmp_path)


def result_or_message(path):
    try:
        return read_rules(path)
    except PymlaError as error:
        return str(error)


@given(st.lists(st.one_of(st.binary(max_size=20), st.sampled_from([b"\n", b"=", b"Q4_K", b"(", b"[", b"*", b"#"]))))
@example([b"(" * 5000, b"=Q4_K"])
@settings(deadline=None)
def test_any_bytes_are_rules_or_an_error_of_one_line(tmp_path_factory, parts):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(b"".join(parts))
    found = result_or_message(path)
    if isinstance(found, str):
        assert len(found.splitlines()) == 1
    else:
        assert all(rule.qtype in TYPES.values() for rule in found)


@pytest.mark.parametrize(
    "options", [{"tensor_types": ["a=Q8_0"]}, {"pure": True}, {"output_type": "F16"}, {"token_embedding_type": "F16"}]
)
def test_copy_goes_with_nothing_else(options):
    with pytest.raises(PymlaError, match="COPY changes no type"):
        recipe_for("COPY", **options)


def test_wrong_arguments():
    with pytest.raises(PymlaError, match="`output_type`: unknown type 'Q4_K_M'"):
        recipe_for("Q8_0", output_type="Q4_K_M")
    with pytest.raises(PymlaError, match="`tensor_types`: 'ffn' is no rule"):
        recipe_for("Q8_0", tensor_types=["ffn"])
    with pytest.raises(PymlaError, match="architecture 'llama': types are known"):
        recipe_for("Q8_0").choose(MODEL, "llama", 1)
