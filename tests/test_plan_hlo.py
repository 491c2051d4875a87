"""Reading compiled programs: handwritten ones whose costs are known, no compiler needed."""

import numpy as np
import pytest

from mila_jax.parallel.aot import collectives, hlo
from mila_jax.parallel.aot.chips import CHIPS
from mila_jax.parallel.aot.costs import matmul_work, traffic
from mila_jax.parallel.aot.figures import figures, pessimistic_seconds
from mila_jax.parallel.aot.walk import walk

CHIP = CHIPS["v5p"]
ONE = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
EIGHT = {"data": 1, "fsdp": 4, "context": 2, "tensor": 1}


def module(body, others=""):
    return hlo.parse(f"HloModule m, is_scheduled=true\n\n{others}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n")


def rows(body, others="", mesh=ONE):
    return walk(module(body, others), CHIP, mesh).rows


@pytest.mark.parametrize(
    "text, dims, space, padded",
    [
        ("f32[8,128]{1,0:T(8,128)}", (8, 128), 0, 4096),
        ("bf16[3,100]{1,0:T(8,128)(2,1)}", (3, 100), 0, 8 * 128 * 2),  # filled up to whole tiles
        ("bf16[100,3]{0,1:T(8,128)(2,1)S(1)}", (100, 3), 1, 8 * 128 * 2),  # the other way round, on the chip
        ("f32[]", (), 0, 4),
        ("pred[16]{0:T(512)(128)(4,1)}", (16,), 0, 512),
    ],
)
def test_layouts(text, dims, space, padded):
    (array,) = hlo.arrays(text)
    assert (array.dims, array.space, array.padded) == (dims, space, padded)


def test_tuples_are_flattened():
    assert [a.dtype for a in hlo.arrays("(f32[8]{0:T(128)}, (u32[]{:S(2)}, bf16[2,2]))")] == ["f32", "u32", "bf16"]


def test_a_plain_matmul():
    m = module("""  %a = bf16[512,72]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[72,256]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %d = bf16[512,256]{1,0:T(8,128)(2,1)} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}""")
    c = m.computations["main"]
    work = matmul_work(c["d"], c)
    assert work.flops == 2 * 512 * 72 * 256
    assert work.padded == 2 * 512 * 128 * 256  # 72 fills a matrix unit of 128
    assert traffic(m, c["d"], c) == (512 * 128 * 2 + 72 * 256 * 2, 512 * 256 * 2)


def test_a_batched_matmul():
    m = module("""  %a = f32[6,5,32,64]{3,2,1,0:T(8,128)} parameter(0)
  %b = f32[6,5,16,64]{3,2,1,0:T(8,128)} parameter(1)
  ROOT %d = f32[6,5,32,16]{3,2,1,0:T(8,128)} dot(%a, %b), lhs_batch_dims={0,1}, rhs_batch_dims={0,1}, lhs_contracting_dims={3}, rhs_contracting_dims={3}""")
    c = m.computations["main"]
    assert matmul_work(c["d"], c).flops == 2 * 30 * 32 * 16 * 64


def test_a_batched_matmul_as_a_dilated_convolution_counts_real_elements_only():
    # How the compiler writes 16 products [32, 64] @ [64, 8]: a window of 16 that meets one real element at each position.
    m = module("""  %a = bf16[16,32,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[16,64,8]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %d = bf16[16,32,8]{2,1,0:T(8,128)(2,1)} convolution(%a, %b), window={size=16 stride=15 pad=0_0 lhs_dilate=16}, dim_labels=0bf_0io->0bf""")
    c = m.computations["main"]
    assert matmul_work(c["d"], c).flops == 2 * 16 * 32 * 8 * 64


LOOP = """%body (s: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %s = (s32[], f32[1024]{0:T(1024)}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[1024]{0:T(1024)} get-tuple-element(%s), index=1
  %step = s32[] constant(STEP)
  %next = s32[] add(%i, %step)
  %y = f32[1024]{0:T(1024)} negate(%x)
  ROOT %t = (s32[], f32[1024]{0:T(1024)}) tuple(%next, %y)
}
%condition (c: (s32[], f32[1024])) -> pred[] {
  %c = (s32[], f32[1024]{0:T(1024)}) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  BOUND
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}
"""
WHILE = """  %p = (s32[], f32[1024]{0:T(1024)}) parameter(0)
  ROOT %w = (s32[], f32[1024]{0:T(1024)}) while(%p), condition=%condition, body=%bodyNOTE"""


@pytest.mark.parametrize(
    "step, bound, note, times",
    [
        (1, "%n = s32[] constant(28)", "", 28),
        (2, "%n = s32[] constant(16)", "", 8),  # loops around a collective count in twos: taken as 16 they would count double
        (1, "%n = s32[] constant(28)", ', backend_config={"known_trip_count":{"n":"7"}}', 7),
    ],
)
def test_trip_counts(step, bound, note, times):
    found = walk(module(WHILE.replace("NOTE", note), LOOP.replace("STEP", str(step)).replace("BOUND", bound)), CHIP, ONE)
    (negate,) = (r for r in found.rows if r.opcode == "negate")
    assert negate.times == times and found.unknown_loops == []


def test_a_loop_of_unknown_length_is_reported():
    bound = "%n = s32[] get-tuple-element(%c), index=0"
    found = walk(module(WHILE.replace("NOTE", ""), LOOP.replace("STEP", "1").replace("BOUND", bound)), CHIP, ONE)
    assert found.unknown_loops == ["w"]
    assert "counted once" in figures(found, CHIP, 1.0, False)["warnings"][0]


FUSED = """%fused (p0: f32[28,1024], p1: f32[1,1024], p2: s32[]) -> f32[28,1024] {
  %p0 = f32[28,1024]{1,0:T(8,128)} parameter(0)
  %p1 = f32[1,1024]{1,0:T(1,128)} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %u = f32[28,1024]{1,0:T(8,128)} dynamic-update-slice(%p0, %p1, %p2, %zero)
}
%sliced (q0: f32[28,1024], q1: s32[]) -> f32[1,1024] {
  %q0 = f32[28,1024]{1,0:T(8,128)} parameter(0)
  %q1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,1024]{1,0:T(1,128)} dynamic-slice(%q0, %q1, %zero), dynamic_slice_sizes={1,1024}
  ROOT %n = f32[1,1024]{1,0:T(1,128)} negate(%cut)
}
"""


def test_slices_and_updates_in_place_move_only_the_slice():
    update, cut = rows(
        """  %a = f32[28,1024]{1,0:T(8,128)} parameter(0)
  %b = f32[1,1024]{1,0:T(1,128)} parameter(1)
  %i = s32[]{:S(2)} parameter(2)
  %u = f32[28,1024]{1,0:T(8,128)} fusion(%a, %b, %i), kind=kLoop, calls=%fused
  ROOT %s = f32[1,1024]{1,0:T(1,128)} fusion(%u, %i), kind=kLoop, calls=%sliced""",
        FUSED,
    )
    assert (update.read, update.written) == (4096, 4096)
    assert (cut.read, cut.written) == (4096, 4096)
    assert cut.work.vector == 1024


def test_memory_on_the_chip_is_no_hbm_traffic():
    copy, negate = rows("""  %a = f32[1024]{0:T(1024)} parameter(0)
  %c = f32[1024]{0:T(1024)S(1)} copy(%a)
  ROOT %n = f32[1024]{0:T(1024)S(1)} negate(%c)""")
    assert (copy.read, copy.written, copy.copy) == (4096, 0, True)
    assert (negate.read, negate.written, negate.copy) == (0, 0, False)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups={}", [list(range(8))]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_replica_groups(text, wanted):
    assert collectives.groups(f", {text}, dimensions={{0}}", 8) == wanted


def test_groups_are_named_by_mesh_axis():
    assert collectives.axis_of([[0, 1], [2, 3], [4, 5], [6, 7]], EIGHT) == "context"
    assert collectives.axis_of([[0, 2, 4, 6], [7, 5, 3, 1]], EIGHT) == "fsdp"
    assert collectives.axis_of([list(range(8))], EIGHT) == "fsdp+context"
    assert collectives.axis_of([[0, 3], [1, 2], [4, 7], [5, 6]], EIGHT) == "?"
    assert collectives.axis_of([[0, 2], [2, 4], [4, 6], [6, 0]], EIGHT, permutation=True) == "fsdp"


def test_ring_times():
    gib = 2**30
    both_ways = 2 * CHIP.link
    assert collectives.ring_seconds("all-gather", gib // 4, gib, 4, CHIP) == pytest.approx(gib * 3 / 4 / both_ways)
    assert collectives.ring_seconds("reduce-scatter", gib, gib // 4, 4, CHIP) == pytest.approx(gib * 3 / 4 / both_ways)
    assert collectives.ring_seconds("all-reduce", gib, gib, 4, CHIP) == pytest.approx(2 * gib * 3 / 4 / both_ways)
    assert collectives.ring_seconds("all-to-all", gib, gib, 4, CHIP) == pytest.approx(gib * 4 / 8 / CHIP.link)
    assert collectives.ring_seconds("collective-permute", gib, gib, 2, CHIP) == pytest.approx(gib / CHIP.link)
    assert collectives.ring_seconds("all-reduce", gib, gib, 1, CHIP) == 0
    # Sixteen devices lie on two torus dimensions.
    assert collectives.ring_seconds("all-gather", 0, gib, 16, CHIP) == pytest.approx(gib * 15 / 16 / (2 * both_ways))


COLLECTIVES = """  %a = f32[1024]{0:T(1024)} parameter(0)
  %g = (f32[1024]{0:T(1024)}, f32[4096]{0:T(1024)}) all-gather-start(%a), replica_groups=mesh['x'=4,'y'=2] {'x'}, dimensions={0}
  %d = f32[4096]{0:T(1024)} all-gather-done(%g)
  ROOT %r = f32[4096]{0:T(1024)} all-reduce(%d), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add"""


def test_collectives_by_kind_axis_and_way():
    gather, reduce = rows(COLLECTIVES, mesh=EIGHT)
    assert (gather.collective.kind, gather.collective.axis, gather.collective.bytes, gather.collective.asynchronous) == (
        "all-gather",
        "fsdp",
        16384,
        True,
    )
    assert (reduce.collective.kind, reduce.collective.axis, reduce.collective.bytes, reduce.collective.asynchronous) == (
        "all-reduce",
        "context",
        16384,
        False,
    )
    out = figures(walk(module(COLLECTIVES), CHIP, EIGHT), CHIP, 1e6, False)
    assert out["seconds"]["collectives"] == pytest.approx(gather.collective.seconds + reduce.collective.seconds)
    assert out["seconds"]["collectives_asynchronous"] == gather.collective.seconds
    assert out["mfu"]["roofline"] < out["mfu"]["roofline_without_collectives"]


ASYNC = """%start (p0: bf16[256,512]) -> (bf16[256,512], bf16[1024,512], u32[]) {
  %p0 = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)
  %gather = bf16[1024,512]{1,0:T(8,128)(2,1)} all-gather(%p0), replica_groups=mesh['x'=4,'y'=2] {'x'}, dimensions={0}
  ROOT %t = (bf16[256,512]{1,0:T(8,128)(2,1)}, bf16[1024,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) custom-call(%gather), custom_call_target="AsyncCollectiveStart"
}
%done (p0: bf16[256,512], p1: bf16[1024,512], p2: u32[]) -> bf16[1024,512] {
  %p0 = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[1024,512]{1,0:T(8,128)(2,1)} parameter(1)
  %p2 = u32[]{:S(2)} parameter(2)
  %gather = bf16[1024,512]{1,0:T(8,128)(2,1)} all-gather(%p0), replica_groups=mesh['x'=4,'y'=2] {'x'}, dimensions={0}
  ROOT %t = bf16[1024,512]{1,0:T(8,128)(2,1)} custom-call(%p0, %gather, %p1, %p2), custom_call_target="AsyncCollectiveDone"
}
"""


def test_a_collective_spread_over_fusions_counts_once():
    found = rows(
        """  %a = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)
  %s = (bf16[256,512]{1,0:T(8,128)(2,1)}, bf16[1024,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%start
  %x = bf16[256,512]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=0
  %y = bf16[1024,512]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %z = u32[]{:S(2)} get-tuple-element(%s), index=2
  ROOT %d = bf16[1024,512]{1,0:T(8,128)(2,1)} fusion(%x, %y, %z), kind=kCustom, calls=%done""",
        ASYNC,
        EIGHT,
    )
    (row,) = [r for r in found if r.collective]
    assert (row.collective.bytes, row.collective.size, row.collective.asynchronous) == (1024 * 512 * 2, 4, True)
    assert sum(r.read + r.written for r in found) == 0


KERNELS = """  %q = bf16[7,9,2688,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[7,9,2688,128]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %v = bf16[7,9,2688,128]{3,2,1,0:T(8,128)(2,1)} parameter(2)
  %splash_mha_fwd.1 = (bf16[7,9,2688,128]{3,2,1,0:T(8,128)(2,1)}, f32[7,9,2688]{2,1,0:T(8,128)}) custom-call(%q, %k, %v), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block_q": 896
}}, metadata={op_name="jit(f)/splash"}
  %o = bf16[7,9,2688,128]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%splash_mha_fwd.1), index=0
  ROOT %splash_mha_dkv.1 = (bf16[7,9,2688,128]{3,2,1,0:T(8,128)(2,1)}, bf16[7,9,2688,128]{3,2,1,0:T(8,128)(2,1)}, bf16[7,9,2688,128]{3,2,1,0:T(8,128)(2,1)}) custom-call(%q, %k, %v, %o), custom_call_target="tpu_custom_call"
"""


def test_attention_kernels_count_by_their_shapes():
    forward, backward = rows(KERNELS)
    pairs = 7 * 9 * 2688 * 2688 * 128
    assert (forward.kernel, forward.work.flops) == ("forward", 4 * pairs)
    assert (backward.kernel, backward.work.flops) == ("backward", 10 * pairs)
    split = rows(
        KERNELS.replace(
            "bf16[7,9,2688,128]{3,2,1,0:T(8,128)(2,1)}) custom-call(%q, %k, %v, %o)", "f32[7,896,128]{2,1,0:T(8,128)}) custom-call(%q, %k, %v, %o)"
        )
    )[1]
    assert (split.kernel, split.work.flops) == ("backward_kv", 8 * pairs)
    narrow = rows(KERNELS.replace("2688,128]", "2688,72]"))[0]
    assert narrow.work.padded == pytest.approx(narrow.work.flops * 128 / 72)


def test_fused_kernels_have_their_own_time():
    """Frames before places, and cycles of the vector units instead of a share of the matrix units."""
    kernel = """  %q = bf16[1,28,672,1152]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[1,28,672,1152]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %temporal_forward.1 = bf16[1,28,672,1152]{3,2,1,0:T(8,128)(2,1)} custom-call(%q, %k), custom_call_target="tpu_custom_call"
"""
    (row,) = rows(kernel)
    elements = 28 * 672 * 1152
    assert (row.kernel, row.work.flops) == ("temporal_forward", 4 * elements * 28)
    assert pessimistic_seconds(row, CHIP, False) == pytest.approx(elements / 1024 * CHIP.own[0] / CHIP.clock)
    (backward,) = rows(kernel.replace("temporal_forward", "temporal_backward"))
    assert backward.work.flops == 10 * elements * 28 and pessimistic_seconds(backward, CHIP, False) > pessimistic_seconds(row, CHIP, False)


def test_sends_to_other_slices_take_the_network():
    (row,) = rows("""  %a = bf16[1024,512]{1,0:T(8,128)(2,1)} parameter(0)
  %t = token[] after-all()
  %send.1 = (bf16[1024,512]{1,0:T(8,128)(2,1)}, u32[], token[]) send(%a, %t), channel_id=1
  %recv.1 = (bf16[1024,512]{1,0:T(8,128)(2,1)}, u32[], token[]) recv(%t), channel_id=2
  ROOT %d = token[] send-done(%send.1), channel_id=1
""")
    assert (row.collective.axis, row.collective.bytes) == ("slices", 1024 * 512 * 2)
    assert row.collective.seconds == pytest.approx(1024 * 512 * 2 / CHIP.network) and row.read + row.written == 0


def test_the_two_models_of_time_enclose_each_other():
    body = """  %a = bf16[4096,72]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[72,4096]{1,0:T(8,128)(2,1)} parameter(1)
  %d = bf16[4096,4096]{1,0:T(8,128)(2,1)S(1)} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}CYCLES
  ROOT %e = bf16[4096,4096]{1,0:T(8,128)(2,1)S(1)} exponential(%d)"""
    flops = 2 * 4096 * 72 * 4096
    fast = figures(walk(module(body.replace("CYCLES", "")), CHIP, ONE), CHIP, flops, False)
    assert fast["flops"]["hlo_over_model"] == 1
    assert fast["seconds"]["ideal"] == pytest.approx(flops / CHIP.peak)
    assert fast["seconds"]["ideal"] <= fast["seconds"]["roofline"] < fast["seconds"]["pessimistic"]
    cycles = ', backend_config={"window_config":{"estimated_cycles":"1750000"}}'  # a millisecond
    full = figures(walk(module(body.replace("CYCLES", cycles)), CHIP, ONE), CHIP, flops, True)
    memory = (4096 * 128 + 72 * 4096) * 2 / CHIP.hbm_bandwidth  # both operands, filled up to whole tiles
    slow = flops * 128 / 72 / (0.85 * CHIP.peak) + memory
    assert full["seconds"]["pessimistic"] - fast["seconds"]["pessimistic"] == pytest.approx(1e-3 - slow)
    assert fast["parts"]["matmuls"]["pessimistic_ms"] == pytest.approx(1e3 * slow)
    assert sum(p["pessimistic_ms"] for p in full["parts"].values()) == pytest.approx(1e3 * full["seconds"]["pessimistic"])
    assert any("estimated cycles" in line for line in full["assumptions"]) and any("fast mode" in line for line in fast["assumptions"])
    assert np.isclose(full["costliest"][0]["pessimistic_ms"], 1.0)


SOURCES = """HloModule m, is_scheduled=true

FileNames
1 "/usr/lib/python/jax/api.py"
2 "/home/x/mila_jax/model/dit.py"

FunctionNames
1 "einsum"
2 "Block.__call__"

FileLocations
1 {file_name_id=2 function_name_id=2 line=84 end_line=84 column=1 end_column=2}
2 {file_name_id=1 function_name_id=1 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  ROOT %n = f32[8]{0:T(128)} negate(%p), metadata={op_name="jit(f)/neg" stack_frame_id=2}
}
"""


def test_source_lines_are_those_of_our_code():
    m = hlo.parse(SOURCES)
    assert m.source(m.computations["main"]["n"]) == "model/dit.py:84 Block.__call__"
    assert m.source(m.computations["main"]["p"]) == ""


def test_text_without_a_program_is_no_program():
    with pytest.raises(ValueError, match="entry"):
        hlo.parse("nothing of the kind")
