"""Tokens of the VILA family's prompts: pooled films, tiles of images, texts around them."""

import functools

import clips
import numpy as np
import pytest
from PIL import Image

from longrl_jax import convert
from longrl_jax.data import prompts
from longrl_jax.types import Example, MediaFile, MediaLayout, View

LAYOUT = MediaLayout(
    image_size=(32, 32),
    grid=(2, 2),
    media_token="<vila/video>",
    image_token="<image>",
    separator="\n",
    tile_text="\n",
)
V, I = "<vila/video>", "<image>"
ASKED = prompts.INSTRUCTIONS["direct"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    convert._write_tokenizer(folder, "", 512)
    return prompts.load_tokenizer(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A film and an image of 40 x 90 px."""
    root = tmp_path_factory.mktemp("media")
    clips.make(root / "film.mp4", num_frames=30)
    Image.new("RGB", (90, 40), "red").save(root / "still.png")
    return root


@pytest.fixture
def encode(tokenizer, root):
    def ask(layout, *files, **settings):
        kinds = {"film.mp4": "video", "still.png": "image"}
        media = tuple(MediaFile(kind=kinds[name], path=name) for name in files)
        example = Example(id="q", question="which pad ?", answer="A", media=media)
        return prompts.encode_prompt(
            example,
            tokenizer=tokenizer,
            layout=layout,
            decoder="pyav",
            template="direct",
            root=root,
            **{"num_frames": 8, "fps": 0.0} | settings,
        )

    return ask


def spelled(tokenizer, content: str) -> list[int]:
    """transformers' tokens of a chat in which everything is written as text, "#" between pieces
    that are tokenized apart."""
    turns = [{"role": "user", "content": content}]
    chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    pieces = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in chat.split("#")]
    return [token for piece in pieces for token in piece]


def pools(*sizes):
    return functools.partial(lambda sizes, num_frames: sizes, sizes)


def with_(**changes):
    return MediaLayout(**{**vars(LAYOUT), **changes})


@pytest.mark.parametrize(("num_frames", "units"), [(8, 2), (6, 2), (4, 1)])
def test_a_film_has_a_token_group_for_every_pooled_frame(encode, tokenizer, num_frames, units):
    prompt = encode(with_(video_pools=pools((4, 1, 1))), "film.mp4", num_frames=num_frames)
    want = spelled(tokenizer, (V * 4 + "\n#") * units + f"which pad ?\n{prompts.WATCH} {ASKED}")
    assert prompt.tokens.tolist() == want
    (film,) = prompt.media
    assert (film.grid, film.num_tokens) == ((units, 2, 2), 4 * units)
    assert len(film.times_s) == 4 * units  # the last frame repeats where the unit is not full
    assert prompt.is_media.sum() == 4 * units


def test_several_pool_sizes_follow_one_another(encode, tokenizer):
    layout = with_(video_pools=pools((4, 1, 1), (2, 2, 1)), ending=" end")
    prompt = encode(layout, "film.mp4")
    content = (V * 4 + "\n#") * 2 + " end#" + (V * 2 + "\n#") * 4 + " end#"
    want = spelled(tokenizer, content + f"which pad ?\n{prompts.WATCH} {ASKED}")
    assert prompt.tokens.tolist() == want
    (film,) = prompt.media
    assert film.num_tokens == prompt.is_media.sum() == 16
    # stored unit by unit: 4 of the first pool, then 2 x 2 of the second
    order = film.view.order(film.grid[0])
    np.testing.assert_array_equal(order, [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15])


def test_texts_stand_around_every_frame_and_image(encode, tokenizer):
    layout = with_(opening="red circle", separator="", image_texts=("", " end\n"))
    prompt = encode(layout, "still.png", "film.mp4", num_frames=2)
    content = I * 4 + "# end\n#" + ("red circle#" + V * 4 + "#") * 2
    want = spelled(tokenizer, content + f"which pad ?\n{prompts.WATCH} {ASKED}")
    assert prompt.tokens.tolist() == want


def tiles(height, width):
    return View(size=(32, 32), grid=(2, 2), scales=((32, 96), (32, 32)))


def test_tiles_that_stand_alone_are_images_of_their_own(encode, tokenizer):
    """NVILA-Lite's "dynamic": 1 x 3 tiles and the whole, each followed by the end token and by the
    line that ends its placeholder."""
    prompt = encode(with_(image_view=tiles), "still.png")
    want = spelled(tokenizer, (I * 4 + "\n#\n#") * 4 + f"which pad ?\n{ASKED}")
    assert prompt.tokens.tolist() == want
    assert prompt.media[0].grid == (4, 2, 2)


def test_an_image_beside_another_is_not_cut(encode, tokenizer):
    prompt = encode(with_(image_view=tiles), "still.png", "still.png")
    want = spelled(tokenizer, (I * 4 + "\n#") * 2 + f"which pad ?\n{ASKED}")
    assert prompt.tokens.tolist() == want


def test_tiles_of_several_scales_share_one_map(encode, tokenizer):
    view = View(size=(32, 32), grid=(2, 6), unit_frames=4, scales=((32, 32), (32, 96)))
    prompt = encode(with_(image_view=lambda height, width: view), "still.png")
    want = spelled(tokenizer, I * 12 + "\n#" + f"which pad ?\n{ASKED}")
    assert prompt.tokens.tolist() == want
    assert prompt.media[0].times_s == (0.0,) * 4


def test_a_vocabulary_without_placeholders_gets_them_behind_its_end(tmp_path):
    convert._write_tokenizer(tmp_path, "", 512, media=("<image>",))
    tokenizer = prompts.load_tokenizer(tmp_path)
    size = len(tokenizer)
    prompts.add_media_tokens(tokenizer, LAYOUT)
    assert tokenizer.convert_tokens_to_ids("<vila/video>") == size
    assert tokenizer("x<vila/video>y", add_special_tokens=False)["input_ids"].count(size) == 1
    assert len(tokenizer) == size + 1
