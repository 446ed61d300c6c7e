"""Small data sets in the published forms: field names and types as published, the words are ours.

Each write_<source>(root) lays out files as docs/data.md says and returns the name of the data file;
WANT has the records that must come of them.
"""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

from longrl_jax.types import Example, MediaFile


def film(path: str) -> tuple[MediaFile, ...]:
    return (MediaFile(kind="video", path=path),)


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"a film")


def picture(side: int, kind: str = "PNG") -> bytes:
    """Bytes of an image file, another for every side."""
    pixels = np.full((side, side, 3), 10 * side % 256, np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_json(root: Path, file: str, tree) -> str:
    (root / file).write_text(json.dumps(tree, indent=1))
    return file


def write_parquet(root: Path, file: str, rows, group: int = 2) -> str:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, root / file, row_group_size=group)
    return file


LONGVIDEO = [
    {
        "problem_id": number,
        "problem": f"Why does he run {number}?\nA. rain\nB. a dog",
        "data_type": "video",
        "problem_type": "goal",
        "reasoning": "<think>At 0:10 a dog appears.</think>",
        "videos": f"longvila_videos/{number}.mp4",
        "answer": "<answer>B</answer>",
    }
    for number in range(5)
]
LLAVA = [
    {
        "id": "RW587",
        "conversations": [
            {
                "from": "human",
                "value": "<image>\nWhat is on the arm?\nA. ink\nB. a watch\n"
                "Please respond with only the letter of the correct answer.",
            },
            {"from": "gpt", "value": "A."},
            {
                "from": "human",
                "value": "Which colour?\nA. red\nB. black\nPlease provide your answer by stating "
                "the letter followed by the full option.",
            },
            {"from": "gpt", "value": "B. Black."},
        ],
        "data_source": "0_30_s_academic_v0_1",
        "video": "academic_source/Charades/RW587.mp4",
    },
    {
        "id": "é-2",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat happens?"},
            {"from": "gpt", "value": "A cup falls. Then it breaks."},
        ],
        "data_source": "0_30_s_youtube_v0_1",
        "video": "videos/x.mp4",
    },
]
NEXTQA = [  # multiple choice
    ("4010069381", 369, 640, 480, "how do they play", 1, 6, "CH", "a", "b, and c", "d", "e", "f"),
    ("4882821564", 26, 640, 480, "why did he sit", 4, 1, "TN", "a", "b", "c", "d", "e"),
]
NEXTQA_COLUMNS = [
    *("video", "frame_count", "width", "height", "question", "answer", "qid", "type"),
    *("a0", "a1", "a2", "a3", "a4"),
]
PERCEPTION = {
    "video_1": {
        "metadata": {"split": "valid", "video_id": "video_1", "num_frames": 300, "frame_rate": 30},
        "object_tracking": [],
        "mc_question": [
            {
                "id": 0,
                "question": "What falls?",
                "options": ["a cup", "a pen", "a hat"],
                "answer_id": 2,
                "area": "physics",
                "reasoning": "explanatory",
                "tag": ["motion", "collision"],
            },
            {
                "id": 1,
                "question": "Is it moved?",
                "options": ["yes", "no", "both"],
                "answer_id": 0,
                "area": "memory",
                "reasoning": "descriptive",
                "tag": ["change detection"],
            },
        ],
    },
    "video_2": {"metadata": {"split": "valid", "video_id": "video_2"}, "mc_question": []},
}
CLEVRER = [
    {
        "scene_index": 10003,
        "video_filename": "video_10003.mp4",
        "questions": [
            {
                "question_id": 0,
                "question": "What shape enters last?",
                "question_type": "descriptive",
                "question_subtype": "query_shape",
                "program": ["events", "filter_in"],
                "answer": "cube",
            },
            {
                "question_id": 1,
                "question": "What is responsible for it?",
                "question_type": "explanatory",
                "program": ["objects"],
                "choices": [
                    {"choice_id": 0, "choice": "the cube", "program": [], "answer": "correct"},
                    {"choice_id": 1, "choice": "the ball", "program": [], "answer": "wrong"},
                    {"choice_id": 2, "choice": "the rod", "program": [], "answer": "correct"},
                ],
            },
            {
                "question_id": 2,
                "question": "What happens without it?",
                "question_type": "counterfactual",
                "choices": [{"choice_id": 0, "choice": "a crash", "answer": "wrong"}],
            },
        ],
    }
]
STAR = [
    {
        "question_id": f"{kind}_T1_{number}",
        "question": "Which thing was opened?",
        "video_id": "6H78U",
        "start": 11.1,
        "end": 19.6,
        "answer": "The door.",
        "question_program": [],
        "choices": [
            {"choice_id": 0, "choice": "The box.", "choice_program": []},
            {"choice_id": 1, "choice": "The door.", "choice_program": []},
        ],
        "situations": {},
    }
    for number, kind in enumerate(["Interaction", "Feasibility"])
]
CLEVR = [
    {
        "images": [{"bytes": picture(8), "path": "CLEVR_trainA_0.png"}],
        "problem": "<image>How many items are there?",
        "answer": "3",
    },
    {
        "images": [{"bytes": picture(9, "JPEG"), "path": None}, {"bytes": picture(8), "path": ""}],
        "problem": "Is <image> larger than <image>?",
        "answer": "<answer> yes </answer>",
    },
]
MATH = [
    {"problem": "How much is $1 + 1$?", "answer": "2"},
    {"problem": "Half of one?", "answer": r"\frac{1}{2}"},
]


def write_longvideo_reason(root: Path) -> str:
    touch(root, *(row["videos"] for row in LONGVIDEO))
    write_parquet(root, "data/train-00000-of-00002.parquet", LONGVIDEO[:3])
    write_parquet(root, "data/train-00001-of-00002.parquet", LONGVIDEO[3:])
    return "data/train-*.parquet"


def write_llava_video(root: Path) -> str:
    touch(root, *(row["video"] for row in LLAVA))
    return write_json(root, "qa.json", LLAVA)


def write_nextqa(root: Path) -> str:
    touch(root, "NExTVideo/1164/4010069381.mp4", "NExTVideo/4882821564.mp4")
    names = {"4010069381": "1164/4010069381", "4882821564": "1/4882821564"}
    (root / "nextqa").mkdir()
    write_json(root, "nextqa/map_vid_vidorID.json", names)
    with (root / "nextqa/val.csv").open("w", newline="") as file:
        csv.writer(file).writerows([NEXTQA_COLUMNS, *NEXTQA])
    return "nextqa/val.csv"


def write_perception_test(root: Path) -> str:
    touch(root, "videos/video_1.mp4")
    return write_json(root, "mc_question_valid.json", PERCEPTION)


def write_clevrer(root: Path) -> str:
    touch(root, "video_validation/video_10000-11000/video_10003.mp4")
    return write_json(root, "validation.json", CLEVRER)


def write_star(root: Path) -> str:
    touch(root, "Charades_v1_480/6H78U.mp4")
    return write_json(root, "STAR_val.json", STAR)


def write_image_qa(root: Path) -> str:
    return write_parquet(root, "train.parquet", CLEVR)


def write_text_math(root: Path) -> str:
    write_parquet(root, "math12k/data/train-00000-of-00001.parquet", MATH)
    return "math12k"


WRITE = {
    "longvideo_reason": write_longvideo_reason,
    "llava_video": write_llava_video,
    "nextqa": write_nextqa,
    "perception_test": write_perception_test,
    "clevrer": write_clevrer,
    "star": write_star,
    "image_qa": write_image_qa,
    "text_math": write_text_math,
}
ASKED = (
    "Several may be true, or none. Name the letters of all that are, in order, as in A, C; or none."
)
SCENE = film("video_validation/video_10000-11000/video_10003.mp4")
STAR_PART = (MediaFile(kind="video", path="Charades_v1_480/6H78U.mp4", span_s=(11.1, 19.6)),)
WANT = {
    "longvideo_reason": [
        Example(
            id=str(number),
            question=f"Why does he run {number}?\nA. rain\nB. a dog",
            answer="B",
            kind="goal",
            media=film(f"longvila_videos/{number}.mp4"),
            reasoning="At 0:10 a dog appears.",
        )
        for number in range(5)
    ],
    "llava_video": [
        Example(
            id="RW587-0",
            question="What is on the arm?\nA. ink\nB. a watch",
            answer="A",
            kind="choice",
            media=film("academic_source/Charades/RW587.mp4"),
            tags=(("data_source", "0_30_s_academic_v0_1"),),
        ),
        Example(
            id="RW587-1",
            question="Which colour?\nA. red\nB. black",
            answer="B",
            kind="choice",
            media=film("academic_source/Charades/RW587.mp4"),
            tags=(("data_source", "0_30_s_academic_v0_1"),),
        ),
        Example(
            id="é-2",
            question="What happens?",
            answer="A cup falls. Then it breaks.",
            kind="open",
            media=film("videos/x.mp4"),
            tags=(("data_source", "0_30_s_youtube_v0_1"),),
        ),
    ],
    "nextqa": [
        Example(
            id="4010069381-6",
            question="how do they play\nA. a\nB. b, and c\nC. d\nD. e\nE. f",
            answer="B",
            kind="causal",
            media=film("NExTVideo/1164/4010069381.mp4"),
            tags=(("type", "CH"),),
        ),
        Example(
            id="4882821564-1",
            question="why did he sit\nA. a\nB. b\nC. c\nD. d\nE. e",
            answer="E",
            kind="temporal",
            media=film("NExTVideo/4882821564.mp4"),
            tags=(("type", "TN"),),
        ),
    ],
    "perception_test": [
        Example(
            id="video_1-0",
            question="What falls?\nA. a cup\nB. a pen\nC. a hat",
            answer="C",
            kind="physics",
            media=film("videos/video_1.mp4"),
            tags=(("reasoning", "explanatory"), ("tag", "motion, collision")),
        ),
        Example(
            id="video_1-1",
            question="Is it moved?\nA. yes\nB. no\nC. both",
            answer="A",
            kind="memory",
            media=film("videos/video_1.mp4"),
            tags=(("reasoning", "descriptive"), ("tag", "change detection")),
        ),
    ],
    "clevrer": [
        Example(
            id="video_10003-0",
            question="What shape enters last?",
            answer="cube",
            kind="descriptive",
            media=SCENE,
            tags=(("subtype", "query_shape"),),
        ),
        Example(
            id="video_10003-1",
            question=f"What is responsible for it? {ASKED}\nA. the cube\nB. the ball\nC. the rod",
            answer="A, C",
            kind="explanatory",
            media=SCENE,
        ),
        Example(
            id="video_10003-2",
            question=f"What happens without it? {ASKED}\nA. a crash",
            answer="none",
            kind="counterfactual",
            media=SCENE,
        ),
    ],
    "star": [
        Example(
            id="Interaction_T1_0",
            question="Which thing was opened?\nA. The box.\nB. The door.",
            answer="B",
            kind="Interaction",
            media=STAR_PART,
        ),
        Example(
            id="Feasibility_T1_1",
            question="Which thing was opened?\nA. The box.\nB. The door.",
            answer="B",
            kind="Feasibility",
            media=STAR_PART,
        ),
    ],
    "text_math": [
        Example(
            id="math12k/data/train-00000-of-00001.parquet[0]",
            question="How much is $1 + 1$?",
            answer="2",
        ),
        Example(
            id="math12k/data/train-00000-of-00001.parquet[1]",
            question="Half of one?",
            answer=r"\frac{1}{2}",
        ),
    ],
}
"""Of image_qa see test_formats.py: the names of its files follow from their bytes."""
