"""GRPO of tiny members of the VILA family on images and films, with a real vLLM."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from longrl_jax import convert
from longrl_jax.stages import grpo

MAX_GAP = 1e-4  # float32, sums in another order
ROOT = Path(__file__).parents[2]
NVILA = {
    "dynamic_s2": True,
    "s2_scales": "36,72",
    "s2_resize_output_to_scale_idx": -1,
    "image_aspect_ratio": "dynamic_s2",
    "max_tiles": 6,
    "num_video_frames": 8,
    "video_encoder": json.dumps(
        {
            "_target_": "llava.model.encoders.TSPVideoEncoder",
            "pool_sizes": [[4, 1, 1]],
            "start_tokens": "t",
        }
    ),
}
VILA_1_5 = {
    "s2": True,
    "s2_scales": "36,72",
    "s2_max_split_size": 36,
    "num_video_frames": 8,
}
MEMBERS = {  # what config.json says, language model, projector, frozen; pictures of each step
    # the image alone: 1 + 2 x 3 tiles; beside another one: one picture
    "nvila": (NVILA, "qwen2", "mlp_downsample_3x3_s2", "vision, projector", 8 + 7 + 1),
    # Llama, whose vocabulary has no media tokens; the projector is trained
    "vila1_5_s2": (VILA_1_5, "llama", "mlp_downsample", "vision", 8 + 1),
}


@pytest.fixture
def data(world, tmp_path):
    """Questions about an image, a film, two images and the film, and nothing."""
    root = tmp_path / "data"
    (root / "videos").mkdir(parents=True)
    film = json.loads((world / "data" / "train.jsonl").read_text().splitlines()[0])["video"]
    (root / film).write_bytes((world / "data" / film).read_bytes())
    picture = Image.new("RGB", (180, 100), "white")
    ImageDraw.Draw(picture).ellipse((20, 10, 90, 80), fill="red")
    picture.save(root / "still.png")
    both = {"images": ["still.png", "still.png"], "video": film}
    with (root / "train.jsonl").open("w") as file:
        for i, media in enumerate([{"image": "still.png"}, {"video": film}, both, {}]):
            words = {"id": f"q{i}", "question": "which pad ? red = A", "answer": "A"}
            file.write(json.dumps(words | media) + "\n")
    return root


def make_folder(folder: Path, corpus: Path, top: dict, llm: str, projector: str) -> None:
    tree = json.loads((ROOT / "configs/models/tiny_vila.json").read_text()) | top
    tree["llm_cfg"] |= {"model_type": llm, "architectures": [f"{llm.title()}ForCausalLM"]}
    tree["mm_projector_cfg"]["mm_projector_type"] = projector
    tree["vision_tower_cfg"]["hidden_size"] = 48
    source = folder.with_suffix(".json")
    source.write_text(json.dumps(tree))
    convert.init(source, folder, corpus=corpus)
    if llm == "llama":
        size = json.loads((folder / "llm" / "config.json").read_text())["vocab_size"]
        convert._write_tokenizer(folder / "llm", corpus.read_text(), size, media=())


@pytest.mark.slow
@pytest.mark.parametrize("member", MEMBERS)
def test_grpo_of_images_and_films_agrees_with_its_engine(
    configured, world, data, spaces, tmp_path, member
):
    top, llm, projector, frozen, num_pictures = MEMBERS[member]
    make_folder(tmp_path / member, world / "data" / "corpus.txt", top, llm, projector)
    overrides = [
        f"model.path={tmp_path / member}",
        f"model.frozen=[{frozen}]",
        "model.compute_dtype=float32",
        f"data.root={data}",
        "data.train=train.jsonl",
        "data.validation=",
        "data.num_frames=0",
        "data.timestamp=",
        f"store.path={tmp_path / 'store'}",
        "rewards={spaces: 1.0}",
        "rollout.process=worker",
        "rollout.kv_cache_gib=0.25",
        "optimizer.learning_rate=0.01",
        "run.num_steps=2",
        "run.export=false",
    ]
    cfg = configured("tiny_cpu_grpo.yaml", *overrides)
    assert cfg.data.num_frames == 8  # of the checkpoint
    grpo.run(cfg)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [step["groups"] for step in steps] == [4, 4] and steps[-1]["refused"] == 0
    assert all(np.isfinite([step["loss"], step["grad_norm"]]).all() for step in steps)
    assert steps[0]["grad_norm"] > 0
    assert max(step["gap/max"] for step in steps) < MAX_GAP
    assert [step["media/encoded_frames"] for step in steps] == [num_pictures, 0]
