"""Several sources as one stream: proportions, order, names, roots, and one global place."""

import collections
import json
import pickle

import numpy as np
import published
import pytest

from longrl_jax import config, train
from longrl_jax.data import loader, mixing
from longrl_jax.data.fields import RecordError
from longrl_jax.data.refused import RefusedLog
from longrl_jax.types import Example, MediaFile, Prompt

SIZES = {"a": 5, "b": 30, "c": 7}
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


def mixed_config(root, names="abc", *, filter_by="", **fields):
    mix = [
        {"name": name, "file": f"{name}.jsonl", "weight": WEIGHTS[name]} | fields.get(name, {})
        for name in names
    ]
    tree = {"stage": "sft", "model": {"path": "x"}, "run": {"dir": "x"}}
    tree["data"] = {"root": str(root), "mix": mix, "num_frames": 8}
    tree["algorithm"] = {"filter_by": filter_by}
    return config.records.build(config.Config, tree)


def data_config(root, names="abc", **fields):
    return mixed_config(root, names, **fields).data


@pytest.fixture
def root(tmp_path):
    for name, size in SIZES.items():
        lines = [{"id": f"{name}{i}", "question": "what ?", "answer": "A"} for i in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def numbered(example: Example) -> Prompt:
    """Stands for encode_prompt where only the order matters."""
    one = np.zeros(1, np.int32)
    return Prompt(
        example=example, tokens=one, is_media=one.astype(bool), rope_pos=one, next_rope_pos=1
    )


def nobody(record, error, *, step):
    raise AssertionError(f"step {step}: {record} refused: {error}")


def ids(source, *, seed=3, groups=10, first_step=0, num_steps=6, part=None, workers=0):
    """Returns the ids of every step."""
    steps = loader.prompts(
        source,
        numbered,
        seed=seed,
        groups=groups,
        first_step=first_step,
        num_steps=num_steps,
        workers=workers,
        on_refused=nobody,
        part=part,
    )
    return [[prompt.example.id for prompt in step if prompt] for step in steps]


def stream(source, **how):
    return sum(ids(source, **how), [])


def test_proportions_hold_in_every_stretch(root):
    mixture = mixing.open_training(data_config(root))
    order = mixing.order(mixture, 3)
    names = [mixture[order[place]].source for place in range(200)]
    for stop in range(1, len(names) + 1):
        counts = collections.Counter(names[:stop])
        for name, weight in WEIGHTS.items():
            assert abs(counts[name] - weight * stop) < len(WEIGHTS)
    assert collections.Counter(names) == {"a": 100, "b": 60, "c": 40}


def test_every_epoch_of_a_source_is_another_order_of_all_of_it(root):
    taken = stream(mixing.open_training(data_config(root)), num_steps=21)
    for name, size in SIZES.items():
        mine = [record for record in taken if record[0] == name]
        epochs = [mine[i : i + size] for i in range(0, len(mine) - size + 1, size)]
        assert len(epochs) > 1
        for epoch in epochs:
            assert sorted(epoch) == sorted(f"{name}{i}" for i in range(size))
        assert len(set(map(tuple, epochs))) > 1


def test_a_source_keeps_its_order_when_others_come_and_go(root):
    def of(name, names):
        mixture = mixing.open_training(data_config(root, names))
        order = mixing.order(mixture, 3)
        taken = [mixture[order[place]] for place in range(60)]
        return [example.id for example in taken if example.source == name]

    for name in "ac":
        whole, alone = of(name, "abc"), of(name, name)
        assert whole == alone[: len(whole)] and len(whole) > SIZES[name]
    assert of("b", "cb") == of("b", "bc")


def test_sources_of_one_size_are_not_shuffled_alike(root):
    (root / "c.jsonl").write_text((root / "b.jsonl").read_text().replace('"b', '"c'))
    mixture = mixing.open_training(data_config(root, "bc"))
    order = [int(i) for i in mixing.order(mixture, 0)[:40]]
    orders = [[i % 30 for i in order if i in mixture.numbers(k)] for k in (0, 1)]
    assert orders[0][:10] != orders[1][:10]


@pytest.mark.parametrize("first_step", [1, 3, 5])
def test_a_run_may_enter_anywhere(root, first_step):
    source = mixing.open_training(data_config(root))
    whole = ids(source)
    assert ids(source, first_step=first_step, num_steps=6 - first_step) == whole[first_step:]
    assert sum(ids(source, groups=4, num_steps=15), []) == sum(whole, [])


@pytest.mark.parametrize("cut", [1, 5, 9])
def test_processes_read_parts_of_the_steps_of_one(root, cut):
    source = mixing.open_training(data_config(root))
    parts = [ids(source, part=range(*ends)) for ends in ((0, cut), (cut, 10))]
    assert [a + b for a, b in zip(*parts, strict=True)] == ids(source)


def test_the_order_is_of_the_seed(root):
    source = mixing.open_training(data_config(root))
    assert ids(source, seed=1) == ids(source, seed=1) != ids(source, seed=2)
    assert [[r[0] for r in step] for step in ids(source, seed=1)] == [
        [r[0] for r in step] for step in ids(source, seed=2)
    ]


def test_a_single_source_has_the_order_it_always_had(root):
    """The first records of seed 0 among ten, as they were before there were mixes."""
    data = config.DataConfig(root=str(root), train="b.jsonl")
    assert not isinstance(mixing.open_training(data), mixing.Mixture)
    want = [int(i) for i in loader.grain.MapDataset.range(30).seed(4).shuffle().repeat()[:70]]
    assert [int(i) for i in mixing.order(mixing.open_training(data), 4)[:70]] == want


@pytest.fixture
def published_root(tmp_path):
    """Folders of three published forms under one root."""
    files = {}
    for name in ("star", "image_qa", "text_math"):
        (tmp_path / "sets" / name).mkdir(parents=True)
        files[name] = published.WRITE[name](tmp_path / "sets" / name)
    return tmp_path, files


def published_config(published_root, **more):
    root, files = published_root
    mix = [
        {"name": name, "source": name, "file": file, "root": f"sets/{name}"} | more.get(name, {})
        for name, file in files.items()
    ]
    return config.records.build(
        config.DataConfig, {"root": str(root), "mix": mix, "template": "direct"}
    )


def test_every_source_has_its_own_root_and_its_media_are_named_from_data_root(published_root):
    root, _ = published_root
    mixture = mixing.open_training(published_config(published_root))
    examples = [mixture[i] for i in range(len(mixture))]
    assert [e.source for e in examples] == ["star"] * 2 + ["image_qa"] * 2 + ["text_math"] * 2
    assert examples[0].media[0].path == "sets/star/Charades_v1_480/6H78U.mp4"
    for example in examples:
        assert all((root / file.path).is_file() for file in example.media)
    assert [mixture.where(i) for i in (0, 2)] == [
        "sets/star/STAR_val.json[0]",
        "sets/image_qa/train.parquet[0]",
    ]
    sent = pickle.dumps(mixture)
    assert len(sent) < 8000 and [pickle.loads(sent)[i] for i in range(6)] == examples


def test_every_source_may_have_its_own_template(published_root):
    data = published_config(published_root, text_math={"template": "boxed"})
    mixture = mixing.open_training(data)
    asked = {e.source: mixing.template_of(data, e) for e in (mixture[i] for i in range(6))}
    assert asked == {"star": "direct", "image_qa": "direct", "text_math": "boxed"}
    validation = Example(id="a", question="q", answer="A")
    assert mixing.template_of(data, validation) == "direct"


def test_subtitles_follow_the_root_of_their_source(root):
    (root / "in").mkdir()
    line = {"id": 1, "question": "q ?", "answer": "A", "video": "v.mp4", "subtitles": "v.srt"}
    (root / "in/a.jsonl").write_text(json.dumps(line))
    example = mixing.open_training(data_config(root, "a", a={"root": "in"}))[0]
    assert example.media == (MediaFile(kind="video", path="in/v.mp4"),)
    assert example.subtitles == "in/v.srt"


def test_refused_records_are_named_and_counted_by_source(root, tmp_path):
    (root / "b.jsonl").write_text('{"id": 1}\n{"id": 2, "question": "q ?", "answer": "bad"}')
    mixture = mixing.open_training(data_config(root, "ab"))
    with pytest.raises(RecordError, match=r"b.jsonl:1: no question") as caught:
        mixture[5]
    sent = pickle.loads(pickle.dumps(caught.value))
    assert (sent.source, sent.where) == ("b", "b.jsonl:1")
    for _ in range(2):  # opened again, as a run that goes on does
        with RefusedLog(tmp_path / "refused.jsonl") as log:
            log.add(sent.where, sent, step=1)
            log.add(mixture[6], ValueError("no"), step=1)
            log.add(mixture[0], ValueError("no"), step=2)
    assert log.by_source == {"a": 2, "b": 4}
    rows = [json.loads(x) for x in (tmp_path / "refused.jsonl").read_text().splitlines()]
    assert [row["source"] for row in rows] == ["b", "b", "a"] * 2
    assert all(set(row) == {*rows[0]} for row in rows)


def test_what_a_mix_is_made_of_is_said(root):
    said = mixing.shares(mixing.open_training(data_config(root)))
    assert said == "data.mix: a 50.0% (5 records), b 30.0% (30 records), c 20.0% (7 records)"
    data = config.DataConfig(root=str(root), train="a.jsonl")
    assert mixing.shares(mixing.open_training(data)) == ""


BAD = [
    ({"a": {"weight": 0}}, "data.mix: weight of a=0.0 must be positive"),
    ({"a": {"weight": -1.0}}, "data.mix: weight of a=-1.0 must be positive"),
    ({"a": {"weight": "much"}}, r"data.mix\[0\].weight wants a number, got 'much'"),
    ({"b": {"wieght": 1.0}}, r"unknown config key data.mix\[1\].wieght; did you mean"),
    ({"a": {"name": "b"}}, r"data.mix names \['b', 'b', 'c'\]: every name must be another"),
    ({"a": {"name": "a/b"}}, "name='a/b' must be letters"),
    ({"a": {"template": "bold"}}, "data.mix: template of a='bold' is unknown"),
    ({"a": {"file": " "}}, "data.mix: file of a=' ' is empty"),
    ({"b": {"rewards": {"video_qa": "much"}}}, r"data.mix\[1\].rewards.video_qa wants a number"),
    ({"b": {"rewards": {"video_qa": 0}}}, r"data.mix\[1\].rewards=\{.*every weight is 0"),
    ({"c": {"rewards": {"judge": 1}}}, r"data.mix\[2\].rewards.judge needs a model that judges"),
    ({"c": {"rewards": {"overlong": 1}}}, r"data.mix\[2\].rewards.overlong needs rollout.overlong"),
]


@pytest.mark.parametrize("fields, said", BAD)
def test_a_bad_entry_is_refused_by_name(tmp_path, fields, said):
    with pytest.raises(ValueError, match=said):
        data_config(tmp_path, **fields)


@pytest.mark.parametrize("name, said", [("exact", "='exact' is unknown"), ("no:f", "'no:f'")])
def test_a_reward_that_only_an_entry_names_is_looked_up_too(root, name, said):
    key = r"data.mix\[1\].rewards" if said[0] == "=" else "rewards: the module of "
    with pytest.raises(ValueError, match=key + said):
        train.check_names(mixed_config(root, b={"rewards": {name: 1.0}}))


def test_groups_are_filtered_by_what_every_source_has(root):
    numbers = {"rewards": {"numeric": 1.0, "video_qa": 0.5}}
    mixed_config(root, filter_by="total", a=numbers)
    mixed_config(root, filter_by="video_qa/accuracy", a=numbers)
    mixed_config(root, "a", filter_by="numeric/accuracy", a=numbers)  # nothing has `rewards`
    said = (
        "filter_by='numeric/accuracy' is of no reward of the source b of data.mix; name total, or "
        "a part <reward>/<part> of one of video_qa, and of every source"
    )
    with pytest.raises(ValueError, match=said):
        mixed_config(root, filter_by="numeric/accuracy", a=numbers)


BAD_AT_OPENING = [
    ({"a": {"source": "x"}}, "data.mix: source of a='x' is unknown; choose one of activitynet_qa"),
    ({"a": {"root": ".."}}, "data.mix: root='..' of a lies outside data.root"),
    ({"a": {"file": "../a.jsonl"}}, "lies outside data.root"),
    ({"a": {"file": "gone.jsonl"}}, "there is no data file"),
]


@pytest.mark.parametrize("fields, said", BAD_AT_OPENING)
def test_an_entry_that_leads_nowhere_ends_the_run(root, fields, said):
    (root.parent / "a.jsonl").write_text((root / "a.jsonl").read_text())
    with pytest.raises(ValueError, match=said):
        mixing.open_training(data_config(root, **fields))


def test_the_files_of_a_mix_are_those_of_its_records(root):
    for name in ("data/train-00000-of-00002", "data/train-00001-of-00002", "data/film"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).with_suffix(".mp4" if "film" in name else ".parquet").write_bytes(b"x")
    (root / "test_q.json").write_text("[]")
    (root / "test_a.json").write_text("[]")
    shards = [root / f"data/train-0000{i}-of-00002.parquet" for i in (0, 1)]
    for file, want in (
        ("data/train-*.parquet", shards),
        (".", shards),  # no film that lies beside them
        ("a.jsonl", [root / "a.jsonl"]),
        ("test_q.json", [root / "test_q.json", root / "test_a.json"]),
    ):
        data = config.DataConfig(root=str(root), train=file)
        assert [p.resolve() for p in mixing.training_files(data)] == [p.resolve() for p in want]


def test_train_and_mix_cannot_both_say_what_is_trained_on():
    mix = (config.MixConfig(name="a", file="a.jsonl"),)
    with pytest.raises(ValueError, match="data.train='b.jsonl' and data.mix both say"):
        config.DataConfig(root="data", train="b.jsonl", mix=mix)


def test_a_config_with_a_mix_survives_yaml(tmp_path):
    text = """
stage: grpo
model: {path: x}
run: {dir: r}
data:
  root: data
  num_frames: 8
  mix:
    - {name: films, file: train.jsonl, weight: 2}
    - {name: math, source: text_math, file: math12k, root: m, template: boxed,
       rewards: {numeric: 1}}
"""
    (tmp_path / "a.yaml").write_text(text)
    cfg = config.load(tmp_path / "a.yaml")
    assert cfg.data.mix[1] == config.MixConfig(
        name="math",
        source="text_math",
        file="math12k",
        root="m",
        template="boxed",
        rewards={"numeric": 1.0},
    )
    assert cfg.rewards_of("math") == {"numeric": 1.0}
    assert cfg.rewards_of("films") == cfg.rewards_of("") == cfg.rewards == {"video_qa": 1.0}
    (tmp_path / "b.yaml").write_text(config.to_yaml(cfg))
    assert config.load(tmp_path / "b.yaml") == cfg
    assert "data.mix[].weight: float = 1.0" in config.describe()
