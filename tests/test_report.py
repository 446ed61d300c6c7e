import json
import math
import re
from html.parser import HTMLParser

import clips
import numpy as np
import pytest
import yaml

from longrl_jax import report
from longrl_jax.data import image
from longrl_jax.report import __main__ as command
from longrl_jax.report import folders, svg

EVIL = '<script>alert("x")</script><img src=http://evil.example/a.png onerror=alert(1)>'
KINDS = ("goal", "temporal")
NUM_SAMPLES = 4
MAX_PAGE_BYTES = 2 * 2**20


class Page(HTMLParser):
    """Every tag, attribute and text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.addresses, self.handlers, self.headings, self.scripts = [], [], [], [], 0
        self._heading = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.scripts += tag == "script"
        self._heading = tag == "h2"
        for name, value in attrs:
            if name in ("src", "href", "action", "data", "poster", "srcset"):
                self.addresses.append(value)
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data):
        if self._heading:
            self.headings.append(data)
            self._heading = False


def write_run(folder, data_root, *, num_steps=24, seed=0, evil="", **settings):
    """Writes a folder as a GRPO run leaves it, with numbers out of a hat."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    config = {
        "stage": "grpo",
        "seed": seed,
        "model": {"path": "nowhere/export"},
        "data": {
            "root": str(data_root),
            "train": "train.jsonl",
            "validation": "train.jsonl",
            "source": "longvideo_reason",
            "num_frames": 16,
            "fps": 0.0,
            "decoder": "pyav",
        },
        "run": {"num_steps": num_steps},
        "batch": {"groups": 2},
        "rollout": {"num_samples": NUM_SAMPLES},
    } | settings
    (folder / "resolved.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    lines(folder / "metrics.jsonl", [step_row(rng, s, num_steps) for s in range(1, num_steps + 1)])
    evaluated = range(0, num_steps + 1, 8)
    lines(folder / "evaluations.jsonl", [evaluation_row(s, num_steps) for s in evaluated])
    rollouts = [row for s in range(1, num_steps + 1) for row in rollout_rows(rng, s, evil)]
    lines(folder / "rollouts.jsonl", rollouts)
    refused = {"step": 3, "id": "r" + evil, "video": "a.mp4", "type": "VideoError"}
    refused |= {"kind": "missing", "message": f"a.mp4{evil} does not exist"}
    lines(folder / "refused.jsonl", [refused, refused | {"step": 0}])
    write_scores(folder / "evaluate" / "sft", "nowhere/export", right=1)
    write_scores(folder / "evaluate" / "grpo", f"export{evil}", right=3)
    (folder / "checkpoints" / "16").mkdir(parents=True)
    (folder / "checkpoints" / "16" / "state").write_bytes(bytes(3000))
    return folder


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def step_row(rng, step, num_steps):
    accuracy = 0.3 + 0.4 * step / num_steps + 0.08 * rng.normal()
    return {
        "step": step,
        "loss": 0.02 * rng.normal() + 0.02,
        "grad_norm": math.inf if step == 2 else 0.3 + 0.1 * rng.random(),
        "kl": None if step == 1 else 0.02 * step / num_steps,
        "entropy": math.nan if step == 2 else 0.6 - 0.2 * step / num_steps,
        "gap/max": 10 ** rng.uniform(-6, -4),
        "reward/total": 0.5 + accuracy / 2,
        "reward/video_qa/accuracy": accuracy,
        "reward/video_qa/format": min(1.0, 0.9 + 0.1 * step / num_steps),
        "reward/mixed": 0.8,
        "answer/tokens": 62 + rng.normal(),
        "odd_number": rng.random(),
        "time/rollout_s": 1.3 + 0.1 * rng.random(),
        "time/update_s": 14.0 if step == 1 else 4.0 + rng.random(),
        "time/other_s": 0.2,
        "time/step_s": 6.0 + rng.random(),
    }


def evaluation_row(step, num_steps):
    row = {"step": step, "questions": 80.0}
    for place, name in enumerate(("video_qa/accuracy", *(f"video_qa/accuracy/{k}" for k in KINDS))):
        mean = 0.35 + 0.3 * step / num_steps + 0.02 * place
        row |= {name: mean, f"{name}/low": mean - 0.1, f"{name}/high": mean + 0.1}
    return row | {"video_qa/format": 1.0, "total": 0.7}


def write_scores(folder, checkpoint, *, right):
    """Writes what `evaluate` leaves; greedy answers right on `right` of 4 questions of a kind."""
    folder.mkdir(parents=True)
    means = {"greedy": right / 4, "sampled": 0.61, "no_video": 0.29, "other_video": 0.28}
    modes = {}
    for mode, mean in means.items():
        score = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 80}
        modes[mode] = {
            kind: {"video_qa/accuracy": score, "total": score} for kind in ("all", *KINDS)
        }
    letter = {"letter": "B", "mean": 0.27, "low": 0.2, "high": 0.3, "n": 80}
    letters = dict.fromkeys(("all", *KINDS), letter)
    tree = {"checkpoint": checkpoint, "step": 8, "questions": 80, "refused": 0, "modes": modes}
    tree |= {"baselines": {"one_letter": letters, "chance": {"all": {"mean": 0.25, "n": 80}}}}
    (folder / "scores.json").write_text(json.dumps(tree | {"skipped": {}, "settings": {}}))
    answers = [
        {"id": f"{kind}{i}", "kind": kind, "video": f"{kind}{i}.mp4", "mode": mode, "sample": 0}
        | {"reward": {"total": float(i < right), "video_qa/accuracy": float(i < right)}}
        for mode in ("greedy", "sampled")
        for kind in KINDS
        for i in range(4)
    ]
    (folder / "answers").mkdir()
    for mode in ("greedy", "sampled"):
        lines(folder / "answers" / f"{mode}.jsonl", [a for a in answers if a["mode"] == mode])


def rollout_rows(rng, step, evil):
    for place, kind in enumerate(KINDS):
        for sample in range(NUM_SAMPLES):
            right = float(sample % 2)
            yield {
                "step": step,
                "id": f"q{place}",
                "kind": kind + evil,
                "answer": "A" + evil,
                "text": f"<think>step {step}{evil}</think><answer>{'BA'[sample % 2]}</answer>",
                "reward": {"total": right, "video_qa/accuracy": right},
                "advantage": 2 * right - 1,
                "finish_reason": "stop",
            }


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """Question q0 is about a real video and a picture, q1 about a video that is gone."""
    root = tmp_path_factory.mktemp("data")
    clips.make(root / "v0.mp4", num_frames=40, fps=10, size=(64, 96))
    questions = [
        {"id": f"q{i}", "question": f"what {EVIL} is {i} ?", "answer": "A", "video": f"v{i}.mp4"}
        for i in range(2)
    ]
    image.write_png(root / "still.png", np.full((300, 200, 3), 90, np.uint8))
    questions[0]["image"] = "still.png"
    lines(root / "train.jsonl", questions)
    with (root / "train.jsonl").open("a") as file:
        file.write("this line is no record\n")
    return root


@pytest.fixture(scope="module")
def page(tmp_path_factory, data_root):
    """The page of a whole run whose every text is an attack."""
    out = report.write(write_run(tmp_path_factory.mktemp("runs") / "grpo", data_root, evil=EVIL))
    return out.read_text()


def test_a_whole_run_has_every_part(page):
    headings = Page(page).headings
    assert headings[:2] == ["Key numbers", "Before and after"]
    assert headings[2:] == [
        "Evaluations compared",
        "Gains",
        "Evaluation by kind",
        "Curves",
        "What the policy says",
        "Refused records",
        "Time by phase",
        "Files",
    ]
    assert "finished, 24 steps" in page
    assert "35 \N{RIGHTWARDS ARROW} 65 %" in page  # validation accuracy, first and last
    assert "+30.0 pts" in page and "25.0 to 45.0" in page
    assert "Blind: other video" in page and "always B" in page and "Chance" in page
    assert "grpo minus sft" in page and "+50.0 pts" in page  # right on 1 of 4, then on 3 of 4
    assert "checkpoints/16" in page and "2.9 KiB" in page
    assert len(page) < MAX_PAGE_BYTES


def test_nothing_comes_from_outside_and_no_text_is_markup(page):
    seen = Page(page)
    assert all(address.startswith("data:") for address in seen.addresses), seen.addresses
    assert seen.scripts == 1 and not seen.handlers
    assert "url(" not in page and "@import" not in page
    assert EVIL not in page and page.count("&lt;script&gt;alert(") > 20
    assert "default-src 'none'" in page
    tags = set(seen.tags)
    assert not tags & {"iframe", "object", "embed", "form", "base"}


def test_answers_stand_beside_the_frames_that_the_policy_saw(page):
    pictures = [a for a in Page(page).addresses if a.startswith("data:image/jpeg")]
    # q0 of the first step, of the last step, and of no validation answer: there are none
    assert len(pictures) == 2 * (1 + 8) and len(set(pictures)) == 9  # a picture, 8 frames
    assert "still.png</figcaption>" in page
    assert "0.0 s</figcaption>" in page and "3.8 s</figcaption>" in page  # slices of 4 s / 16
    assert page.count('class="answer good"') == page.count('class="answer bad"') == 2 * 2 * 2
    assert "v1.mp4 does not exist" in page  # q1's grey box says why
    assert "step 1&lt;" in page and "step 24&lt;" in page and "step 12&lt;" not in page


def test_curves_are_drawn_with_gaps_intervals_and_hover_values(page):
    for title in ("Entropy", "Gradient norm"):  # NaN and infinity in step 2
        data = re.search(rf'aria-label="{title} by step" data-chart="(.*?)">', page)[1]
        values = json.loads(data.replace("&#34;", '"'))["series"][0]["values"]
        assert values[1] is None and values[0] is not None
    accuracy = re.search(r'aria-label="Accuracy by step".*?</svg>', page, re.DOTALL)[0]
    assert accuracy.count('class="bar c0"') == accuracy.count("<circle") == 4
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "odd_number" in page


def test_runs_side_by_side(tmp_path, data_root):
    runs = [write_run(tmp_path / f"seed{i}" / "grpo", data_root, seed=i) for i in range(3)]
    command.main([str(run) for run in runs])
    page = (tmp_path / "report.html").read_text()
    assert "3 runs compared" in page
    assert "seed2: step 24" in page  # a column of each run
    loss = re.search(r'aria-label="Loss by step".*?</svg>', page, re.DOTALL)[0]
    assert loss.count('class="line ') == 3
    assert "What differs" in page and "<th>seed</th>" in page.replace(' class="kind"', "")


@pytest.mark.parametrize("kept", ["resolved.yaml", "metrics.jsonl"])
def test_parts_without_files_are_left_out(tmp_path, data_root, kept):
    run = write_run(tmp_path / "run", data_root)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / kept).write_bytes((run / kept).read_bytes())
    headings = Page(report.write(bare).read_text()).headings
    assert headings == (
        ["Key numbers", "Files"]
        if kept == "resolved.yaml"
        else ["Key numbers", "Curves", "Time by phase", "Files"]
    )


def test_every_file_may_be_cut_off_anywhere(tmp_path, data_root):
    run = write_run(tmp_path / "run", data_root, num_steps=8)
    files = [path for path in run.rglob("*") if path.suffix in (".jsonl", ".json", ".yaml")]
    whole = {path: path.read_bytes() for path in files}
    for part in (0.0, 0.37, 0.93):
        for path, data in whole.items():
            path.write_bytes(data[: int(part * len(data))])
        page = report.write(run).read_text()
        assert "</html>" in page
        if part:
            assert "Not readable" in page and "metrics.jsonl: 1 line cut off" in page


def test_a_stopped_run_says_so(tmp_path, data_root):
    run = write_run(tmp_path / "run", data_root)
    trace = "Traceback (most recent call last):\n  somewhere\nValueError: the disk is full\n"
    (run / "error.txt").write_text(trace)
    page = report.write(run).read_text()
    assert "stopped by an error after step 24" in page
    assert "ValueError: the disk is full" in page and "somewhere" not in page


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"no run folder: it has neither resolved\.yaml"):
        command.main([str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_start_is_the_before_only_on_the_same_questions(tmp_path, data_root):
    start = write_run(tmp_path / "sft", data_root, num_steps=8)
    for questions, found in ((80.0, True), (64.0, False)):
        run = tmp_path / f"grpo{questions:.0f}"
        write_run(run, data_root, model={"path": str(start / "export")})
        lines(run / "evaluations.jsonl", [evaluation_row(24, 24) | {"questions": questions}])
        assert bool(folders.read(run).start_evaluation) == found


def sweep(points):
    """sweep.json of (line, frames, share right)."""
    score = {"low": None, "high": None, "n": 8}
    return {
        "checkpoint": "x",
        "points": [
            {"line": line, "frames": frames, "part": "official/accuracy", "questions": 8}
            | {"scores": {"official/accuracy": score | {"mean": mean}}}
            | {"baselines": {"chance": {"mean": 0.25, "n": 8}}}
            for line, frames, mean in points
        ],
    }


def test_a_sweep_is_drawn_over_doubling_frames(tmp_path, data_root):
    run = write_run(tmp_path / "run", data_root)
    points = [(EVIL, 16, 0.3), (EVIL, 32, 0.6), (EVIL, 64, 0.5), ("direct", 16, 0.2)]
    (run / "evaluate" / "frames").mkdir()
    path = run / "evaluate" / "frames" / "sweep.json"
    path.write_text(json.dumps(sweep(points)))
    page = report.write(run).read_text()
    assert "Scores by number of frames" in page and EVIL not in page
    drawn = re.search(r'aria-label="official/accuracy by frames".*?</svg>', page, re.DOTALL)[0]
    dots = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    assert len(dots) == 4
    assert dots[1][0] - dots[0][0] == pytest.approx(dots[2][0] - dots[1][0], abs=0.2)  # log axis
    assert dots[1][1] < dots[2][1] < dots[0][1] < dots[3][1]  # higher scores stand higher
    assert all(f">{frames}<" in drawn for frames in (16, 32, 64)) and 'class="rule"' in drawn
    assert "chance 25.0 %" in page
    path.write_text(json.dumps(sweep(points)).replace('"frames": 16', '"frames": 0'))
    page = report.write(run).read_text()
    assert "Scores by number of frames" not in page and "frames/sweep.json: ValueError" in page


def test_official_and_strict_scores_stand_side_by_side(tmp_path, data_root):
    run = write_run(tmp_path / "run", data_root)
    path = run / "evaluate" / "grpo" / "scores.json"
    tree = json.loads(path.read_text())
    score = {"mean": 0.875, "low": 0.5, "high": 1.0, "n": 80}
    for by_kind in tree["modes"].values():
        by_kind["all"] |= {"official/accuracy": score}
        by_kind["duration: long"] = {"official/accuracy": score | {"mean": 0.625}}
    path.write_text(json.dumps(tree))
    page = report.write(run).read_text()
    table = re.search(
        r"<th>official/accuracy</th><th>video_qa/accuracy</th>.*?</table>", page, re.S
    )[0]
    assert re.search(r"Greedy</th>\s*<td[^>]*>87.5 %.*?<td[^>]*>75.0 %", table, re.S)
    assert "62.5 %" in page and page.index(">goal<") < page.index(">duration: long<")


def test_trailing_mean_passes_over_gaps():
    got = svg.trailing_mean(np.array([1.0, 3.0, np.nan, 5.0, 7.0]), 3)
    np.testing.assert_allclose(got, [1.0, 2.0, np.nan, 4.0, 6.0])


def test_long_lines_are_averaged_and_keep_their_ends():
    steps = np.arange(1, 2001)
    line = svg.Series(name="", colour=0, steps=steps, values=steps.astype(float))
    drawn = str(svg.line_chart([line], label=""))
    chart = json.loads(re.search(r'data-chart="(.*?)">', drawn)[1].replace("&#34;", '"'))
    shown = chart["series"][0]
    assert len(shown["steps"]) == svg.MAX_POINTS and shown["steps"][-1] == 2000
    assert shown["values"][0] == 3.0  # of 1, 2, 3, 4, 5


def test_a_single_value_stands_in_the_middle_of_its_axis():
    assert svg.Axis(8, 8, 0, 10)(8) == 5
    assert [svg.Axis(1, 100, 0, 10, log=True)(x) for x in (1, 10, 100)] == [0, 5, 10]
