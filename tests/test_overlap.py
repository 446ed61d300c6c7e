"""benchmarks/overlap.py: what it reads out of a schedule, against one written by hand."""

import importlib.util
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "overlap.py"
spec = importlib.util.spec_from_file_location("overlap", SCRIPT)
assert spec and spec.loader
overlap = importlib.util.module_from_spec(spec)
sys.modules["overlap"] = overlap
spec.loader.exec_module(overlap)

K, DK, IDS = "bf16[1,64,4,128]{3,2,1,0}", "f32[1,64,4,128]{3,2,1,0}", "s32[1,64]{1,0}"
SYNC, ASYNC = (f'backend_config={{"is_sync":{said}}}' for said in ("true", "false"))
BACKWARD = 'metadata={op_name="jit(step)/transpose(jvp())/while/body/ppermute"}'
SCHEDULE = f"""HloModule jit_step, is_scheduled=true, entry_computation_layout={{}}

%body (p: (s32[], {K})) -> (s32[], {K}) {{
  %p = (s32[], {K}) parameter(0)
  %cp-start = ({K}, {K}) collective-permute-start(%k), {BACKWARD}, {ASYNC}
  %ids-start = ({IDS}, {IDS}) collective-permute-start(%i), {BACKWARD}, {ASYNC}
  %a = {DK} fusion(%k), kind=kLoop, calls=%add
  %ids-done = {IDS} collective-permute-done(%ids-start), {BACKWARD}
  %one = ({DK}) custom-call(%q), custom_call_target="__gpu$xla.gpu.triton", {BACKWARD}
  %dk-start = ({DK}, {DK}) collective-permute-start(%dk), {BACKWARD}, {ASYNC}
  %two = ({DK}) custom-call(%q), custom_call_target="__gpu$xla.gpu.triton", {BACKWARD}
  %dk-done = {DK} collective-permute-done(%dk-start), {BACKWARD}
  %cp-done = {K} collective-permute-done(%cp-start), {BACKWARD}
  %dv-start = ({DK}, {DK}) collective-permute-start(%dv), {BACKWARD}, {SYNC}
  %dv-done = {DK} collective-permute-done(%dv-start), {BACKWARD}
  ROOT %t = (s32[], {K}) tuple(%n, %cp-done)
}}

ENTRY %main (k: {K}) -> {K} {{
  %w = (s32[], {K}) while(%t0), condition=%c, body=%body
  %x-start = (({K}), {K}) all-to-all-start(%g), dimensions={{2}}, {ASYNC}
  %b = {K} copy(%k)
  %x-done = {K} all-to-all-done(%x-start)
  ROOT %r = {K} copy(%x-done)
}}
"""


def test_a_schedule_is_read_as_it_stands():
    found = [(t.group, overlap._said(t)) for t in overlap.transfers(SCHEDULE)]
    assert found == [
        ("backward: ids", "others"),
        ("backward: dk, dv", "partly"),  # one of two kernels
        ("backward: k, v", "hidden"),
        ("backward: dk, dv", "alone"),
        ("heads for tokens (all-to-all)", "alone"),  # nothing but a copy
    ]
