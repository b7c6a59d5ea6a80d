"""Which part of a model goes to the GPU: V2-Lite, V3 and small models on cards of different sizes."""

import dataclasses
from types import SimpleNamespace

import pytest
from make_model import PRESETS, make_model, model_tensors
from model_mixes import uniform
from test_costs import V2_LITE, v2_lite_tensors

from pymla import ggml
from pymla.engine.cache_layout import cache_bytes
from pymla.engine.memory_plan import derived_bytes, device_scratch_bytes, tensor_bytes
from pymla.engine.planning import LEAST_CTX, RESERVE, Planner, Wish, choose
from pymla.engine.split import Split
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile, TensorInfo
from pymla.models.config import ModelConfig

GIB = 1 << 30
#: More memory than anything here takes.
PLENTY = 1 << 50
ALL = V2_LITE.num_hidden_layers + 1


def file_of(tensors):
    return SimpleNamespace(tensors=tensors, nbytes=sum(ggml.tensor_bytes(t.qtype, t.shape) for t in tensors.values()))


def v2_lite(cache_type="q8_0", mla="auto", layout="kv_b"):
    return Planner(V2_LITE, file_of(v2_lite_tensors(layout=layout)), cache_type, mla)


@pytest.fixture(scope="module")
def v3():
    """671 billion weights of 4 bits, without their bytes."""
    shape = PRESETS["v3"]
    common = {field.name for field in dataclasses.fields(ModelConfig)} & set(shape.__dataclass_fields__)
    config = dataclasses.replace(V2_LITE, **{name: getattr(shape, name) for name in common})
    tensors = model_tensors(shape, "split", uniform(ggml.Q4_0, ggml.Q6_K), 0)
    return Planner(
        config, file_of({t.name: TensorInfo(t.name, t.qtype, t.shape, None, None) for t in tensors}), "q8_0", "auto"
    )


def chosen(planner, device, host=PLENTY, **wish):
    """What is chosen; it must fit."""
    found = choose(planner, Wish(**wish), device, host)
    assert found.device.total <= device
    assert found.host.allocated <= host
    return found


def refused(planner, device, host=PLENTY, **wish):
    with pytest.raises(PymlaError) as caught:
        choose(planner, Wish(**wish), device, host)
    return str(caught.value)


# What is chosen -------------------------------------------------------------------------------------------------------


def test_everything_where_it_fits():
    found = chosen(v2_lite(), 80 * GIB)
    assert found.split == Split(ALL, False)
    assert found.ctx == V2_LITE.context_length
    assert found.split.whole(V2_LITE)
    assert found.split.describe(V2_LITE) == "all 27 layers"


def test_the_context_shrinks_before_parts_stay_with_the_cpu():
    found = chosen(v2_lite(), 12 * GIB)
    assert found.split == Split(ALL, False)
    assert LEAST_CTX < found.ctx < V2_LITE.context_length
    assert found.ctx % 64 == 0
    assert v2_lite().device(found.split, found.ctx + 64).total > 12 * GIB


def test_then_the_routed_experts_stay():
    found = chosen(v2_lite(), 8 * GIB)
    assert found.split == Split(ALL, True)
    assert found.split.describe(V2_LITE) == "all 27 layers, routed experts on the CPU"
    assert found.split.options(V2_LITE) == "`cpu_moe`"
    assert found.device.weights < GIB
    assert not found.split.whole(V2_LITE)


def test_then_layers_stay():
    planner = v2_lite()
    few = planner.device(Split(9, True), LEAST_CTX).total
    found = chosen(planner, few)
    assert found.split == Split(9, True)
    assert found.ctx >= LEAST_CTX
    assert found.split.describe(V2_LITE) == "the last 9 of 27 layers, routed experts on the CPU"
    # The context is what was asked for, and layers leave room for it.
    longer = chosen(planner, few, ctx=LEAST_CTX + 64)
    assert longer.split.gpu_layers < 9
    assert longer.ctx == LEAST_CTX + 64


def test_without_experts_layers_stay(tmp_path):
    shape = dataclasses.replace(PRESETS["tiny"], first_k_dense_replace=4)
    file = ModelFile.open(make_model(tmp_path / "dense.gguf", shape, qtype="q8_0"))
    planner = Planner(ModelConfig.from_gguf(file), file, "q8_0", "auto")
    assert chosen(planner, planner.device(Split(3), 1024).total).split == Split(3, False)


@pytest.mark.parametrize("split", [Split(0), Split(2), Split(4), Split(5), Split(5, True)])
def test_a_nextn_block_is_where_the_last_layer_is(tmp_path, split):
    shape = dataclasses.replace(PRESETS["tiny"], num_nextn_predict_layers=1)
    file = ModelFile.open(make_model(tmp_path / "nextn.gguf", shape, layout="split", qtype="q8_0"))
    config, layers = ModelConfig.from_gguf(file), shape.num_hidden_layers
    without, planner = (Planner(config, file, "q8_0", "auto", nextn=nextn) for nextn in (False, True))
    sizes = {name: each.data.nbytes for name, each in file.tensors.items() if name.startswith(f"blk.{layers}.")}
    assert without.not_run == sizes.keys()
    assert planner.not_run == set()
    experts = sum(size for name, size in sizes.items() if "_exps" in name)
    k_b = sizes[f"blk.{layers}.attn_k_b.weight"]  # transposed at load
    derived, cache = derived_bytes(config, file.tensors, [layers]), cache_bytes(config, "q8_0", "auto", 64, [layers])

    def more(of):
        """Bytes of weights, derived weights and cache that the block adds to a plan."""
        plans = of(planner)(split, 64), of(without)(split, 64)
        return [getattr(plans[0], part) - getattr(plans[1], part) for part in ("weights", "derived", "cache")]

    on_device, on_host = more(lambda each: each.device), more(lambda each: each.host)
    everything = sum(sizes.values())
    if not split.gpu_layers:
        assert (on_device, on_host) == ([0, 0, 0], [everything, derived, cache])
    else:
        there = everything - k_b - (experts if split.cpu_moe else 0)
        assert (on_device, on_host) == ([there, derived, cache], [everything - there, 0, 0])


def test_v3_on_a_card(v3):
    """Attention and shared experts fit a card of 24 GB, everything only 400 GB."""
    found = chosen(v3, 24 * 10**9)
    assert found.split == Split(62, True)
    assert found.device.weights == pytest.approx(17.2e9 * 18 / 32, rel=0.1)
    assert found.host.weights == pytest.approx(654e9 * 18 / 32, rel=0.01)
    # k_b is transposed at load, as Q8_0.
    assert found.device.derived == 61 * 128 * 512 * 128 * 34 // 32
    assert found.ctx > 16384
    assert chosen(v3, 400 * GIB).split == Split(62, False)
    assert chosen(v3, 8 * GIB).split.cpu_moe
    assert 10 < chosen(v3, 8 * GIB).split.gpu_layers < 61


@pytest.mark.parametrize("layers", [1, 20, 27, 28, 99])
def test_layers_that_were_asked_for(layers):
    found = chosen(v2_lite(), 80 * GIB, gpu_layers=layers)
    assert found.split == Split(min(layers, ALL), False)
    assert found.split.first(V2_LITE) == max(0, 27 - layers)
    assert found.split.output(V2_LITE) == (layers > 27)


def test_experts_that_shall_stay():
    assert chosen(v2_lite(), 80 * GIB, cpu_moe=True).split == Split(ALL, True)
    assert chosen(v2_lite(), 80 * GIB, cpu_moe=True, gpu_layers=5).split == Split(5, True)
    planner = v2_lite()
    assert chosen(planner, planner.device(Split(20, True), LEAST_CTX).total, cpu_moe=True).split == Split(20, True)


def test_memory_of_the_host_bounds_the_context():
    planner = v2_lite()
    host = planner.host(Split(5), 8192).allocated
    found = chosen(planner, 80 * GIB, host, gpu_layers=5)
    assert 8192 <= found.ctx < 8192 + 64
    assert "not enough memory beside the GPU's for 16384 tokens" in refused(
        planner, 80 * GIB, host, gpu_layers=5, ctx=16384
    )


@pytest.mark.parametrize(
    ("split", "embedding", "layers", "experts", "output"),
    [
        (Split(5), "g", "gggg", "gggg", "g"),
        (Split(5, True), "c", "gggg", "gccc", "g"),
        (Split(4), "c", "gggg", "gggg", "c"),
        (Split(2), "c", "ccgg", "ccgg", "c"),
        (Split(2, True), "c", "ccgg", "cccc", "c"),
        (Split(0), "c", "cccc", "cccc", "c"),
    ],
)
def test_placement(split, embedding, layers, experts, output):
    config = dataclasses.replace(V2_LITE, num_hidden_layers=4)
    found = split.placement(config, "c", "g")
    assert found == (embedding, tuple(layers), tuple(experts), output)


# What is refused ------------------------------------------------------------------------------------------------------


def test_refused_with_the_plan_and_what_fits():
    planner = v2_lite()
    message = refused(planner, 6 * GIB, gpu_layers=28, ctx=8192)
    plan = planner.device(Split(ALL), 8192)
    for part in (
        "all 27 layers",
        "8192 tokens",
        f"weights {plan.weights / GIB:.2f} GiB",
        "cache",
        "scratch",
        "reserve",
    ):
        assert part in message
    assert "6.00 GiB are free" in message
    layers = int(message.split("`gpu_layers` ")[1].split(",")[0])
    assert chosen(planner, 6 * GIB, gpu_layers=layers, ctx=8192)
    assert planner.device(Split(layers + 1), 8192).total > 6 * GIB
    assert "or `cpu_moe`" in message
    assert chosen(planner, 6 * GIB, cpu_moe=True, ctx=8192).split == Split(ALL, True)
    assert "`ctx`" not in message


def test_a_context_that_fits_is_named():
    message = refused(v2_lite(), 12 * GIB, gpu_layers=28, ctx=163840)
    ctx = int(message.rsplit("`ctx` ", 1)[1])
    assert chosen(v2_lite(), 12 * GIB, gpu_layers=28, ctx=ctx)
    refused(v2_lite(), 12 * GIB, gpu_layers=28, ctx=ctx + 64)


def test_a_card_that_holds_nothing():
    message = refused(v2_lite(), GIB // 4)
    assert "does not hold the last of 27 layers, routed experts on the CPU" in message
    assert message.endswith("Choose `device` cpu")


@pytest.mark.parametrize("layers", [0, -1])
def test_layers_below_one(layers):
    with pytest.raises(PymlaError, match=f"`gpu_layers` is {layers}; .*`device` cpu"):
        Wish(gpu_layers=layers)


# The bytes ------------------------------------------------------------------------------------------------------------


def test_a_model_on_the_host_alone():
    plan = v2_lite("f16").host(Split(0), 4096)
    assert plan.weights == file_of(v2_lite_tensors()).nbytes == pytest.approx(8.9e9, rel=0.01)
    assert plan.derived == 0
    assert plan.cache == 4096 * 27 * 1152
    assert plan.allocated == plan.derived + plan.cache + plan.scratch + plan.process
    assert plan.total == plan.allocated + plan.weights
    assert plan.allocated - plan.cache < 600 << 20
    assert v2_lite().host(Split(0), 163840).cache == 163840 * 27 * 672


@pytest.mark.parametrize("layout", ["kv_b", "split", "all"])
@pytest.mark.parametrize("cpu_moe", [False, True])
def test_device_and_host_make_up_the_model(layout, cpu_moe):
    planner, ctx = v2_lite(layout=layout), 4096
    cache = cache_bytes(V2_LITE, "q8_0", "auto", ctx)
    nbytes = file_of(v2_lite_tensors(layout=layout)).nbytes
    before = -1
    for layers in range(ALL + 1):
        split = Split(layers, cpu_moe)
        device, host = planner.device(split, ctx), planner.host(split, ctx)
        assert device.cache + host.cache == cache
        assert device.weights + host.weights == nbytes
        assert device.derived + host.derived == derived_bytes(V2_LITE, v2_lite_tensors(layout=layout))
        assert device.total > before
        before = device.total
    assert device.process == RESERVE
    # What a GPU that has everything leaves to the CPU: the layouts of kv_b that are not used, or the experts.
    unused = {"kv_b": 0, "split": 27 * 16 * 512 * 128 * 18 // 32, "all": 27 * 16 * 512 * 256 * 18 // 32}[layout]
    experts = sum(tensor_bytes(t) for name, t in v2_lite_tensors().items() if name.endswith("_exps.weight"))
    embedding = tensor_bytes(v2_lite_tensors()["token_embd.weight"])
    assert host.weights == unused + (experts + embedding if cpu_moe else 0)


def test_interleaved_weights_are_copied():
    """Everywhere but in the embedding and the output matrix: into the host's memory, or one by one on their way to the
    GPU's. Q8_K_R8 is loaded as Q8_0, which is larger."""
    plain, mixed = (
        {
            t.name: TensorInfo(t.name, t.qtype, t.shape, None, None)
            for t in model_tensors(shape, "kv_b", uniform(qtype, ggml.Q6_K), 0)
        }
        for shape in [dataclasses.replace(PRESETS["v2-lite"], moe_intermediate_size=1536, intermediate_size=10752)]
        for qtype in (ggml.Q8_0, ggml.Q8_K_R8)
    )
    config = dataclasses.replace(V2_LITE, moe_intermediate_size=1536, intermediate_size=10752)
    expected, planner = (Planner(config, file_of(tensors), "q8_0", "auto") for tensors in (plain, mixed))
    names = {name for name, tensor in mixed.items() if tensor.qtype == ggml.Q8_K_R8}
    copies = sum(tensor_bytes(mixed[name]) for name in names)
    assert planner.interleaved == names
    assert copies == sum(tensor_bytes(plain[name]) for name in names)

    host = planner.host(Split(0), 4096)
    assert host.plain == copies
    assert host.weights == expected.host(Split(0), 4096).weights - copies
    assert host.allocated == expected.host(Split(0), 4096).allocated + copies
    assert "plain copies of interleaved weights" in host.describe_allocated()
    assert "interleaved" not in expected.host(Split(0), 4096).describe_allocated()
    assert set(planner.read(Split(0))) == mixed.keys() - names
    assert expected.read(Split(0)) is None

    for split in (Split(ALL), Split(5, True)):
        assert planner.device(split, 4096) == expected.device(split, 4096)
        there = names.intersection(planner.uploaded(split))
        largest = max(tensor_bytes(mixed[name]) for name in there)
        assert planner.host(split, 4096).plain == largest + sum(tensor_bytes(mixed[name]) for name in names - there)
        assert set(planner.read(split)) == mixed.keys() - names - set(planner.uploaded(split))


def test_a_tied_embedding_counts_once():
    tensors = v2_lite_tensors()
    output = tensor_bytes(tensors.pop("output.weight"))
    tied = Planner(V2_LITE, file_of(tensors), "q8_0", "auto")
    both = v2_lite().device(Split(ALL), 4096).weights
    assert tied.device(Split(ALL), 4096).weights == both - output


def test_scratch_on_the_device():
    """It grows with the context, since a prompt may be as long, and holds what a layer's expansion takes."""
    scratch = [device_scratch_bytes(V2_LITE, "auto", ctx) for ctx in (64, 4096, 65536, 163840)]
    assert scratch == sorted(scratch)
    per_token = 4 * (2048 + 16 * 128 + 512 + 128)
    assert scratch[-1] - scratch[-2] > (163840 - 65536) * per_token
    assert device_scratch_bytes(V2_LITE, "1", 65536) < scratch[2]
    assert device_scratch_bytes(V2_LITE, "0", 65536) < scratch[2]
    assert device_scratch_bytes(V2_LITE, "2", 65536) - scratch[2] == 16 * 65536 * 4 * 9 // 8
