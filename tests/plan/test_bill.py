"""The arithmetic of memory and time, against sums made by hand."""

import dataclasses

import pytest

from longrl_jax.config import RolloutConfig
from longrl_jax.models.decoder import Config as Text
from longrl_jax.models.rope import Rope
from longrl_jax.plan import bill, counter
from longrl_jax.plan.bill import GIB
from longrl_jax.plan.compiled import Compiled
from longrl_jax.plan.hardware import HARDWARE, target_config
from longrl_jax.plan.programs import Row

TEXT = Text(
    vocab_size=1000, width=64, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=16,
    mlp_width=128, norm_eps=1e-6, rope=Rope(theta=1e4), tied=False,
)  # fmt: skip
ROW = Row(num_frames=10, frame_tokens=9, question_tokens=10, answers=4, answer_tokens=5)
MEMORY = 80 * GIB


def program(name, *, arguments=0, inputs=0, peak=0, work=None, links=None):
    return Compiled(
        name=name,
        input_bytes=inputs * GIB,
        argument_bytes=arguments * GIB,
        temporary_bytes=0,
        output_bytes=0,
        host_bytes=0,
        peak_bytes=peak * GIB,
        compile_s=1.0,
        work=work or counter.Work(),
        links=links or {},
        kernels=("blockwise XLA",),
    )


def engine(ranks=1, utilization=0.5, dtype="bfloat16"):
    rollout = RolloutConfig(
        tensor_parallel=ranks, process="worker", gpu_memory_utilization=utilization, dtype=dtype
    )
    return bill.engine_of(TEXT, 1_000_000, ROW, rollout, MEMORY)


def test_a_row_counts_its_prompt_once():
    assert ROW.prompt_tokens == 100 and ROW.tokens == 99 + 20


@pytest.mark.parametrize(("ranks", "heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_the_cache_holds_keys_and_values_of_every_layer(ranks, heads):
    """Prompt once and all answers; ranks share heads, but none has less than one."""
    got = engine(ranks)
    assert got.row == (100 + 4 * 5) * 2 * 3 * heads * 16 * 2
    assert got.weights == 2 * 1_000_000 // ranks
    assert got.takes == 40 * GIB and got.needs == got.weights + got.row + got.workspace


def test_rows_at_once_is_what_the_share_has_room_for():
    e = bill.Engine(weights=3, row=10, workspace=2, takes=46)
    assert e.rows_at_once == 4 and dataclasses.replace(e, takes=4).rows_at_once == 0
    assert bill.smallest_utilization(e, 100) == 0.15


def test_the_reserve_is_six_gib_or_what_prepare_leaves():
    assert bill.learner_limit(MEMORY, 20 * GIB) == 80 * GIB - 20 * GIB - int(0.08 * MEMORY)
    assert bill.learner_limit(40 * GIB, 0) == 34 * GIB


def test_what_is_there_together_by_phase():
    """A peak holds its program's own arguments; what others keep there is added, not twice."""
    resident = bill.Resident(trained=4 * GIB, frozen=GIB, optimizer=8 * GIB, reference=4 * GIB)
    phases = {
        "encode": program("encode", arguments=1, peak=3),
        "embed": program("embed", arguments=6, inputs=1, peak=9),
        "logps": program("logps", arguments=7, inputs=2, peak=12),
        "update": program("update", arguments=15, inputs=2, peak=35),
    }
    e = bill.Engine(weights=GIB, row=GIB, workspace=GIB, takes=16 * GIB)
    awake = bill.sums(phases, resident, MEMORY, engine=e)
    assert [s.name for s in awake] == ["encode", "embed", "rollout", "logps", "update"]
    assert [s.learner // GIB for s in awake] == [17 + 2, 17 + 1 + 3, 17, 17 + 2 + 5, 17 + 2 + 20]
    limit = MEMORY - int(0.08 * MEMORY)
    assert all(s.free == limit - s.engine - s.learner for s in awake)
    assert bill.tightest(awake).name == "update"
    asleep = bill.sums(phases, resident, MEMORY, engine=e, asleep=True)
    assert [s.engine // GIB for s in asleep] == [0, 0, 16, 0, 0]
    without = bill.sums({"update": phases["update"]}, resident, MEMORY, engine=None)
    assert [s.name for s in without] == ["update"] and without[0].engine == 0


def test_seconds_of_a_program():
    work = counter.Work(dense=312e12, tiles=624e12, decisions=1e5)
    p = program("update", work=work, links={"all-gather": 300e9, "collective-permute": 300e9})
    t = bill.seconds(p, HARDWARE["a100-80gb"], balance=1.5, calls=2)
    assert t.products == pytest.approx(2 / bill.DENSE_SHARE)
    assert t.attention == pytest.approx(2 * 2 * 1.5 / bill.TILE_SHARE)
    assert t.decisions == pytest.approx(2 * 1.5 * 1e5 * bill.DECISION_S)
    assert t.links == pytest.approx(2 * 2 / bill.LINK_SHARE)
    assert t.total == pytest.approx(t.products + t.attention + t.decisions + t.links)


@pytest.mark.parametrize("name", HARDWARE)
def test_the_text_for_xla_says_the_device(name):
    """Braces pair up, and the facts of the table are in it."""
    text = target_config(HARDWARE[name])
    assert text.count("{") == text.count("}")
    for fact in (HARDWARE[name].device, str(HARDWARE[name].memory_bytes), "runtime_version"):
        assert fact in text
