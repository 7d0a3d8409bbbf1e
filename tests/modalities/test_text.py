"""Texts: tokens, codes, a likelihood over sequences, and attention to what is given."""

import itertools
import pickle

import numpy as np
import pytest
import torch

from mmdiff_ray import config as configuration
from mmdiff_ray.batch import Batch
from mmdiff_ray.config import ConfigError
from mmdiff_ray.diffusion.process import GENERATED, GIVEN
from mmdiff_ray.evaluation.gallery import parse_given, write_gallery
from mmdiff_ray.modalities.base import RowContext
from mmdiff_ray.modalities.text import TextModality, TextOptions, token_hits
from mmdiff_ray.models.cost import forward_flops
from mmdiff_ray.models.denoiser import build_denoiser
from mmdiff_ray.sampling.generator import Generator
from mmdiff_ray.training.trainer import Trainer
from tests.modalities import tiny
from tests.sprites import MODEL

CAPTIONS = ["a red square", "a blue disc"]
WORDS = ["a", "red", "square"]


def text(size: tuple[int, int] = tiny.SIZE, **options) -> TextModality:
    return TextModality("caption", TextOptions(type="text", **{"length": 16, **options}), size)


def every_sequence(modality: TextModality) -> torch.Tensor:
    tokens = range(modality.prediction_channels)
    return torch.tensor(list(itertools.product(tokens, repeat=modality.options.length)))


@pytest.mark.parametrize("size", [(1, 2), (2, 3), (3, 5)])  # a position has part of a cell, a cell, or more
def test_likelihood_sums_to_one_over_sequences_and_expected_code_is_the_mean_of_their_codes(size):
    modality = text(size, tokens="words", words=["red"], length=3)
    sequences = every_sequence(modality)
    logits = torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(0)).expand(27, 3, 3)
    share = (-modality.negative_log_likelihood(logits, sequences)).exp()
    assert float(share.sum()) == pytest.approx(1, abs=1e-5)
    codes = modality.encode(sequences)
    assert codes.shape == (27, modality.code_channels, *size) and torch.equal(
        codes.abs(), torch.ones_like(codes)
    )
    mean = torch.einsum("b,bchw->chw", share, codes)
    torch.testing.assert_close(modality.expected_code(logits)[0], mean, atol=1e-5, rtol=0)
    assert torch.equal(modality.from_code(codes), sequences)


@pytest.mark.parametrize(("length", "side"), [(8, 8), (32, 8), (32, 16)])
def test_a_token_at_its_usual_scale_is_as_hard_to_read_from_noise_at_any_length_and_size(length, side):
    modality = text((side, side), tokens="words", words=["red", "blue"], length=length)
    rng = torch.Generator().manual_seed(3)
    data = torch.randint(0, 4, (500, length), generator=rng)
    codes = modality.encode(data)
    noisy = codes * modality.weights.scale + torch.randn(codes.shape, generator=rng)
    read = float((modality.from_code(noisy) == data).float().mean())
    bit = float(torch.special.ndtr(torch.tensor(0.5).sqrt()))  # a token has two, with half of its power each
    assert read == pytest.approx(bit**2, abs=0.03)


def test_bytes_keep_any_text_that_fits_and_cut_the_rest():
    modality = text(length=8)
    for words in ("größe\n", "a\0b", "日本", "12345678"):
        assert modality.stored(torch.from_numpy(modality.parse(words))) == words
    assert modality.stored(torch.from_numpy(modality.parse("123456789"))) == "12345678"
    assert modality.stored(torch.from_numpy(modality.parse("1234567é"))) == "1234567\ufffd"


def test_words_are_the_data_sets_or_the_configs_and_unknown_ones_are_named():
    options = TextModality.resolve(
        "caption", TextOptions(type="text", length=4), {"caption": {"kind": "text", "words": WORDS}}
    )
    modality = TextModality("caption", options, tiny.SIZE)
    assert options.tokens == "words" and modality.texts(torch.tensor([[1, 2, 3, 0]])) == ["a red square"]
    assert modality.parse("a red square").tolist() == [1, 2, 3, 0]
    read = modality.read({"caption": "a green square"}, RowContext(tiny.SIZE, 0, 0, 0), {})
    assert modality.texts(torch.from_numpy(read)[None]) == ["a \ufffd square"]
    with pytest.raises(ConfigError, match=r"caption: no word 'rad'; did you mean 'red'\?"):
        modality.parse("a rad square")


def test_a_tokenizers_file_is_kept_in_the_options(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=40, special_tokens=["?", "${"])
    made.train_from_iterator(CAPTIONS, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    given = TextOptions(type="text", length=12, tokens=str(tmp_path / "tokenizer.json"))
    column = {"caption": {"kind": "text"}}
    options = TextModality.resolve("caption", given, column)
    (tmp_path / "tokenizer.json").unlink()
    config = config_of(tokens=options.tokens)
    (tmp_path / "saved.yaml").write_text(configuration.to_yaml(config))
    assert configuration.load_saved(tmp_path / "saved.yaml").modalities["caption"].tokens == options.tokens
    assert TextModality.resolve("caption", options, column) == options
    modality = TextModality("caption", options, tiny.SIZE)
    modality = pickle.loads(pickle.dumps(modality))
    assert modality.prediction_channels == made.get_vocab_size() + 1
    for words in CAPTIONS:
        data = torch.from_numpy(modality.parse(words))
        assert modality.stored(data) == words and 0 < int((data != 0).sum()) < len(words)
    with pytest.raises(ConfigError, match=r"modalities\.caption\.tokens: 'letters' is not bytes, words or a"):
        TextModality.resolve(
            "caption", TextOptions(type="text", tokens="letters"), {"caption": {"kind": "text"}}
        )


def test_of_several_captions_each_visit_draws_one():
    modality, row = text(), {"caption": ["one", None, "two", "three"]}
    seen = [modality.read(row, RowContext(tiny.SIZE, 0, visit, 7), {}) for visit in range(40)]
    again = modality.read(row, RowContext(tiny.SIZE, 0, 0, 7), {})
    assert set(modality.texts(torch.from_numpy(np.stack(seen)))) == {"one", "two", "three"}
    assert np.array_equal(seen[0], again)
    for empty in ([], [None], None):
        assert modality.read({"caption": empty}, RowContext(tiny.SIZE, 0, 0, 7), {}) is None


def test_token_accuracy_counts_no_padding():
    answer, data = torch.tensor([[1, 2, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]), torch.tensor([[1, 3, 3, 0]] * 3)
    right, count = token_hits(answer, data)
    assert right.tolist() == [2, 1, 1] and count.tolist() == [4, 4, 4]
    short = torch.tensor([[1, 0, 0, 0]])
    assert [int(part) for part in token_hits(short, short)] == [2, 2]


def test_an_answer_ends_at_its_first_end():
    logits = torch.nn.functional.one_hot(torch.tensor([[3, 0, 5, 0]]), 257).movedim(-1, 1) * 9.0
    assert text(length=4).answer(logits).tolist() == [[3, 0, 0, 0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, r"caption: length \(0\) must be at least 1"),
        ({"code_channels": 1}, r"caption\.code_channels \(1\) cannot hold 16 tokens of 9 bits .*at least 2"),
        ({"tokens": "letters"}, r"caption\.tokens: got 'letters', want bytes, words or the path"),
        ({"tokens": "words"}, r"caption\.words: want different words without spaces, got None"),
        ({"tokens": "words", "words": ["a b"]}, r"caption\.words: want different words without spaces"),
        ({"tokens": "words", "words": list(map(str, range(9000)))}, r"9,002 tokens; at most 8,192"),
    ],
)
def test_options_that_cannot_be_are_refused_with_their_key(options, message):
    with pytest.raises(ConfigError, match=message):
        text(**options)


def config_of(model=MODEL, path: str = "u_plus_code", **caption) -> configuration.Config:
    """Return a configuration of pictures and captions, each from the other.

    Under `u_plus_code` a given text's code is taken out of z_t: it is heard by attention alone.
    """
    return configuration.from_plain(
        {
            "name": "captions",
            "space": {"height": 8, "width": 8},
            "modalities": {
                "pixels": {"type": "image"},
                "caption": {"type": "text", "length": 16, "context_channels": 16, **caption},
            },
            "tasks": {
                "read": {"roles": {"pixels": "given", "caption": "generated"}},
                "draw": {"roles": {"pixels": "generated", "caption": "given"}},
            },
            "model": model,
            "given": {"input": path},
            "train": {
                "samples": 10**6, "global_batch": 16, "learning_rate": 5e-3, "warmup_samples": 64,
                "ema_samples": 64,
            },
        }
    )  # fmt: skip


def two_rows(caption: TextModality, visit: int = 0) -> Batch:
    """Return a red square and a blue disc with their captions, 8 times each."""
    pixels = np.zeros((2, 3, 8, 8), np.uint8)
    y, x = np.mgrid[:8, :8]
    pixels[0, 0, 1:6, 1:6] = 255
    pixels[1, 2, (y - 4) ** 2 + (x - 4) ** 2 < 9] = 255
    captions, which = np.stack([caption.parse(words) for words in CAPTIONS]), torch.arange(16) % 2
    return Batch(
        ids=torch.arange(16),
        visits=torch.full((16,), visit),
        real=torch.ones(16, dtype=torch.bool),
        data={"pixels": torch.from_numpy(pixels)[which], "caption": torch.from_numpy(captions)[which]},
        present=dict.fromkeys(("pixels", "caption"), torch.ones(16, dtype=torch.bool)),
    )


DIT = {"preset": "nano", "options": {"width": 32, "depth": 2}}


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["unet", "dit", "dit_tokens"])
def test_two_captions_are_learned_from_their_images_and_the_images_from_their_captions(backbone, tmp_path):
    config = config_of(MODEL if backbone == "unet" else {"backbone": backbone, **DIT})
    denoiser = build_denoiser(config)
    caption = denoiser.modalities["caption"]
    denoiser.modalities["pixels"].calibrate(two_rows(caption).data["pixels"])
    trainer = Trainer(config, denoiser, torch.device("cpu"))
    for visit in range(160):
        trainer.step(two_rows(caption, visit))
    model, pixels = Generator(config, trainer.ema.model), two_rows(caption).data["pixels"][:2].numpy()
    for likely in (False, True):
        read = model.sample({"pixels": list(pixels)}, 2, steps=10, likely=likely)
        assert read["caption"] == CAPTIONS
        drawn = np.stack(model.sample({"caption": CAPTIONS}, 2, steps=10, likely=likely)["pixels"])
        distance = np.abs(drawn[:, None].astype(float) - pixels[None]).mean((2, 3, 4))  # (drawn, true)
        assert distance.argmin(1).tolist() == [0, 1] and distance.min(1).max() < 25
    write_gallery(model, {"pixels": pixels[0]}, 1, tmp_path / "read")
    assert (tmp_path / "read" / "0000_caption.txt").read_text() == "a red square\n"
    gallery = write_gallery(model, parse_given(model, ["text=a blue disc"]), 2, tmp_path / "drawn")
    assert (tmp_path / "drawn" / "given_caption.txt").read_text() == "a blue disc\n"
    assert gallery.files == 3 and gallery.grid.is_file()


@pytest.mark.parametrize("path", ["z_only", "z_plus_code", "u_plus_code", "in_place"])
@pytest.mark.parametrize("backbone", ["unet", "dit", "dit_tokens"])
def test_a_text_is_heard_where_it_is_given_and_nowhere_else(backbone, path):
    config = config_of(MODEL if backbone == "unet" else {"backbone": backbone, **DIT}, path)
    denoiser = build_denoiser(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in denoiser.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    batch = two_rows(denoiser.modalities["caption"])
    z_t = torch.randn(16, denoiser.process.channels, 8, 8, generator=generator)
    t, other = torch.full((16,), 0.5, dtype=torch.float64), batch.data["caption"].roll(1, 0)

    def predicted(caption: torch.Tensor | None, role: int) -> torch.Tensor:
        roles = {"pixels": torch.full((16,), GENERATED), "caption": torch.full((16,), role)}
        given = {} if caption is None else {"caption": caption}
        conditions = denoiser.conditions(given)
        return denoiser(z_t, t, roles, denoiser.encode(given), conditions).codes["pixels"]

    given, swapped = predicted(batch.data["caption"], GIVEN), predicted(other, GIVEN)
    assert torch.allclose(given, swapped, atol=1e-3) == (path == "z_only")  # there it is heard through z_t
    torch.testing.assert_close(predicted(batch.data["caption"], GENERATED), predicted(other, GENERATED))
    torch.testing.assert_close(predicted(None, GENERATED), predicted(other, GENERATED))


def test_a_text_without_context_leaves_the_backbone_as_it_is():
    without = build_denoiser(config_of(context_channels=0))
    assert not any("read" in name for name, _ in without.backbone.named_parameters())
    assert forward_flops(without) < forward_flops(build_denoiser(config_of()))


def test_texts_with_tokens_of_different_widths_are_refused():
    plain = {**tiny.EVERY["modalities"], "other": {"type": "text", "context_channels": 4}}
    with pytest.raises(ConfigError, match=r"context_channels: .*got caption 8, other 4"):
        build_denoiser(tiny.config(plain={**tiny.EVERY, "modalities": plain}))


@pytest.mark.slow
def test_the_loss_with_a_text_compiles_as_one_graph():
    config = config_of()
    denoiser = build_denoiser(config)
    trainer, batch = Trainer(config, denoiser, torch.device("cpu")), two_rows(denoiser.modalities["caption"])
    _, roles = trainer.tasks.draw(batch, 0)
    want = trainer.loss(batch, roles)
    found = torch.compile(trainer.loss, backend="eager", fullgraph=True)(batch, roles)  # raises at a break
    assert all(torch.equal(found[key], want[key]) for key in want) and found.keys() == want.keys()
