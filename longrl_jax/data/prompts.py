"""From an Example to a Prompt: chat template, tokens, and where images and videos stand.

Media come before the question unless the record says otherwise, so questions on one video share a
long prefix. Every image and every unit of frames that share their tokens is grid h * w media tokens
and, for VILA, one separator (NVlabs/VILA encoders/image/basic.py, encoders/video/basic.py).
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longrl_jax.config import pick
from longrl_jax.data import subtitles, video, wording
from longrl_jax.data.wording import PLAIN, Words
from longrl_jax.types import Example, Media, MediaLayout, Prompt, View

INSTRUCTIONS = {
    "think": (
        "First say step by step what happens and when, inside <think></think>. Then give the "
        "answer alone, inside <answer></answer>."
    ),
    "direct": "Give the answer alone, inside <answer></answer>.",
    "boxed": (
        "First say step by step how you find the answer, inside <think></think>. Then give the "
        r"answer alone, inside \boxed{}."
    ),
}
"""Template -> what is asked for after the question."""
OF_IMAGES = {
    "think": (
        "First say step by step what you see and what follows from it, inside <think></think>. "
        "Then give the answer alone, inside <answer></answer>."
    ),
}
"""The same about images alone, where it differs: nothing happens in them."""
WATCH = "Watch the video to its end."
"""Stands before the instruction where there is a video."""
MEDIA_TOKENS = ("<image>", "<vila/video>", "<vila/sentinel>", "<|image_pad|>", "<|video_pad|>")
"""Placeholders of media in the vocabularies that we know; a policy never says them."""


def load_tokenizer(folder: str | Path) -> Any:
    """Opens the tokenizer of a local folder; runs no code from it and asks no network."""
    from transformers import AutoTokenizer  # here: it takes seconds, and few callers need it

    if not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder} to read a tokenizer from")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # damaged files raise nearly anything, tokenizers' Rust a bare one
        why = " ".join(str(error).split())
        raise ValueError(
            f"{folder} holds no tokenizer that transformers knows ({type(error).__name__}: {why}); "
            "fetch its files again"
        ) from None
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {folder} has no chat template; put one beside it")
    return tokenizer


def user_text(example: Example, template: str, words: Words = PLAIN, said: str = "") -> str:
    """Returns the words of the user: subtitles (said), question and instruction."""
    return _user_text(example, template, words, said)[0]


def _user_text(example: Example, template: str, words: Words, said: str = "") -> tuple[str, int]:
    """Returns the words of the user, and where the question begins in them."""
    instruction = pick(INSTRUCTIONS, template, "data.template")
    kinds = {file.kind for file in example.media}
    if kinds == {"image"}:
        instruction = OF_IMAGES.get(template, instruction)
    return wording.render(
        words,
        question=example.question,
        subtitles=said,
        instruction=f"{f'{WATCH} ' if 'video' in kinds else ''}{instruction}",
        thinking=template != "direct",
    )


def target_text(example: Example, template: str) -> str:
    """Returns the reference answer of SFT in the form that the instruction asks for."""
    pick(INSTRUCTIONS, template, "data.template")
    answer = f"<answer>{example.answer}</answer>"
    if template == "boxed":
        answer = rf"\boxed{{{example.answer}}}"
    if template == "direct":
        return answer
    if not example.reasoning:
        raise ValueError(
            f"record {example.id!r} has no reasoning to learn from; add the field, or set "
            "data.template=direct"
        )
    return f"<think>{example.reasoning}</think>{answer}"


def answer_tokens(text: str, tokenizer: Any) -> np.ndarray:
    """Returns the tokens of an answer, int32, the end-of-turn token last."""
    _refuse_special(text, tokenizer, "the answer")
    return np.array([*_tokens(text, tokenizer), end_of_turn_id(tokenizer)], np.int32)


def decode_text(tokens: np.ndarray, tokenizer: Any) -> str:
    """Returns the text of an answer without the token that ended it.

    Special tokens elsewhere are shown: an answer that holds one does not have the right form.
    """
    ids = [int(token) for token in tokens]
    if ids and ids[-1] in stop_token_ids(tokenizer):
        ids.pop()
    return tokenizer.decode(ids, skip_special_tokens=False)


def media_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """Returns the ids of the media placeholders of this vocabulary, in order."""
    vocabulary = tokenizer.get_vocab()
    return tuple(sorted(vocabulary[token] for token in MEDIA_TOKENS if token in vocabulary))


def add_media_tokens(tokenizer: Any, layout: MediaLayout) -> None:
    """Gives a vocabulary the placeholders that it lacks, behind its end: VILA-1.5's folders do not
    hold them, and its code adds them, too. They are never looked up in a table."""
    missing = {layout.media_token, layout.image_token} - {"", *tokenizer.get_vocab()}
    tokenizer.add_tokens(sorted(missing), special_tokens=True)


def stop_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """Returns the tokens that end an answer: end of turn, end of text and padding, in order."""
    ids = {end_of_turn_id(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id}
    return tuple(sorted(token for token in ids if token is not None))


def end_of_turn_id(tokenizer: Any) -> int:
    """Returns the token that the chat template puts after what the assistant said."""
    mark = "MARK"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    following = _tokens(rendered.rpartition(mark)[2], tokenizer)
    if not following or following[0] not in _special_ids(tokenizer):
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} does not end an answer with a "
            "special token, so nothing would stop the policy; mend the template"
        )
    return following[0]


def encode_prompt(
    example: Example,
    *,
    tokenizer: Any,
    layout: MediaLayout | None,
    num_frames: int,
    fps: float,
    decoder: str,
    template: str,
    root: Path,
    timestamp: str = "",
    words: Words = PLAIN,
) -> Prompt:
    """Lays out the tokens of a question; of its media only sizes and lengths are read.

    layout: what the backbone makes of media; None: a text-only model. num_frames, fps, decoder,
    template, root, timestamp and words are those of DataConfig; paths were checked when the record
    was read. Raises ValueError (for a bad file video.VideoError or subtitles.SubtitleError) that
    says why a record cannot be asked.
    """
    _refuse_special(example.question, tokenizer, f"the question of record {example.id!r}")
    if not example.media:
        asked = user_text(example, template, words)
        tokens = np.array(_tokens(_chat(asked, tokenizer), tokenizer), np.int32)
        return _prompt(example, tokens, layout)
    if layout is None:
        raise ValueError(
            f"record {example.id!r} asks about {example.about!r}, but the model takes text only"
        )
    num_images = sum(file.kind == "image" for file in example.media)
    media: list[Media] = []
    for file in example.media:
        path = root.absolute() / file.path
        if file.kind == "image":
            media.append(_image(path, layout, num_images))
        else:
            media.append(
                _video(path, layout, file.span_s, num_frames=num_frames, fps=fps, decoder=decoder)
            )
    above, inside = _subtitles(example, media, words.subtitles, root, tokenizer)
    asked, begin = _user_text(example, template, words, above)
    texts = _between_media(example, asked, begin, layout, tokenizer)
    pieces, is_media = [texts[0]], [np.zeros(len(texts[0]), bool)]
    for i, (medium, following) in enumerate(zip(media, texts[1:], strict=True)):
        lines = inside if medium.kind == "video" else []
        tokens, of_media = _media_tokens(medium, layout, tokenizer, timestamp, lines)
        inside = [] if medium.kind == "video" else inside
        offset = sum(map(len, pieces)) + int(of_media.argmax())
        media[i] = dataclasses.replace(medium, offset=offset)
        pieces += [tokens, following]
        is_media += [of_media, np.zeros(len(following), bool)]
    tokens = np.concatenate(pieces).astype(np.int32)
    return _prompt(example, tokens, layout, is_media=np.concatenate(is_media), media=tuple(media))


def _subtitles(
    example: Example, media: Sequence[Media], way: str, root: Path, tokenizer: Any
) -> tuple[str, list[tuple[int, str]]]:
    """Returns the subtitles of the first video as text above the question, and those between its
    frames, with the number of frames before each."""
    films = [medium for medium in media if medium.kind == "video"]
    if not way or not films:
        return "", []
    lines = subtitles.of_example(example, root)
    for line in lines:
        _refuse_special(line.text, tokenizer, f"the file {example.subtitles}")
    if way == "between":
        return "", subtitles.between(lines, films[0].times_s)
    return "\n".join(subtitles.shown(lines, films[0].times_s)), []


def _prompt(
    example: Example,
    tokens: np.ndarray,
    layout: MediaLayout | None,
    *,
    is_media: np.ndarray | None = None,
    media: tuple[Media, ...] = (),
) -> Prompt:
    P = len(tokens)
    rope_pos, next_rope_pos = np.arange(P, dtype=np.int32), P
    if layout is not None and layout.positions is not None:
        rope_pos, next_rope_pos = layout.positions(P, media)
    return Prompt(
        example=example,
        tokens=tokens,
        is_media=np.zeros(P, bool) if is_media is None else is_media,
        rope_pos=rope_pos,
        next_rope_pos=next_rope_pos,
        media=media,
    )


def _chat(asked: str, tokenizer: Any) -> str:
    """Returns the conversation up to where the assistant begins to speak."""
    turns = [{"role": "user", "content": asked}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _between_media(
    example: Example, asked: str, begin: int, layout: MediaLayout, tokenizer: Any
) -> list[np.ndarray]:
    """Returns the tokens before, between and after the media of a question that stands in `asked`
    from `begin` on. Media before all its words stand before all words of the user."""
    (before, after), content, used = layout.around, "", 0
    for file in example.media:
        assert used <= file.at <= len(example.question), f"{file} stands nowhere in the question"
        at = begin + file.at if file.at else 0
        if asked[begin : begin + file.at] != example.question[: file.at]:
            raise ValueError(
                f"record {example.id!r} has {file.path!r} among its options, which the template "
                "tells apart from the question; let it say {{ question }} alone"
            )
        content += asked[used:at] + before + _placeholder(file.kind, layout) + after
        used = at
    placeholders = {_placeholder(file.kind, layout) for file in example.media}
    either = "|".join(re.escape(token) for token in sorted(placeholders))
    texts = re.split(either, _chat(content + asked[used:], tokenizer))
    if len(texts) != len(example.media) + 1:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} says {' or '.join(placeholders)} "
            f"{len(texts) - 1} times for {len(example.media)}; mend the template"
        )
    parts = [np.array(_tokens(text, tokenizer), np.int32) for text in texts]
    assert parts[-1].size, "the instruction follows all media, so a prompt never ends in media"
    return parts


def _placeholder(kind: str, layout: MediaLayout) -> str:
    return (kind == "image" and layout.image_token) or layout.media_token


def _media_tokens(
    medium: Media,
    layout: MediaLayout,
    tokenizer: Any,
    timestamp: str,
    lines: Sequence[tuple[int, str]] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Returns for every unit: its time where timestamp is set, opening, media tokens, separator;
    and which of them are media tokens. lines: (frames before it, subtitle), which stands behind the
    unit of the last of these frames; of several pools among those of the first."""
    view, (num_units, _, _) = medium.view, medium.grid
    media_token = _one_token(_placeholder(medium.kind, layout), tokenizer)
    opening, closing = _unit_texts(medium, layout, tokenizer)
    ending = [] if medium.kind == "image" else _tokens(layout.ending, tokenizer)
    if timestamp:
        _refuse_special(timestamp, tokenizer, f"data.timestamp={timestamp!r}")
    pieces: list[int] = []
    for pool, (times, count) in enumerate(view.unit_tokens):
        frame = [*opening, *[media_token] * count, *closing]
        stride = view.unit_frames // times
        left = [] if pool else list(lines)
        if not timestamp and not left or medium.kind == "image":
            pieces += frame * (times * num_units)
        else:
            pieces += _lines_after(left, 0, tokenizer)
            for i, t in enumerate(medium.times_s[::stride]):
                stamp = timestamp.format(t=t - medium.times_s[0])
                frames = range(i * stride + 1, (i + 1) * stride + 1)
                pieces += [*_tokens(stamp, tokenizer), *frame]
                pieces += [x for n in frames for x in _lines_after(left, n, tokenizer)]
        pieces += ending
    tokens = np.array(pieces, np.int32)
    return tokens, tokens == media_token


def _lines_after(lines: Sequence[tuple[int, str]], number: int, tokenizer: Any) -> list[int]:
    """Returns the tokens of the subtitles that stand behind so many frames, a line each."""
    said = [text for before, text in lines if before == number]
    return _tokens("".join(f"{text}\n" for text in said), tokenizer) if said else []


def _unit_texts(medium: Media, layout: MediaLayout, tokenizer: Any) -> tuple[list[int], list[int]]:
    texts = (layout.opening, layout.separator)
    if medium.kind == "image" and layout.image_texts is not None:
        texts = layout.image_texts
    opening, closing = (_tokens(text, tokenizer) for text in texts)
    if medium.view.scales and medium.view.unit_frames == 1:
        closing += _tokens(layout.tile_text, tokenizer)
    return opening, closing


def _video(
    path: Path,
    layout: MediaLayout,
    span_s: tuple[float, float] | None,
    *,
    num_frames: int,
    fps: float,
    decoder: str,
) -> Media:
    said = video.probe(path, decoder=decoder)
    start_s, end_s = span_s or (0.0, said.duration_s)
    offsets_s = video.frame_times(end_s - start_s, num_frames=num_frames, fps=fps)
    view = layout.video(said.height, said.width, len(offsets_s))
    unit_s = view.unit_frames * offsets_s[1] if len(offsets_s) > 1 else 1.0
    times_s = tuple(start_s + offset_s for offset_s in offsets_s)
    times_s += times_s[-1:] * (-len(times_s) % view.unit_frames)
    return _medium(
        "video",
        path,
        view,
        times_s=times_s,
        decoder=video.decoder_version(decoder),
        unit_s=unit_s,
        stored=(said.height, said.width) if layout.pixels else None,
    )


def _image(path: Path, layout: MediaLayout, num_images: int) -> Media:
    height, width = video.probe_image(path)
    view = layout.image(height, width, num_images)
    return _medium(
        "image",
        path,
        view,
        times_s=(0.0,) * view.inputs,
        decoder=video.decoder_version("image"),
        unit_s=1.0,
        stored=(height, width) if view.scales or layout.pixels else None,
    )


def _medium(
    kind: str,
    path: Path,
    view: View,
    *,
    times_s: tuple[float, ...],
    decoder: str,
    unit_s: float,
    stored: tuple[int, int] | None,
) -> Media:
    sampling = {
        "content": content_digest(path),
        "times_s": times_s,
        "view": dataclasses.asdict(view),
        "decoder": decoder,
    }
    grid = (len(times_s) // view.unit_frames, *view.grid)
    return Media(
        kind=kind,
        path=str(path),
        key=hashlib.sha256(json.dumps(sampling).encode()).hexdigest(),
        grid=grid,
        view=view,
        times_s=times_s,
        num_tokens=math.prod(grid),
        offset=0,  # until its tokens are laid out
        unit_s=unit_s,
        stored=stored,
    )


def content_digest(path: Path) -> str:
    """Returns the SHA-256 of a file, which is read once for as long as it stays as it is."""
    try:
        stat = path.stat()
        return _digest_of_file(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)
    except OSError as error:
        raise ValueError(f"{path} could be probed, but not read: {error}") from error


@functools.cache  # an hour of video is gigabytes, and many questions share one
def _digest_of_file(path: str, size_bytes: int, mtime_ns: int, inode: int) -> str:
    """Digest of the bytes; the other arguments tell a changed file from the one seen before."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokens(text: str, tokenizer: Any) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _one_token(text: str, tokenizer: Any) -> int:
    tokens = _tokens(text, tokenizer)
    if len(tokens) != 1:
        raise ValueError(
            f"{text!r} must be one token of {tokenizer.name_or_path!r}, it is {len(tokens)}; does "
            "the tokenizer belong to this checkpoint?"
        )
    return tokens[0]


def _special_ids(tokenizer: Any) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return set(tokenizer.all_special_ids) | {token for token, kind in added if kind.special}


def _refuse_special(text: str, tokenizer: Any, what: str) -> None:
    """Words of a data set must not end a turn, begin one or stand for media."""
    special = _special_ids(tokenizer)
    for token in _tokens(text, tokenizer):
        if token in special:
            name = tokenizer.convert_ids_to_tokens(token)
            raise ValueError(f"{what} contains the special token {name}; take it out")
