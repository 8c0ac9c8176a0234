"""Which operations the Neural Engine has at all."""

from __future__ import annotations

from ane.residency.program import Op
from ane.residency.rules.types import APPLE, STUDY
from ane.residency.table import Scene, rule

MISSING = """
    cumsum reduce_prod mod asin acos atan tan asinh acosh atanh sinh cosh lstm gru rnn band_part one_hot non_zero
    range_1d random_normal random_uniform random_bernoulli random_categorical sliding_windows crop_resize argsort
    scatter scatter_nd scatter_along_axis while_loop cond non_maximum_suppression list_gather list_read list_scatter
    list_write make_list list_length shape fill fill_like classify
"""
# Seen on the Neural Engine by the study or relied on by Apple's and ExecuTorch's exporters. Dynamic gathers and
# int32 results are taken off again by R4 and R3.
PRESENT = """
    conv conv_transpose linear matmul einsum softmax layer_norm instance_norm batch_norm l2_norm local_response_norm
    silu gelu tanh exp exp2 rsqrt sqrt relu relu6 leaky_relu prelu elu sigmoid sigmoid_hard softplus softsign clip
    thresholded_relu scaled_tanh transpose concat split stack slice_by_index slice_by_size tile select logical_and
    logical_or logical_not logical_xor quantize dequantize add sub mul real_div maximum minimum pow square abs inverse
    log sign floor ceil round erf sin cos threshold equal not_equal less less_equal greater greater_equal
    reduce_sum reduce_mean reduce_max reduce_min reduce_l2_norm reduce_l1_norm reduce_sum_square reduce_log_sum_exp
    reduce_log_sum reduce_argmax reduce_argmin reshape reshape_like expand_dims squeeze avg_pool max_pool l2_pool pad
    identity cast read_state write_state coreml_update_state pixel_shuffle pixel_unshuffle depth_to_space
    space_to_depth batch_to_space space_to_batch upsample_bilinear upsample_nearest_neighbor resize_bilinear
    resize_nearest_neighbor resize crop reverse flatten2d slice_update topk scaled_dot_product_attention gather
    gather_along_axis gather_nd
"""
_missing, _present = frozenset(MISSING.split()), frozenset(PRESENT.split())


@rule("R9", "CPU", "high", STUDY, "compute it on the host, or with the operations the Neural Engine has")
def missing(op: Op, scene: Scene) -> str | None:
    """The Neural Engine has no such operation, or no slice whose start is known only at run time."""
    if op.type in _missing:
        return f"there is no {op.type} on the Neural Engine"
    begin = op.operand("begin")
    moving = op.type in ("slice_by_index", "slice_by_size") and begin is not None and not begin.constant
    return "the start of the slice is known only at run time" if moving else None


@rule("R10", "NE", "medium", f"{STUDY}; {APPLE}; ExecuTorch's Core ML exporter", "")
def present(op: Op, scene: Scene) -> str | None:
    """The Neural Engine has the operation."""
    return f"{op.type} runs there" if op.type in _present else None


@rule("R11", "SLOW", "medium", STUDY, "return the logits and choose on the host")
def topk(op: Op, scene: Scene) -> str | None:
    """A topk is placed there and takes 6 to 10 ms longer than on the CPU."""
    return "topk is 6 to 10 ms slower there than on the CPU" if op.type == "topk" else None


@rule("R12", "BAD", "high", f"{APPLE}:331-355; executorch issue 15833, PR 16057", "write out matmul, softmax, matmul")
def fused_attention(op: Op, scene: Scene) -> str | None:
    """The fused attention operation has no path there: placed, but wrong or crashing on iOS 26."""
    return "no fused attention path; wrong numbers or a crash" if op.type == "scaled_dot_product_attention" else None


@rule("R37", "CPU", "low", "no source either way", "run `bench ane-residency` on a Mac and contribute the plan")
def nobody_knows(op: Op, scene: Scene) -> str | None:
    """No source says what becomes of the operation: counted as off the Neural Engine."""
    return None if op.type in _missing | _present else f"no source says where {op.type} runs"
