"""What `plan` says of memory against what a process takes: the update, compiled and run on CPU.

    python benchmarks/plan_against_reality.py        # three processes, a few minutes, at most 4 GB

Every size is compiled and run once in a process of its own. Predicted: devices * (temporaries + new
results), the compiler's figures that a plan prints. Measured: how far the peak of the resident set
rises over what it was before the step (the high-water mark is reset through /proc). It says that
the figures mean what we take them for; it says nothing about a GPU, whose programs are others.
"""

import argparse
import ctypes
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BOUND = 0.15
"""Of |measured - predicted| / predicted; what the allocator keeps and rounds is in it."""
LEAST_TEMPORARIES_GIB = 1.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One size: simulated devices on the axis seq, frames of 16 tokens, and the decoder's MLP."""

    devices: int
    num_frames: int
    mlp_width: int
    num_layers: int


CASES = (Case(1, 220, 12288, 4), Case(2, 240, 14336, 6), Case(8, 300, 16384, 4))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", type=int, help="run one case here and print it as JSON")
    case = parser.parse_args().case
    if case is not None:
        print(json.dumps(measure(CASES[case])))
        return
    rows, worst = [], 0.0
    for i in range(len(CASES)):
        command = [sys.executable, __file__, "--case", str(i)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            sys.exit(f"case {i} failed:\n{done.stderr[-2000:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        worst = max(worst, abs(rows[-1]["measured_gib"] / rows[-1]["predicted_gib"] - 1))
    print(
        "| devices | tokens a row | temporaries, GiB | predicted, GiB | measured, GiB "
        "| difference |"
    )
    print("|---|---|---|---|---|---|")
    for r in rows:
        difference = r["measured_gib"] / r["predicted_gib"] - 1
        print(
            f"| {r['devices']} | {r['tokens']:,} | {r['temporaries_gib']:.2f} | "
            f"{r['predicted_gib']:.2f} | {r['measured_gib']:.2f} | {difference:+.1%} |"
        )
    print(f"\n{rows[0]['versions']}; the largest difference is {worst:.1%}, the bound {BOUND:.0%}")
    sys.exit(worst > BOUND)


def measure(case: Case) -> dict:
    """Compiles the update of a case, makes its arguments, runs it once."""
    from longrl_jax import platform

    with tempfile.TemporaryDirectory() as folder:
        cfg = config_of(case, Path(folder))
        platform.prepare(cfg.mesh)
        import jax
        import jax.numpy as jnp

        from longrl_jax import step
        from longrl_jax.plan import compiled, programs
        from longrl_jax.stages import update

        mesh = programs.mesh_of(cfg, jax.devices())
        policy, state = programs.abstract_policy(cfg, mesh)
        row = programs.row_of(cfg, policy.backbone, policy.model_cfg)
        passes = programs.host_passes(cfg, row)
        batch = programs.on_mesh(policy, passes)
        phase = programs.trace_all(cfg, policy, state, passes, row)["update"]
        tiles = compiled.tiles_of(passes, kernel=cfg.attention.kernel, ulysses=1)
        said = compiled.compile_phase(phase, None, num_devices=case.devices, tiles=tiles)

    def touched(x: jax.ShapeDtypeStruct) -> jax.Array:
        make = jax.jit(lambda: jnp.full(x.shape, 1, x.dtype), out_shardings=x.sharding)
        return jax.block_until_ready(make())

    train_step = update.make_sft_update(cfg, policy, state)
    state, batch = jax.tree.map(touched, (state, batch))
    trained = state.params, state.opt_state, state.step
    program = train_step.trace(state, batch).lower().compile()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what compiling left over would hide a part
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    jax.block_until_ready(program(trained, state.frozen, batch, None, None))
    grown = resident_bytes("VmHWM") - before
    assert isinstance(state, step.TrainState)
    temporaries = case.devices * said.temporary_bytes
    assert temporaries >= LEAST_TEMPORARIES_GIB * 2**30, f"{case} is too small: {temporaries}"
    return {
        "devices": case.devices,
        "tokens": passes.tokens.shape[-1],
        "temporaries_gib": temporaries / 2**30,
        "predicted_gib": case.devices * (said.temporary_bytes + said.output_bytes) / 2**30,
        "measured_gib": grown / 2**30,
        "versions": compiled.versions(),
    }


def config_of(case: Case, folder: Path):
    """A VILA of that size, sizes alone, and an SFT config on it."""
    from longrl_jax import config

    tree = json.loads((ROOT / "configs/models/tiny_vila.json").read_text())
    tree["mm_projector_cfg"]["mm_projector_type"] = "mlp2x_gelu"
    tree["vision_tower_cfg"] |= {"image_size": 32, "patch_size": 8}
    tree["llm_cfg"] |= {
        "hidden_size": 256,
        "intermediate_size": case.mlp_width,
        "num_hidden_layers": case.num_layers,
    }
    model = folder / "config.json"
    model.write_text(json.dumps(tree))
    return config.Config(
        stage="sft",
        model=config.ModelConfig(path=str(model), frozen=("vision", "projector")),
        data=config.DataConfig(root="data", num_frames=case.num_frames),
        mesh=config.MeshConfig(seq=case.devices, simulated=True),
        batch=config.BatchConfig(groups=1, max_row_tokens=65536),
        rollout=config.RolloutConfig(max_tokens=256, max_model_len=65536),
        run=config.RunConfig(dir="runs/none"),
    )


def resident_bytes(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
