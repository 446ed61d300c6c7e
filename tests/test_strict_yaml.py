"""YAML: what two versions of the language read differently is refused; the rest keeps its value."""

import pytest

from longrl_jax import config, strict_yaml

SMALL = "stage: grpo\nmodel: {path: m}\ndata: {root: d}\nrun:\n  dir: runs/x\n"
GUESSES = {  # written -> (read as, which two ways out)
    "010": ("8 (base 8)", "write 10 or 8 for the number, '010' for the text"),
    "-0_17": ("-15 (base 8)", "write -17 or -15 for the number"),
    "08": ("a text", "write 8 for the number, '08' for the text"),
    "0o17": ("a text", "write 15 for the number, '0o17' for the text"),
    "0b11": ("3", "write 3 for the number, '0b11' for the text"),
    "1_000": ("1000", "write 1000 for the number, '1_000' for the text"),
    "1_0.5": ("10.5", "write 10.5 for the number, '1_0.5' for the text"),
    "1:30": ("90 (base 60)", "write 90 for the number, '1:30' for the text"),
    "1:30.5": ("90.5 (base 60)", "write 90.5 for the number, '1:30.5' for the text"),
    "2024-01-02": ("a date", "write '2024-01-02' for the text"),
    "yes": ("true", "write true, or 'yes' for the text"),
    "No": ("false", "write false, or 'No' for the text"),
    "on": ("true", "write true, or 'on' for the text"),
    "OFF": ("false", "write false, or 'OFF' for the text"),
}
PLAIN = {  # the same in both versions, or a number that looks like one
    "1e-3": 0.001,
    "1e3": 1000.0,
    "-.5E2": -50.0,
    "1.5e+3": 1500.0,
    "0": 0,
    "-10": -10,
    "+5": 5,
    "0x1F": 31,
    "0.5": 0.5,
    "7.": 7.0,
    ".inf": float("inf"),
    "true": True,
    "FALSE": False,
    "~": None,
    "y": "y",
    "1:60": "1:60",
    "v1.0": "v1.0",
    "a/010": "a/010",
    "'yes'": "yes",
    '"010"': "010",
    "!!str 1:30": "1:30",
    "|\n  08": "08",
}


@pytest.mark.parametrize("word", GUESSES)
def test_a_guess_is_refused_with_its_place_and_both_ways_out(word):
    read_as, ways = GUESSES[word]
    text = f"run:\n  keep: 1\n  dir: {word}\n"
    with pytest.raises(ValueError) as caught:
        strict_yaml.parse(text, "a.yaml")
    said = str(caught.value)
    assert said.startswith(f"a.yaml, line 3: run.dir={word} would be read as {read_as}; write ")
    assert ways in said and "\n" not in said
    for other in (f"[1, {word}]", f"{{a: {word}}}", f"{{{word}: 1}}", f"[{{a: &x {word}, b: *x}}]"):
        with pytest.raises(ValueError, match="would be read as"):
            strict_yaml.parse(f"key: {other}", "a.yaml")
    for quoted in (f"'{word}'", f'"{word}"'):  # as the message says
        assert strict_yaml.parse(f"key: {quoted}", "a.yaml") == {"key": word}


def test_a_key_that_is_a_guess_is_named():
    with pytest.raises(ValueError, match=r"^a, line 1: the key rewards.no would be read as false"):
        strict_yaml.parse("rewards: {no: 1.0}", "a")


@pytest.mark.parametrize("word", PLAIN)
def test_what_is_no_guess_keeps_its_value_and_type(word):
    (got,) = strict_yaml.parse(f"key: {word}", "a").values()
    assert got == PLAIN[word] and type(got) is type(PLAIN[word])


def test_every_text_and_number_is_read_back_as_it_was():
    tree = dict.fromkeys((*GUESSES, *PLAIN), 1) | {
        "texts": [*GUESSES, *PLAIN, "", " ", "1e3\n", "=", "<<", "null", "nan", "#", "é: 漢"],
        "numbers": [1e-3, 1e300, 1e16, 5e-324, 0.1, 1000, -8, True, None],
    }
    assert strict_yaml.parse(strict_yaml.dump(tree), "dumped") == tree


def test_the_command_line_has_the_same_rule(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    for override, said in {
        "mesh.seq=010": r"override 'mesh.seq=010', line 1: mesh.seq=010 would be read as 8 ",
        "run.export=no": r"run.export=no would be read as false; write false, or 'no'",
        "mesh={seq: 0_7}": r"mesh\.seq=0_7 would be read as 7 \(base 8\); write 7 for",
        "run={dir: x, export: off}": r": run\.export=off would be read as false",
        "optimizer.learning_rate=1:30": r"optimizer\.learning_rate=1:30 would be read as 90 ",
        "optimizer.learning_rate='1e-3'": r"learning_rate wants a number, got '1e-3'",
        "run.num_steps=1e3": r"run\.num_steps wants int, got 1000\.0",
        "run.dir=1e3": r"run\.dir wants str, got 1000\.0",
    }.items():
        with pytest.raises(ValueError, match=said):
            config.load(path, [override])
    cfg = config.load(path, ["optimizer.learning_rate=2e-3", "run.dir='1e3'", "data.train='010'"])
    assert (cfg.optimizer.learning_rate, cfg.run.dir, cfg.data.train) == (0.002, "1e3", "010")
    path.write_text(config.to_yaml(cfg))
    assert config.load(path) == cfg


def test_a_config_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(f"{SMALL}  keep: 02\n")
    with pytest.raises(ValueError, match=rf"^{path}, line 6: run.keep=02 would be read as 2 "):
        config.load(path)
