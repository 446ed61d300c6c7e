"""A plan as text: it reads like a bill. Sizes are GiB of one device."""

import math
import textwrap
from collections.abc import Sequence

from longrl_jax.plan import bill
from longrl_jax.plan.bill import GIB
from longrl_jax.plan.compiled import Compiled
from longrl_jax.plan.hardware import Hardware
from longrl_jax.plan.planned import MOST_FRAMES, Fit, Plan

WIDTH = 74
OF_A_COMPILER = (
    "These figures are a compiler's. XLA compiled the programs that training runs for this device "
    "and says what they allocate; none of them ran on one. vLLM's part and all times are formulas."
)


def lines(plan: Plan, hardware: Hardware | None, fit: Fit | None, *, asleep: bool) -> list[str]:
    """Returns the whole page. fit: of planned.most_frames; None: no search was made."""
    out = [*_head(plan, hardware), "", *_programs(plan)]
    if hardware is None:
        return [*out, "", *_work(plan, None), "", "A CPU has no memory to fit into, and no rates."]
    found = plan.sums(hardware.memory_bytes, asleep=asleep)
    return [
        *out,
        "",
        *_memory(plan, hardware, found, asleep),
        "",
        *_verdict(plan, hardware, found, asleep),
        "",
        *_work(plan, hardware),
        "",
        *_knobs(plan, hardware, found, fit, asleep),
    ]


def _head(plan: Plan, hardware: Hardware | None) -> list[str]:
    cfg, row = plan.cfg, plan.row
    mesh = " ".join(f"{a}={n}" for a, n in plan.policy.mesh.shape.items() if n > 1) or "one device"
    if hardware is None:
        devices = f"{cfg.mesh.num_devices} simulated CPU devices"
    else:
        devices = f"{cfg.mesh.num_devices} x {hardware.device} of {_gib(hardware.memory_bytes)} GiB"
    tiles = plan.tiles
    shared = "" if row.unit_frames == 1 else f" / {row.unit_frames}"
    return [
        f"model    {cfg.model.path}, {plan.language_parameters / 1e9:.2f} billion parameters of "
        "language model",
        f"devices  {devices}, mesh {mesh}",
        f"row      {row.num_frames:,} frames{shared} x {row.frame_tokens} tokens + "
        f"{row.question_tokens} = "
        f"{row.prompt_tokens:,} tokens of prompt, {row.answers} answers x {row.answer_tokens:,}",
        f"         padded to {plan.row_tokens:,}; {plan.num_rows} rows a step in {plan.num_passes} "
        "passes" + (", the most: shorter ones are packed" if cfg.batch.pack else ""),
        f"choices  model.remat={cfg.model.remat}, model.frozen={list(cfg.model.frozen)}, "
        f"algorithm.kl={cfg.algorithm.kl:g}"
        + (f", model.lora_rank={cfg.model.lora_rank}" if cfg.model.lora_rank else ""),
        f"kernel   {', '.join(plan.phases['update'].kernels)}; {100 * tiles.share:.1f} % of the "
        f"tiles are executed, the busiest device has {tiles.balance:.2f} times the mean",
    ]


def _programs(plan: Plan) -> list[str]:
    out = ["PROGRAMS                 reads   temporaries   new results   on the host   compiled in"]
    for p in plan.phases.values():
        out.append(
            f"  {p.name:<18}{_gib(p.argument_bytes):>10}{_gib(p.temporary_bytes):>14}"
            f"{_gib(p.output_bytes):>14}{_gib(p.host_bytes):>14}{p.compile_s:>11.0f} s"
        )
    return out


def _memory(plan: Plan, hardware: Hardware, found: Sequence[bill.Sum], asleep: bool) -> list[str]:
    r, e, rollout = plan.resident, plan.engine, plan.cfg.rollout
    rows = [
        ("parameters that are trained, float32", r.trained),
        ("parameters that are frozen, float32", r.frozen),
        ("optimizer: AdamW's two moments, float32", r.optimizer),
    ]
    if r.reference:
        rows.append(("reference of the KL term, float32", r.reference))
    out = ["MEMORY of one device, GiB", "  always there"]
    out += [_entry(f"    {text}", size) for text, size in rows]
    if e is not None:
        share = f"rollout.gpu_memory_utilization={rollout.gpu_memory_utilization:g}"
        when = ", while it rolls out only" if asleep else ""
        out.append(_entry(f"    vLLM's share ({share}){when}", e.takes))
        room = max(e.takes - e.weights - e.workspace, 0)
        out += [
            f"      weights, {rollout.dtype} over {rollout.tensor_parallel} ranks: "
            f"{_gib(e.weights)}; workspace: {_gib(e.workspace)} (a formula)",
            f"      cache: {_gib(room)}; one row (prompt once, {plan.row.answers} answers) takes "
            f"{_gib(e.row)}: {e.rows_at_once} rows at once",
        ]
    reserve = hardware.memory_bytes - bill.learner_limit(hardware.memory_bytes, 0)
    out.append(_entry("    reserve: NCCL, CUDA contexts, cuBLAS, fragmentation", reserve))
    out.append("  with what a phase needs     the learner        vLLM     reserve         free")
    for s in found:
        out.append(
            f"    {s.name:<18}{_gib(s.learner):>17}{_gib(s.engine):>12}{_gib(reserve):>12}"
            f"{_gib(s.free):>13}"
        )
    for p in plan.phases.values():
        if p.host_bytes:
            whole = plan.cfg.mesh.num_devices * p.host_bytes
            out.append(
                f"  {p.name} keeps {_gib(p.host_bytes)} GiB a device in the host's memory, "
                f"{_gib(whole)} GiB in all (not checked against the host's)"
            )
    return out


def _verdict(plan: Plan, hardware: Hardware, found: Sequence[bill.Sum], asleep: bool) -> list[str]:
    tight, e = bill.tightest(found), plan.engine
    out = []
    if e is not None and e.needs > e.takes:
        need = bill.smallest_utilization(e, hardware.memory_bytes)
        out.append(
            f"DOES NOT FIT: vLLM needs {_gib(e.needs)} GiB for one row and gets {_gib(e.takes)}; "
            f"set rollout.gpu_memory_utilization={need:.2f}"
        )
    if tight.free < 0:
        out.append(f"DOES NOT FIT: {tight.name} lacks {_gib(-tight.free)} GiB on every device")
    if not out:
        sleeping = " IF vLLM SLEEPS while the learner computes (not built yet)" if asleep else ""
        out.append(f"FITS{sleeping}: {_gib(tight.free)} GiB are free in {tight.name}, the tightest")
    return [*out, _wrapped(OF_A_COMPILER)]


def _work(plan: Plan, hardware: Hardware | None) -> list[str]:
    out = [
        "WORK of one device       products    attention    sent, GiB    of it weights and gradients"
    ]
    for p in plan.phases.values():
        n = _calls(plan, p)
        weights = sum(
            v for k, v in p.links.items() if k not in ("collective-permute", "all-to-all")
        )
        out.append(
            f"  {p.name + _times(n):<22}{n * p.work.dense / 1e12:>8,.1f} T"
            f"{n * p.work.tiles / 1e12:>11,.1f} T"
            f"{_gib(n * sum(p.links.values())):>13}{_gib(n * weights):>17}"
        )
        if p.work.unknown_loops:
            out.append(f"    ({p.work.unknown_loops} loops of unknown length are counted once)")
    if hardware is None:
        return out
    out.append("TIME of a step, seconds, an estimate")
    total = 0.0
    for p in plan.phases.values():
        t = bill.seconds(p, hardware, balance=plan.tiles.balance, calls=_calls(plan, p))
        total += t.total
        decided = f", {t.decisions:,.0f} deciding about tiles" if t.decisions else ""
        out.append(
            f"  {p.name:<18}{t.total:>9,.0f}   {t.products:,.0f} products, {t.attention:,.0f} "
            f"attention{decided}, {t.links:,.0f} links"
        )
    if plan.engine is not None:
        text = plan.policy.backbone.text_config(plan.policy.model_cfg)
        rollout = bill.rollout_seconds(
            text, plan.language_parameters, plan.row, plan.cfg, plan.engine, hardware
        )
        total += rollout
        out.append(
            f"  {'rollout':<18}{rollout:>9,.0f}   a formula: prefill once a prompt, decoding"
        )
    out.append(f"  {'together':<18}{total:>9,.0f}")
    said = (
        f"Assumed, not measured: {bill.DENSE_SHARE:.0%} of the data sheet's FLOP/s for products, "
        f"{bill.TILE_SHARE:.0%} inside attention's tiles, {bill.LINK_SHARE:.0%} of the links, "
        f"{bill.MEMORY_SHARE:.0%} of the memory for decoding, nothing overlaps"
    )
    if any(p.work.decisions for p in plan.phases.values()):
        said += (
            f"; {bill.DECISION_S * 1e6:.0f} us for every tile of blockwise XLA attention, whose "
            "conditional waits for the host"
        )
    return [*out, _wrapped(said + ". Decoding of videos, rewards and weight pushes are left out.")]


def _knobs(
    plan: Plan, hardware: Hardware, found: Sequence[bill.Sum], fit: Fit | None, asleep: bool
) -> list[str]:
    r, e, cfg = plan.resident, plan.engine, plan.cfg
    out = ["WHAT WOULD FIT"]
    if fit is not None:
        how = "compiled itself" if fit.confirmed else "of a straight line through those compiled"
        if fit.frames == MOST_FRAMES:
            how += ", and the most that data.num_frames takes"
        out.append(
            f"  the most frames: {fit.frames:,} ({how}), with vLLM's share as small as the row "
            "allows"
        )
        for frames, tokens, spare in fit.compiled:
            out.append(
                f"    {frames:>6,} frames, {tokens:>9,} tokens a row: {_gib(spare):>7} GiB free "
                "(update, compiled)"
            )
        out.append("    between them memory is taken to grow in proportion to the tokens of a row")
    if e is not None:
        need = bill.smallest_utilization(e, hardware.memory_bytes)
        change = e.takes - int(need * hardware.memory_bytes)
        if need != round(cfg.rollout.gpu_memory_utilization, 2):
            out.append(
                f"  rollout.gpu_memory_utilization={need:.2f} is the least for one row: "
                f"{_signed(change)} GiB"
            )
        if not asleep:
            out.append(
                f"  vLLM asleep while the learner computes (not built yet): {_signed(e.takes)} GiB"
            )
    if r.reference:
        out.append(f"  algorithm.kl=0, without a reference: {_signed(r.reference)} GiB")
    if plan.num_passes > 1:
        out.append(
            "  batch.groups for one pass a step, without a sum of gradients: "
            f"{_signed(r.trained)} GiB"
        )
    if cfg.model.remat == "nothing":
        kept = _layer_inputs(plan)
        out.append(
            f"  model.remat=offload, the layers' inputs in the host's memory: {_signed(kept)} GiB "
            f"(the host then holds {_gib(kept * cfg.mesh.num_devices)} GiB)"
        )
    if cfg.stage == "grpo":
        out.append("  mesh.seq with more devices: rows, parameters and optimizer split further")
    return out


def _layer_inputs(plan: Plan) -> int:
    """What model.remat=nothing keeps of one pass, in bytes of one device."""
    text = plan.policy.backbone.text_config(plan.policy.model_cfg)
    item = 2 if plan.cfg.model.compute_dtype == "bfloat16" else 4
    rows = plan.num_rows // plan.num_passes
    tokens = rows * plan.row_tokens * plan.cfg.mesh.tensor // plan.cfg.mesh.num_devices
    return tokens * text.width * text.num_layers * item


def _calls(plan: Plan, p: Compiled) -> int:
    """Calls of a program in one step in which no video is in the store yet."""
    groups = plan.cfg.batch.groups
    if p.name == "encode":
        return groups * math.ceil(plan.row.num_frames / plan.chunk_frames)
    return groups if p.name == "embed" else 1


def _times(calls: int) -> str:
    return f" x {calls:,}" if calls > 1 else ""


def _entry(text: str, size: float) -> str:
    return f"{text + ' ':.<{WIDTH}}{_gib(size):>8}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _signed(size: float) -> str:
    return f"{size / GIB:+,.2f}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100)
