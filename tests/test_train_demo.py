import sysconfig
from pathlib import Path

import numpy as np
import pytest
import train_demo as script

TEXTS = [
    "def first(a, b):\n    if a == 10:\n        return a + b\n    return None\n" * 20,
    "class Second:\n    def __init__(self):\n        self.value = 1.5\n" * 20,
]


@pytest.fixture(scope="module")
def tokenizer():
    return script.train_tokenizer(TEXTS, 400)


def test_files_are_split_the_same_way_each_time():
    root = Path(sysconfig.get_path("stdlib"))
    paths = script.source_files(root)
    names = {path.relative_to(root).as_posix() for path in paths}
    assert "argparse.py" in names
    assert not any(name.startswith(("test/", "site-packages/", "encodings/")) for name in names)
    training, held_out = script.split_heldout(paths, root)
    assert not set(training) & set(held_out)
    assert 0.02 < len(held_out) / len(paths) < 0.1
    assert root / "calendar.py" in held_out


def test_files_that_are_not_utf8_or_empty_are_left_out(tmp_path):
    for name, content in (("a.py", b"x\r\ny\n"), ("b.py", b"\xff\xfe\x00"), ("c.py", b" \n")):
        (tmp_path / name).write_bytes(content)
    assert script.read_texts(sorted(tmp_path.iterdir())) == ["x\ny\n"]


def test_tokenizer_keeps_the_text_and_indentation_together(tokenizer):
    text = TEXTS[0] + "naïve 数字 ١٢\t🚀\r\n  \n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("        return").tokens == [script.BOS, "ĠĠĠĠĠĠĠ", "Ġreturn"]
    assert (tokenizer.token_to_id(script.BOS), tokenizer.token_to_id(script.EOS)) == (0, 1)


def test_windows(tokenizer):
    data = script.Windows(TEXTS, tokenizer)
    assert tokenizer.decode(data.ids.tolist()) == "".join(TEXTS)
    assert list(data.ids).count(1) == 2
    windows = data.sample(np.random.default_rng(0), 50, 32)
    assert windows.shape == (50, 33)
    assert (windows[:, 0] == 0).all()
    lines = set("".join(TEXTS).splitlines())
    assert all(tokenizer.decode(window[1:].tolist()).split("\n")[0] in lines for window in windows)
    fixed = data.fixed(32, 5)
    assert fixed.shape == (5, 33)
    np.testing.assert_array_equal(fixed[0, 1:], data.ids[:32])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_split_spaces_keeps_the_text(tokenizer, share):
    ids = tokenizer.encode(TEXTS[0], add_special_tokens=False).ids
    found = script.split_spaces(ids, tokenizer, share, np.random.default_rng(0))
    assert tokenizer.decode(found) == TEXTS[0]
    assert (found == ids) == (share == 0)
    if share == 1:
        tokens = [tokenizer.id_to_token(token_id) for token_id in found]
        assert not any(token.startswith("Ġ") and token.strip("Ġ") for token in tokens)
        assert tokens[:2] == ["def", "Ġ"]


def test_orthogonalise_gives_singular_values_near_one():
    torch = pytest.importorskip("torch")
    x = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    for matrices in (x, x.mT):
        values = torch.linalg.svdvals(script.orthogonalise(matrices))
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_rate_and_window_length():
    assert script.rate(0.0) == 0
    assert script.rate(0.01) == pytest.approx(1, abs=1e-3)
    assert script.rate(1.0) == pytest.approx(0, abs=1e-9)
    assert [script.window_length(done, 1024) for done in (0, 0.7, 0.9)] == [256, 512, 1024]


def test_model_is_one_that_quantises_whole():
    pytest.importorskip("transformers", minversion="5.0")
    model = script.build_model(2560, 1024)
    assert 3e6 < sum(p.numel() for p in model.parameters()) < 6e6
    assert all(p.shape[-1] % 32 == 0 for p in model.parameters())
