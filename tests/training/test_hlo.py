"""What is counted in a compiled program, against counts by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alibi_jax.config import Config
from alibi_jax.data import DataConfig
from alibi_jax.sharding import MeshConfig, make_mesh
from alibi_jax.training import hlo
from alibi_jax.training.loop import lower_step


def test_a_scan_over_sharded_matrices():
    """Six layers [256, 256], sharded over four devices in their rows, gathered one by one."""

    def loss(w, x):
        def layer(x, w):
            w = jax.sharding.reshard(w, P(None, None))
            return jnp.einsum("bm,mn->bn", x, w, out_sharding=P("fsdp", None)), None

        return jnp.sum(jax.lax.scan(layer, x, w)[0])

    mesh = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((8, 256), "float32", sharding=NamedSharding(mesh, P("fsdp")))
        w = jax.ShapeDtypeStruct(
            (6, 256, 256), "float32", sharding=NamedSharding(mesh, P(None, "fsdp"))
        )
        cost = hlo.count(jax.jit(jax.grad(loss)).lower(w, x).compile().as_text())
    matrix = 256 * 256 * 4
    assert cost.flops == 6 * 3 * (2 * 2 * 256 * 256)  # forward, and two products backward
    # A CPU sums whole gradients and keeps its slice of them.
    assert cost.received_bytes == {
        "all-gather": 6 * matrix * 3 / 4,
        "all-reduce": 6 * matrix * 3 / 4 * 2,
    }


def test_a_step_communicates_gradients_and_no_activations(model):
    """Data parallelism sums every gradient once, a tied embedding's twice, and two scalars."""
    config = Config(
        model=dataclasses.replace(model, num_layers=1, position="sinusoidal"),
        data=DataConfig(sequence_length=16, batch_size=24),
        mesh=MeshConfig(data=8),
    )
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        lowered = lower_step(config, mesh)
        text = lowered.step.compile().as_text()
    assert "[3,16," in text
    assert "[24,16," not in text  # a device has three of the sequences
    cost = hlo.count(text)
    params = lowered.state.params
    gradients = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    assert set(cost.received_bytes) == {"all-reduce"}
    least = 2 * 7 / 8 * gradients
    most = 2 * 7 / 8 * (gradients + 4 * params["embedding"].size + 100)
    assert least <= cost.received_bytes["all-reduce"] <= most


# By hand: the forms that a TPU's compiler writes

LOOPS = """HloModule loops, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (input: f32[64,32]) -> f32[8,32] {
  %input = f32[64,32]{1,0:T(8,128)} parameter(0)
  %whole = f32[64,32]{1,0} all-reduce(%input), replica_groups={}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = f32[8,32]{1,0} dynamic-slice(%whole, %zero, %zero), dynamic_slice_sizes={8,32}
}

%inner_condition (state: (u32[], f32[8,32])) -> pred[] {
  %limit = u32[] constant(8)
  %state = (u32[], f32[8,32]{1,0}) parameter(0)
  %counter = u32[] get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%counter, %limit), direction=LT
}

%inner_body (state.1: (u32[], f32[8,32])) -> (u32[], f32[8,32]) {
  %two = u32[] constant(2)
  %state.1 = (u32[], f32[8,32]{1,0}) parameter(0)
  %counter.1 = u32[] get-tuple-element(%state.1), index=0
  %next = u32[] add(%counter.1, %two)
  %part = f32[8,32]{1,0} get-tuple-element(%state.1), index=1
  %send = (f32[8,32]{1,0}, f32[8,32]{1,0}, u32[], u32[]) collective-permute-start(%part), source_target_pairs={{0,1},{1,0}}
  %sent = f32[8,32]{1,0} collective-permute-done(%send)
  ROOT %tuple = (u32[], f32[8,32]{1,0}) tuple(%next, %sent)
}

%outer_condition (state.2: (s32[], f32[8,32])) -> pred[] {
  %limit.2 = s32[] constant(5)
  %state.2 = (s32[], f32[8,32]{1,0}) parameter(0)
  %counter.2 = s32[] get-tuple-element(%state.2), index=0
  ROOT %less.2 = pred[] compare(%counter.2, %limit.2), direction=LT
}

%outer_body (state.3: (s32[], f32[8,32])) -> (s32[], f32[8,32]) {
  %one = s32[] constant(1)
  %state.3 = (s32[], f32[8,32]{1,0}) parameter(0)
  %counter.3 = s32[] get-tuple-element(%state.3), index=0
  %next.3 = s32[] add(%counter.3, %one)
  %part.3 = f32[8,32]{1,0} get-tuple-element(%state.3), index=1
  %start = u32[] constant(2)
  %begin = (u32[], f32[8,32]{1,0}) tuple(%start, %part.3)
  %while.3 = (u32[], f32[8,32]{1,0}) while(%begin), condition=%inner_condition, body=%inner_body
  %moved = f32[8,32]{1,0} get-tuple-element(%while.3), index=1
  %gathered = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} all-gather(%moved), replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}, dimensions={0}
  %grouped = f32[8,32]{1,0} all-to-all(%moved), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %tuple.3 = (s32[], f32[8,32]{1,0}) tuple(%next.3, %moved)
}

ENTRY %main (x: f32[8,32], g: f32[64,32]) -> f32[8,32] {
  %x = f32[8,32]{1,0} parameter(0)
  %g = f32[64,32]{1,0} parameter(1)
  %zero.4 = s32[] constant(0)
  %scattered = f32[8,32]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %init = (s32[], f32[8,32]{1,0}) tuple(%zero.4, %scattered)
  %while.4 = (s32[], f32[8,32]{1,0}) while(%init), condition=%outer_condition, body=%outer_body
  ROOT %result = f32[8,32]{1,0} get-tuple-element(%while.4), index=1
}
"""  # noqa: E501


def test_loops_within_loops_and_every_form_of_groups():
    part = 8 * 32 * 4
    assert hlo.count(LOOPS).received_bytes == {
        "reduce-scatter": 8 * part * 7 / 8,  # `{}`: all eight devices
        "collective-permute": 5 * 3 * part,  # 2, 4, 6 in each of five
        "all-gather": 5 * (64 * 32 * 2) / 2,  # pairs
        "all-to-all": 5 * part * 3 / 4,  # fours
    }


def test_groups_that_cannot_be_read_are_an_error():
    text = LOOPS.replace("replica_groups=[2,4]<=[8]", "somehow")
    with pytest.raises(ValueError, match="groups cannot be read"):
        hlo.count(text)


BYTES = """HloModule bytes, num_partitions=1

%fused (w: f32[16,64,64], i: s32[], y: f32[4,64,64]) -> f32[4,64,64] {
  %w = f32[16,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[4,64,64]{2,1,0} parameter(2)
  %zero = s32[] constant(0)
  %layer = f32[1,64,64]{2,1,0} dynamic-slice(%w, %i, %zero, %zero), dynamic_slice_sizes={1,64,64}
  ROOT %updated = f32[4,64,64]{2,1,0} dynamic-update-slice(%y, %layer, %i, %zero, %zero)
}

ENTRY %main (w.1: f32[16,64,64], i.1: s32[], y.1: f32[4,64,64]) -> f32[4,64,64] {
  %w.1 = f32[16,64,64]{2,1,0:T(8,128)} parameter(0)
  %i.1 = s32[]{:T(128)S(6)} parameter(1)
  %y.1 = f32[4,64,64]{2,1,0} parameter(2)
  %copied = (f32[4,64,64]{2,1,0:T(8,128)S(1)}, f32[4,64,64]{2,1,0}, u32[]{:S(2)}) copy-start(%y.1)
  %near = f32[4,64,64]{2,1,0:T(8,128)S(1)} copy-done(%copied)
  %negative = f32[4,64,64]{2,1,0:T(8,128)S(1)} negate(%near)
  ROOT %out = f32[4,64,64]{2,1,0} fusion(%w.1, %i.1, %y.1), kind=kLoop, calls=%fused
}
"""


def test_bytes_are_of_the_slice_and_of_hbm_alone():
    layer = 64 * 64 * 4
    # The copy reads y from HBM; the layer is read and written; the rest is on the chip.
    assert hlo.count(BYTES).hbm_bytes == 4 * layer + 2 * layer


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        # [8, 16] x [16, 32]
        ("f32[8,32] convolution(f32[8,16] %a, f32[16,32] %b), dim_labels=bf_io->bf", 8 * 16 * 32),
        # Four products [8, 16] x [16, 32], as a TPU writes a batch: one of seven taps each.
        (
            "f32[4,8,32] convolution(f32[4,8,16] %a, f32[4,16,32] %b), "
            "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
            4 * 8 * 16 * 32,
        ),
        # A contraction over space: the window is as large as the input.
        (
            "f32[8,32,1] convolution(f32[8,4,16] %a, f32[4,16,32] %b), "
            "window={size=4}, dim_labels=b0f_0io->bf0",
            8 * 4 * 16 * 32,
        ),
        ("f32[8,32] dot(f32[8,16] %a, f32[16,32] %b), lhs_contracting_dims={1}", 8 * 16 * 32),
    ],
)
def test_products(line, flops):
    result, _, rest = line.partition(" ")
    opcode, _, rest = rest.partition("(")
    shapes, _, attributes = rest.partition(")")
    a, b = (operand.split()[0] for operand in shapes.split(", "))
    text = f"""HloModule products

ENTRY %main (a: {a}, b: {b}) -> {result} {{
  %a = {a} parameter(0)
  %b = {b} parameter(1)
  ROOT %out = {result} {opcode}(%a, %b){attributes}
}}
"""
    assert hlo.count(text).flops == 2 * flops
