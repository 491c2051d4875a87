"""The T5 v1.1 encoder: parity with transformers on random weights (optional), and what wrong files say."""

import importlib.util
import io
import sys
import types

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from mila_jax.errors import UserError
from mila_jax.model.t5 import T5, T5Config, check_tensors, find_tokenizer, infer_t5_config, open_tokenizer, t5_forward, t5_shapes
from mila_jax.model.text import make_text_encoder

CONFIG = T5Config(layers=2, width=16, heads=2, head_width=6, mlp_width=24, buckets=32, vocabulary=40)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    shapes = t5_shapes(CONFIG) | {"shared.weight": (CONFIG.vocabulary, CONFIG.width)}
    return {k: rng.standard_normal(s).astype(np.float32) * (0.3 if len(s) > 1 else 0.1) + (len(s) == 1) for k, s in shapes.items()}


@pytest.fixture
def folder(tmp_path, tensors):
    """Weights with a tokenizer of whole words beside them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "rain": 3, "turn": 4, "left": 5}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_sizes_are_read_from_the_tensors(tensors):
    assert infer_t5_config(tensors) == CONFIG


def test_tokens_and_padding(folder):
    encoder = make_text_encoder("t5-raw", 6, folder)
    tokens, mask = encoder.encode(["rain", "turn left rain turn left rain turn"])
    assert tokens.shape == (2, 6, 16) and tokens.dtype == np.float16 and mask.sum(1).tolist() == [2, 6]
    assert not tokens[0, 2:].any() and len(encoder.sha256) == 64 and encoder.name == "t5-raw"
    longer, _ = T5(folder / "model.safetensors", folder / "tokenizer.json", 12, clean=False).encode(["rain"])
    np.testing.assert_allclose(longer[0, :2], tokens[0, :2], atol=2e-3)


@pytest.mark.parametrize("name", ("model.safetensors", "pytorch_model.bin", "t5.pt", "t5.pth", ""))
def test_the_tokenizer_beside_weights_of_any_kind_is_found(tmp_path, name):
    (tmp_path / "tokenizer.json").write_text("{}")
    assert find_tokenizer(tmp_path / name) == tmp_path / "tokenizer.json"
    fsspec.filesystem("memory").pipe_file("/t5/tokenizer.json", b"{}")
    assert find_tokenizer(f"memory://t5/{name}".rstrip("/")) == "memory://t5/tokenizer.json"


def test_texts_are_cleaned_before_the_tokens(folder):
    pytest.importorskip("ftfy", reason="ftfy is not installed")
    pytest.importorskip("bs4", reason="beautifulsoup4 is not installed")
    cleaned, raw = make_text_encoder("t5", 6, folder), make_text_encoder("t5-raw", 6, folder)
    np.testing.assert_array_equal(cleaned.encode(["<b>Turn</b> LEFT #12"])[0], raw.encode(["turn left"])[0])
    assert cleaned.name == "t5" and raw.encode(["<b>Turn</b> LEFT #12"])[1].sum() > raw.encode(["turn left"])[1].sum()


def test_missing_libraries_are_told_before_weights_are_read(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    monkeypatch.setitem(sys.modules, "bs4", types.ModuleType("bs4"))
    with pytest.raises(UserError, match=r"ftfy is not installed.* pip install 'mila_jax\[t5\]'.* text.encoder=t5-raw"):
        make_text_encoder("t5", 6, folder / "nowhere")


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None, reason="transformers is not installed"
)
@pytest.mark.filterwarnings("ignore")
def test_parity_with_transformers(tensors):
    import torch
    from transformers import T5Config as TheirConfig
    from transformers import T5EncoderModel

    their = TheirConfig(
        vocab_size=40, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    model = T5EncoderModel(their).eval()
    state = {k: torch.from_numpy(v) for k, v in tensors.items()} | {"encoder.embed_tokens.weight": torch.from_numpy(tensors["shared.weight"])}
    lost = model.load_state_dict(state, strict=False)
    assert not lost.missing_keys and not lost.unexpected_keys
    ids = np.random.default_rng(1).integers(2, 40, (3, 150))
    mask = np.arange(150) < np.array([[150], [7], [60]])
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(np.int64))).last_hidden_state.numpy()
    ours = np.asarray(t5_forward(tensors, CONFIG, tensors["shared.weight"][ids], mask))
    np.testing.assert_allclose(ours[mask], theirs[mask], atol=2e-5)


TEXTS = ["rain", "turn left, cross the intersection", "Parked cars; peds crossing (2)", "", "  two   spaces\tand a tab ", "naïve café 雨"]


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """A sentencepiece model as T5's are made: unigrams, padding 0, end 1, unknown 2, no begin."""
    return sentencepiece_model(tmp_path_factory.mktemp("spiece"), pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


def sentencepiece_model(folder, **ids):
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed: pip install 'mila_jax[t5]'")
    words = ["rain", "turn left", "turn right", "cross intersection", "parked cars", "peds crossing", "wait at light", "night, construction"]
    lines = [f"{a}, {b}" for a in words for b in words]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=CONFIG.vocabulary, hard_vocab_limit=False, model_type="unigram", minloglevel=2, num_threads=1, **ids,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(out.getvalue())
    return folder / "spiece.model"


def test_a_sentencepiece_model(spiece, tmp_path, tensors):
    """Found beside the weights; every text ends with 1, also one that is cut, and what follows is padding."""
    ids = open_tokenizer(spiece)(TEXTS)
    assert all(row[-1] == 1 and row.count(1) == 1 and 0 not in row for row in ids) and ids[3] == [1]
    assert ids[4] == open_tokenizer(spiece)(["two spaces and a tab"])[0]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "spiece.model").write_bytes(spiece.read_bytes())
    encoder = make_text_encoder("t5-raw", 4, tmp_path)
    tokens, mask = encoder.encode(TEXTS)
    assert mask.sum(1).tolist() == [min(len(row), 4) for row in ids] and not tokens[~mask].any()
    cut = next(i for i, row in enumerate(ids) if len(row) > 4)
    words = tensors["shared.weight"][ids[cut][:3] + [1]][None]
    np.testing.assert_allclose(tokens[cut], np.asarray(t5_forward(tensors, CONFIG, words, np.ones((1, 4), bool)))[0], atol=3e-3)


def test_files_that_are_not_t5s_tokenizer(tmp_path):
    with pytest.raises(UserError, match="not T5's tokenizer: its padding and end are -1 and 2"):
        open_tokenizer(sentencepiece_model(tmp_path))
    (tmp_path / "spiece.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="spiece.model is not a sentencepiece model"):
        open_tokenizer(tmp_path / "spiece.model")
    with pytest.raises(UserError, match="nowhere.model does not exist; set text.tokenizer"):
        open_tokenizer(tmp_path / "nowhere.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json is not a readable tokenizer.json"):
        open_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.filterwarnings("ignore")
def test_token_ids_are_those_of_transformers(spiece):
    """As Open-Sora 1.2 calls it (opensora/models/text_encoder/t5.py): padded to the length, cut, ends added."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.T5Tokenizer.from_pretrained(str(spiece.parent), extra_ids=0)
    for length in (4, 30):
        found = theirs(TEXTS, max_length=length, padding="max_length", truncation=True, add_special_tokens=True)
        for row, ids, mask in zip(open_tokenizer(spiece)(TEXTS), found["input_ids"], found["attention_mask"]):
            row = row[: length - 1] + [1] if len(row) > length else row
            assert row + [0] * (length - len(row)) == ids and sum(mask) == len(row)


def test_wrong_weights_are_named(tensors, folder):
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    for change, message in (
        (lambda t: t.pop(name), f"{name}' is missing"),
        (lambda t: t.update({name: t[name].T}), f"{name}' has shape"),
        (lambda t: t.update({"encoder.block.1.extra": t[name]}), "unknown tensor 'encoder.block.1.extra'"),
    ):
        broken = dict(tensors)
        change(broken)
        with pytest.raises(UserError, match=message):
            check_tensors(broken, CONFIG)
    with pytest.raises(UserError, match="text.path is not set"):
        make_text_encoder("t5-raw", 8)
    with pytest.raises(UserError, match="holds no weights"):
        T5(folder / "nowhere", clean=False)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="set text.tokenizer"):
        T5(folder, clean=False)
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="broken or not safetensors"):
        T5(folder, clean=False)
