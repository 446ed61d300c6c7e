"""What lmms-eval and math-verify make of given answers, subtitles and replies of a judge.

    python -m venv W
    W/bin/pip install --no-deps lmms-eval==0.7.3 loguru pyyaml numpy pandas python-dateutil six \
        pytz requests urllib3 certifi idna charset-normalizer math-verify latex2sympy2_extended \
        sympy mpmath antlr4-python3-runtime==4.13.2
    W/bin/python scorers.py

writes scorers.json beside it, which tests/rewards/test_scorers.py and tests/data/test_subtitles.py
read. It needs an environment of its own and imports nothing of ours; `versions` in the file says
what it ran with. The tasks' own files are executed; torch, transformers, decord, OpenCV, Pillow and
datasets, which the functions asked here do not touch, stand there empty. An option that is drawn at
random is drawn as each option in turn: "ABCD" says that any of them may be given.
"""

import importlib.metadata
import importlib.util
import json
import os
import random
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HOME", "/nowhere")  # the tasks read it when they are imported
PACKAGE = Path(importlib.util.find_spec("lmms_eval").origin).parent
EMPTY = (
    "torch",
    "transformers",
    "decord",
    "cv2",
    "PIL",
    "PIL.Image",
    "datasets",
    "lmms_eval.utils",
)
OPTIONS = ["a red pad", "The blue pad", "green", "pad 3.5", "He eats; then runs"]
"""Of which every benchmark has its first ones."""

BARE = [
    *("A", "B", "b", "E", "F", "(B)", "[B]", "B.", "B)", "B:", "b.", "B. The blue pad", "B, yes"),
    *(
        "(b)",
        "Option B",
        "option (B)",
        "A or B",
        "A and (B)",
        "B, not A",
        "not A. B",
        "AB",
        "A B C D",
    ),
    *("BLUE", "blue", "green", "the blue pad", "It is the blue pad", "I think it is the blue pad."),
    *("It was either a red pad or the blue pad", "it was the blue pad and not a red pad at all"),
    *(
        "The answer is B",
        "The answer is B.",
        "the answer is (B).",
        "Answer: B",
        "The best answer is: B",
    ),
    *(
        "The best option is C",
        "Best answer: D",
        "Best option: A man",
        "The answer A",
        "My choice is D",
    ),
    *(
        "I choose option C over A",
        "The correct choice is D because A is wrong",
        "I pick A... no, B",
    ),
    *(
        "A man eats. The answer is C",
        "A man in Berlin",
        "Because of D",
        "Do it",
        "Ask him",
        "Even so",
    ),
    *(
        "",
        " ",
        "\n",
        ".",
        "?",
        "none of these",
        "I cannot say what happens in this long film at all",
    ),
    *("He was there before he did anything that one could see in this", "3", "3.5", "D3", "3D"),
    *(
        "**B**",
        "`B`",
        '"B"',
        "'B'",
        "$B$",
        "\\boxed{B}",
        "B\n",
        "\nB\n",
        "B\nA",
        "A\nB",
        "B.A",
        "B-A",
    ),
    *(
        "(A) (B)",
        "(B) (A)",
        "A. B.",
        "B. A.",
        "A: B:",
        "A) B)",
        "C (A",
        "A; B",
        "B; A",
        "E.",
        "(E)",
    ),
    *("\uc815\ub2f5\uc740 B", "\u7b54\u6848\u662f C", "\u7b54\u3048\u306f D", "\u9009 A \u6216 B"),
]
TAGGED = [
    *("<answer>B</answer>", "<answer> B </answer>", "<answer>B.</answer>", "<answer>(B)</answer>"),
    *("<think>A man</think><answer>B</answer>", "<think>A man</think> B", "<think>A man</think>"),
    *("<think>A man <answer>B</answer>", "A man</think>B", "A</think>B</think>C", "<think>B"),
    *("<think>A</think><think>B</think>C", "</think>A<think>B", "<analysis>A</analysis>B"),
    *("<think>A<think>B</think>C</think>D", "<THINK>A</THINK>B", "B<think>A</think>"),
    *("<answer>A</answer><answer>B</answer>", "<answer>B\n</answer>", "<answer>\nB</answer>"),
    "<answer>Therefore the final answer is: B</answer>",
    "Therefore the final answer is: B <answer>B</answer>",
    "<think>Therefore the final answer is: A</think><answer>B</answer>",
    "<think>x</think><answer>Therefore the final answer is: B.</answer>",
]
WORDS = [
    *(
        "A",
        "B",
        "C",
        "D",
        "E",
        "(A)",
        "(B)",
        "C.",
        "D:",
        "E)",
        "A,",
        "the answer is",
        "The answer is",
    ),
    *(
        "a red pad",
        "the blue pad",
        "green",
        "pad 3.5",
        "Because",
        "so",
        "I choose",
        "best option is",
    ),
    *("<think>", "</think>", "not", "and", "\n", "."),
]
REPLIES = [
    *("{'pred': 'yes', 'score': 4}", '{"pred": "no", "score": 0}', "{'pred': 'Yes', 'score': 5}"),
    *(
        "{'pred': 'yes', 'score': 4.8}",
        "{'pred': 'yes', 'score': '3'}",
        "{'pred': 'yes'}",
        "yes, 4",
    ),
    *("Sure: {'pred': 'no', 'score': 2} as asked", "", "{'pred': 'maybe', 'score': 2}", "{}", "{"),
    *('```json\n{"pred": "yes", "score": 5}\n```', "{'score': 3, 'pred': 'no'}"),
]
FONT = '<font color="white" size=".72c">{}</font>'
SRT = [  # (start, end) in ms, text
    *(
        (0, 1500, "first"),
        (1500, 3000, "second"),
        (2500, 4000, "over the second"),
        (6000, 6001, "short"),
    ),
    *((8000, 8000, "never"), (9000, 12000, "last &amp; long"), (9500, 9900, "within")),
]
LINES = [  # of LongVideoBench: its two forms, of films cut out of longer ones, too
    {"start": "00:00:30.000", "end": "00:00:32.500", "line": "thirty"},
    {"start": "00:00:33.000", "end": "00:00:33.200", "line": "short, but widened"},
    {"start": "00:00:36.100", "end": "00:00:36.200", "line": "between frames"},
    {"start": "00:00:20.000", "end": "00:00:29.000", "line": "before the film"},
    {"start": "00:00:38.000", "end": "00:00:50.000", "line": "to the end"},
]
STAMPS = [
    {"timestamp": [0.0, 2.5], "text": "zero"},
    {"timestamp": [3.0, 9.0], "text": "three"},
    {"timestamp": [6.0, None], "text": "open"},
]


def texts() -> list[str]:
    rng = random.Random(7)
    made = [" ".join(rng.choices(WORDS, k=rng.randint(1, 8))) for _ in range(300)]
    return [*BARE, *TAGGED, *made]


def load(file: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"task_{file.replace('/', '_')}", PACKAGE / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stand_ins() -> None:
    """Empty packages, and lmms_eval.tasks without its __init__, which imports every model."""
    for name in EMPTY:
        sys.modules[name] = types.ModuleType(name)
    sys.modules["PIL"].Image = sys.modules["PIL.Image"]
    sys.modules["decord"].VideoReader = sys.modules["decord"].cpu = None
    sys.modules["datasets"].Dataset = None
    for name in ("lmms_eval", "lmms_eval.tasks", "lmms_eval.tasks._task_utils", "lmms_eval.api"):
        package = types.ModuleType(name)
        package.__path__ = [str(PACKAGE.parent.joinpath(*name.split(".")))]
        sys.modules[name] = package
    sys.modules["lmms_eval"].utils = sys.modules["lmms_eval.utils"]


def drawn(module: types.ModuleType, number: int, choose: Callable[[], str]) -> str:
    """The letters that `choose` gives, one if it draws none at random."""
    letters = ""
    for i in range(number):
        module.random = types.SimpleNamespace(choice=lambda options, i=i: options[i])
        letters += choose()
    return letters[0] if len(set(letters)) == 1 else letters


def verdicts(cleaned: list[str]) -> dict[str, list[str]]:
    """Of every text the letter that a task reads in it, "" if it finds none."""
    mme, lvb = load("tasks/videomme/utils.py"), load("tasks/longvideobench/utils.py")
    nextqa, perception = load("tasks/nextqa/utils.py"), load("tasks/perceptiontest/val/utils.py")
    five, four = OPTIONS, OPTIONS[:4]
    nextqa_doc = {f"a{i}": option for i, option in enumerate(five)}
    lvb_doc = {f"option{i}": option for i, option in enumerate(four)} | {"option4": "N/A"}
    lvb_doc |= {"id": "", "duration_group": 0, "question_category": "", "correct_choice": 0}
    perception_doc = {"answer_id": 0, "video_name": "", "question": ""}
    mme_doc = dict.fromkeys(("domain", "sub_category", "task_type", "question_id"), "")
    mme_doc |= {"duration": "", "videoID": "", "answer": "A"}

    def of_lvb(text: str) -> str:
        made = lvb.longvideobench_process_results
        return drawn(lvb, 4, lambda: made(lvb_doc, [text])["lvb_acc"]["parsed_pred"])

    def of_nextqa(text: str) -> str:
        table, letters = nextqa.get_multi_choice_info(nextqa_doc)
        return drawn(nextqa, 5, lambda: nextqa.parse_multi_choice_response(text, letters, table))

    def of_perception(text: str) -> str:
        made = perception.perceptiontest_val_process_results_mc(perception_doc, [text])
        return {-1: ""}.get(made["accuracy"]["pred_id"], "ABCD"[made["accuracy"]["pred_id"]])

    def of_mme(text: str) -> str:
        made = mme.videomme_process_results(mme_doc, [text])
        return made["videomme_perception_score"]["pred_answer"]

    tasks = {
        "video_mme": of_mme,
        "longvideobench": of_lvb,
        "next_qa": of_nextqa,
        "perception_test": of_perception,
    }
    return {name: [read(text) for text in cleaned] for name, read in tasks.items()}


def judged() -> list[list | None]:
    return [load("tasks/activitynetqa/utils.py").parse_score(reply) for reply in REPLIES]


def clock(time_ms: int) -> str:
    return f"00:00:{time_ms // 1000:02d},{time_ms % 1000:03d}"


def video_mme_subtitles() -> dict[str, object]:
    """The lines that VideoMME's prompt shows for 2 to 40 frames of a film of 13 s.

    A frame lasts 1 ms, so that rounding to frames, which the task does, changes nothing.
    """
    mme = load("tasks/videomme/utils.py")
    mme.cv2.CAP_PROP_FPS, mme.cv2.CAP_PROP_FRAME_COUNT = "fps", "frames"
    film = types.SimpleNamespace(get={"fps": 1000, "frames": 13000}.get)
    mme.cv2.VideoCapture = lambda path: film
    blocks = [
        f"{i}\n{clock(a)} --> {clock(b)}\n{FONT.format(text)}\n"
        for i, (a, b, text) in enumerate(SRT, start=1)
    ]
    srt = "\n".join(blocks)
    shown = {}
    with tempfile.TemporaryDirectory() as folder:
        mme.base_cache_dir, mme.cache_name = folder, ""
        path = Path(folder, "subtitle", "x.srt")
        path.parent.mkdir()
        path.write_text(srt)
        doc = {"videoID": "x", "question": "Q", "options": ["O"]}
        for num_frames in (2, 5, 14, 40):
            asked = mme.videomme_doc_to_text_subtitle(doc, {"frame_num": num_frames})
            lines = asked.split("\n")
            until = next(i for i, line in enumerate(lines) if line.startswith("Select the best"))
            shown[num_frames] = lines[1:until]
    return {"srt": srt, "frame_ms": 13000, "shown": shown}


def longvideobench_subtitles() -> list[dict[str, object]]:
    lvb = load("tasks/longvideobench/utils.py")
    cases = []
    for lines, from_s, length_s in ((LINES, 30.0, 9.0), (STAMPS, 0.0, 12.0), ([], 0.0, 5.0)):
        for most in (3, 4, 8, 16):
            times = lvb.compute_frame_timestamps(length_s, most)
            text = lvb.insert_subtitles_into_frames(times, lines, from_s, length_s)
            cases.append(
                {
                    "lines": lines,
                    "from_s": from_s,
                    "length_s": length_s,
                    "times_s": times,
                    "text": text,
                }
            )
    return cases


def main() -> None:
    import math_verify

    stand_ins()
    asked = texts()
    reasoning = load("api/reasoning.py")
    tags = [["<think>", "</think>"], ["<analysis>", "</analysis>"]]  # the default of its command
    cleaned = [reasoning.strip_reasoning_tags(text, tags) for text in asked]
    letters = [f"<answer>{chr(c)}</answer>" for c in range(ord("A"), ord("Z") + 1)]
    made = {
        "versions": {n: importlib.metadata.version(n) for n in ("lmms-eval", "math-verify")},
        "options": OPTIONS,
        "texts": asked,
        "without_reasoning": cleaned,
        "read": verdicts(cleaned),
        "found_by_math_verify": sum(len(math_verify.parse(letter)) for letter in letters),
        "replies": REPLIES,
        "judged": judged(),
        "video_mme_subtitles": video_mme_subtitles(),
        "longvideobench_subtitles": longvideobench_subtitles(),
    }
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in made.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    Path(__file__).with_suffix(".json").write_text(text)


if __name__ == "__main__":
    main()
