"""Every kernel compiles ahead of time, without a GPU, and within what it may use."""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minference_green.kernels.index import PIECE, TILE
from minference_green.kernels.tile import launch_options, padded

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
)

BLACKWELL, HOPPER, AMPERE = 100, 90, 80
CPU = torch.device("cpu")

# Per multiprocessor of either: 64 Ki registers; shared memory, 1 KiB of it per program reserved.
REGISTERS = 2**16
SHARED_BYTES = {BLACKWELL: 228 * 1024, HOPPER: 228 * 1024, AMPERE: 164 * 1024}
TENSOR_CORES = {BLACKWELL: "UTCHMMA", HOPPER: "HGMMA", AMPERE: "HMMA"}


@dataclass(frozen=True)
class Resources:
    """What ``cuobjdump`` says of a compiled kernel."""

    registers: int
    shared_bytes: int
    spills: list[str]
    sass: str
    threads: int

    def resident(self, capability: int) -> int:
        """Programs that fit a multiprocessor at once."""
        return min(
            REGISTERS // (self.registers * self.threads),
            SHARED_BYTES[capability] // (self.shared_bytes + 1024),
        )


def signature(
    kernel: Any, constants: dict[str, Any], descriptors: dict[str, str]
) -> dict[str, str]:
    """Argument types by name, as the launchers pass them in bfloat16."""
    int32 = {"heads", "starts", "columns", "bits", "pieces", "n_left", "blocks", "lists", "rows"}
    int32 |= {"n_seen", "n_whole"}
    int32 |= {"shared", "first", "second", "first_left", "second_left", "offsets", "counts"}
    int32 |= {"histogram", "known", "totals", "best_columns", "best_slashes", "lengths"}
    float32 = {"lse", "partial", "mean", "masses", "shares", "scores", "slashes", "units"}
    types = {}
    for parameter in kernel.params:
        name = parameter.name
        base = name.removesuffix("_ptr")
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_desc"):
            types[name] = descriptors.get(name) or descriptors["other"]
        elif parameter.annotation_type:
            types[name] = parameter.annotation_type
        elif name.endswith("_ptr"):
            scores = base == "columns" and "slashes_ptr" in kernel.arg_names
            units = base == "slashes" and not constants.get("LAST", True)
            floats = (scores or base in float32) and not units
            types[name] = "*fp32" if floats else "*i32" if units or base in int32 else "*bf16"
            if base == "numbers":
                types[name] = "*i8"
        else:
            types[name] = "fp32" if name in ("qk_scale", "log2_e", "eps") else "i32"
    return types


def compiled(
    kernel: Any,
    capability: int,
    tmp_path: Path,
    constants: dict[str, Any],
    options: dict[str, Any],
    source: Any = ASTSource,
    descriptors: dict[str, str] | None = None,
) -> Resources:
    types = signature(kernel, constants, descriptors or {})
    aligned = [n for n, type_ in types.items() if type_ == "i64" or type_.startswith("*")]
    built = triton.compile(
        source(
            fn=kernel,
            signature=types,
            constexprs={(kernel.arg_names.index(n),): value for n, value in constants.items()},
            attrs={(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        ),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage, sass = (
        subprocess.run([tool, what, cubin], capture_output=True, text=True, check=True).stdout
        for what in ("--dump-resource-usage", "--dump-sass")
    )
    found = re.search(r"REG:(\d+)", usage)
    assert found, usage
    return Resources(
        registers=int(found[1]),
        shared_bytes=built.metadata.shared,
        spills=re.findall(r"\b(?:LDL|STL)\b.*", sass),
        sass=sass,
        threads=32 * options["num_warps"],
    )


def sizes(head_dim: int, **more: Any) -> dict[str, Any]:
    return {"HEAD_DIM": head_dim, "DIM": padded(head_dim), "TILE": TILE, **more}


def uses_tensor_cores(sass: str, capability: int) -> bool:
    return TENSOR_CORES[capability] in sass


each_capability = pytest.mark.parametrize(
    "capability", [BLACKWELL, HOPPER, AMPERE], ids=["blackwell", "hopper", "ampere"]
)


@each_capability
@pytest.mark.parametrize("name", ["band", "block"])
def test_attention_runs_two_programs_on_a_multiprocessor_without_spills(name, capability, tmp_path):
    from minference_green.kernels import block_sparse, vertical_slash

    kernel = {"band": vertical_slash._band_kernel, "block": block_sparse._block_kernel}[name]
    stages = 3 if capability == HOPPER else 2
    options = {**launch_options(128, CPU), "num_stages": stages}
    constants = sizes(128, HAS_LSE=True, **({"PIECE": PIECE} if name == "band" else {}))
    got = compiled(kernel, capability, tmp_path, constants, options)
    assert got.spills == []
    assert got.resident(capability) >= 2
    assert uses_tensor_cores(got.sass, capability)


@pytest.mark.parametrize("head_dim", [64, 96])
def test_attention_of_smaller_head_dimensions_does_not_spill(head_dim, tmp_path):
    from minference_green.kernels import vertical_slash

    options = {**launch_options(head_dim, CPU), "num_stages": 3}
    constants = sizes(head_dim, HAS_LSE=False, PIECE=PIECE)
    got = compiled(vertical_slash._band_kernel, HOPPER, tmp_path, constants, options)
    assert got.spills == []
    assert got.resident(HOPPER) >= 2
    assert uses_tensor_cores(got.sass, HOPPER)


def test_attention_of_the_largest_head_dimension_fits(tmp_path):
    """Beside 255 registers a few scalars spill; the loops keep theirs."""
    from minference_green.kernels import vertical_slash

    options = launch_options(256, CPU)
    constants = sizes(256, HAS_LSE=False, PIECE=PIECE)
    got = compiled(vertical_slash._band_kernel, HOPPER, tmp_path, constants, options)
    loops = loops_of(got.sass, n_products=36)  # of one key tile
    assert loops
    assert not any(re.search(r"\b(?:LDL|STL)\b", body) for body in loops)
    assert got.resident(HOPPER) >= 1
    assert uses_tensor_cores(got.sass, HOPPER)


# On sm_100 some of them spill; they have not run there.
@pytest.mark.parametrize("capability", [HOPPER, AMPERE], ids=["hopper", "ampere"])
@pytest.mark.parametrize("name", ["row_mass", "last_mass", "masked_mass", "any_mass"])
def test_estimators_do_not_spill(name, capability, tmp_path):
    from minference_green.kernels import estimate

    last = {"rows_ptr": None, "LAST": True, "UNITS": estimate.UNITS}
    kernel, constants = {
        "row_mass": (estimate._row_mass_kernel, {"rows_ptr": None}),
        "last_mass": (estimate._mass_kernel, {**last, "MASKED": False}),
        "masked_mass": (estimate._mass_kernel, {**last, "MASKED": True}),
        "any_mass": (
            estimate._mass_kernel,
            {"LAST": False, "MASKED": True, "UNITS": estimate.UNITS},
        ),
    }[name]
    masked = constants.get("MASKED", True)
    options = estimate.launch_options(128, 2, (capability // 10, 0), masked=masked)
    got = compiled(kernel, capability, tmp_path, sizes(128, HEADS=2, **constants), options)
    assert got.spills == []
    assert uses_tensor_cores(got.sass, capability)
    # The two that walk a long prompt by its last rows; the host counts on two programs at once.
    fast = capability == HOPPER and name in ("row_mass", "last_mass")
    assert got.resident(capability) >= (2 if fast else 1)
    if fast:
        body = loops_of(got.sass, n_products=128 // 16)[0]
        # A diagonal entry in eight moves between threads, not each of them.
        assert len(re.findall(r"\b(?:STS|LDS|SHFL)\b", body)) <= 32
    if name == "any_mass":
        # Adding without asking for the sum; an atomic that returns it would wait for it.
        assert re.search(r"\bRED(G)?\.E\.ADD", got.sass)
        assert not re.search(r"\bATOMG?\.", got.sass)


@each_capability
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_probing_does_not_spill(head_dim, summed, capability, tmp_path):
    from minference_green.kernels import probe

    options = probe.options(head_dim, summed=summed)
    shape = {"ROWS": 8, "QUERIES": options.pop("QUERIES"), "CHUNK": probe.CHUNK_TILES}
    if not summed:
        shape |= {"TILES": probe.STEP_TILES}
    kernel = probe._sum_kernel if summed else probe._largest_kernel
    got = compiled(kernel, capability, tmp_path, sizes(head_dim, **shape), options)
    assert got.spills == []
    # On Ampere, and in Triton 3.6 on Blackwell, operands are in registers, too.
    assert got.resident(capability) >= (2 if capability == HOPPER else 1)
    assert bool(re.search(r"\bMUFU\.EX2", got.sass)) == summed
    if summed:
        assert uses_tensor_cores(got.sass, capability)
    else:
        # Triton 3.6 has only the products of older devices for Blackwell.
        assert re.search(r"\bIGMMA\b" if capability == HOPPER else r"\b(UTC)?IMMA\b", got.sass)
    if not summed and capability == HOPPER:
        # Three numbers compared at once: what this kernel is bound by beside its products.
        assert len(re.findall(r"\bVIMNMX3\b", got.sass)) >= 16


def test_rounding_keys_does_not_spill(tmp_path):
    from minference_green.kernels import probe

    constants = sizes(256)
    got = compiled(probe._round_kernel, HOPPER, tmp_path, constants, {"num_warps": 4})
    assert got.spills == []


# As many key tiles as 64K, 256K, 1M and 2M tokens have.
@pytest.mark.parametrize("held", [1024, 4096, 16384, 32768])
def test_choosing_blocks_does_not_spill(held, tmp_path):
    from minference_green.kernels import best_blocks

    options = {"num_warps": best_blocks.warps(held)}
    constants = {"TILE": TILE, "HELD": held, "CHUNK": best_blocks.CHUNK}
    got = compiled(best_blocks._best_kernel, HOPPER, tmp_path, constants, options)
    assert got.spills == []
    constants = {"CHUNK": best_blocks.CHUNK}
    got = compiled(best_blocks._pack_kernel, HOPPER, tmp_path, constants, {"num_warps": 4})
    assert got.spills == []


@pytest.mark.parametrize(("rows", "summed"), [(8, False), (64, True)])
def test_sharing_out_masses_does_not_spill(rows, summed, tmp_path):
    from minference_green.kernels import probe

    constants = {"ROWS": rows, "PADDED": rows, "TILE": TILE, "CHUNK": probe._HELD // rows}
    constants["SUMMED"] = summed
    got = compiled(probe._share_kernel, HOPPER, tmp_path, constants, {"num_warps": 4})
    assert got.spills == []


def test_small_kernels_do_not_spill(tmp_path):
    from minference_green.kernels import band_pair, cut, estimate, rest, tile, vertical_slash

    half = {"HALF": 64, "PADDED": 64, "ROWS": rest.ROTATED_ROWS}
    cases = [
        (rest._norm_kernel, {"WIDTH": 4096, "PADDED": 4096, "ROWS": 1}, 8),
        (rest._norm_kernel, {"WIDTH": 16384, "PADDED": 16384, "ROWS": 1}, 16),
        (rest._gate_kernel, {"BLOCK": rest.GATE_ELEMENTS}, 8),
        (rest._rotate_kernel, half, 4),
        (estimate._block_mean_kernel, sizes(128), 4),
        (vertical_slash._gather_kernel, sizes(128), 4),
        (vertical_slash._mark_kernel, {"PIECE": PIECE, "BLOCK": 128}, 4),
        (tile._count_kernel, {"BLOCK": 128}, 4),
        (band_pair._split_kernel, {"TILE": TILE, "PIECE": PIECE, "BLOCK": 1024}, 8),
        (cut._cut_kernel, {"TILE": TILE, "PIECE": PIECE, "BLOCK": cut.BLOCK}, 4),
    ]
    for kernel, constants, num_warps in cases:
        got = compiled(kernel, HOPPER, tmp_path, constants, {"num_warps": num_warps})
        assert got.spills == [], kernel


def test_the_choice_of_columns_and_slashes_does_not_spill(tmp_path):
    from minference_green.kernels import top

    passes, before, first_bin, shift = len(top.DIGIT_BITS), 0, 0, 32
    chunk = {"CHUNK": top.CHUNK}
    cases = [(top._write_kernel, {"PASSES": passes, "TOTALS": 256, **chunk})]
    for number, bits in enumerate(top.DIGIT_BITS):
        shift -= bits
        digit = {"PASS": number, "BITS": bits, "BEFORE": before, "SHIFT": shift}
        places = {"FIRST_BIN": first_bin, "BINS": top.BINS, **chunk}
        cases.append((top._histogram_kernel, {**digit, **places}))
        before, first_bin = bits, first_bin + (1 << bits)
    counted = {"PASSES": passes, "BEFORE": before, "BINS": top.BINS, **chunk}
    cases.append((top._count_kernel, counted))
    for kernel, constants in cases:
        got = compiled(kernel, HOPPER, tmp_path, constants, {"num_warps": 4})
        assert got.spills == [], (kernel, constants)
        assert got.resident(HOPPER) >= 4, (kernel, constants)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_pair_kernel_copies_by_descriptor_and_fits(head_dim, tmp_path):
    """In its hot loops not more than one scalar comes from the stack."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from minference_green.kernels import band_pair

    def descriptor(rows: int, width: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([1, 1, rows, width], gl.bfloat16)
        return f"tensordesc<bf16[1, 1, {rows}, {width}],{layout!r}>"

    piece = descriptor(PIECE, band_pair.SWIZZLE)
    pieces = {"PIECE": PIECE, "SWIZZLE": band_pair.SWIZZLE}
    got = compiled(
        band_pair._pair_kernel,
        HOPPER,
        tmp_path,
        sizes(head_dim, HAS_LSE=True, RING=band_pair.RING, **pieces),
        {"num_warps": 4, "maxnreg": band_pair.REGISTERS},
        source=GluonASTSource,
        descriptors={
            "piece_k_desc": piece,
            "piece_v_desc": piece,
            "other": descriptor(TILE, head_dim),
        },
    )
    # Two groups of four warps and two producers, whose group counts as whole.
    assert got.threads * 3 * got.registers <= REGISTERS
    assert got.shared_bytes + 1024 <= SHARED_BYTES[HOPPER]
    assert uses_tensor_cores(got.sass, HOPPER)
    assert "UTMALDG" in got.sass
    loops = loops_of(got.sass, n_products=head_dim // 16 + TILE // 16)
    assert len(loops) == 8, "shared, columns, own whole, own past column 0; two groups"
    assert all(len(re.findall(r"\b(?:LDL|STL)\b", body)) <= 1 for body in loops)
    # The accumulator is scaled behind a branch.
    assert all(len(re.findall(r"\bVOTE\.ANY\b", body)) == 1 for body in loops)


def loops_of(sass: str, n_products: int) -> list[str]:
    """Bodies of the loops that issue this many tensor-core instructions."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)
    at = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    bodies = []
    for i, (_, text) in enumerate(lines):
        # A loop jumps back on a condition; code out of line returns without one.
        jump = re.fullmatch(r"@\S+ BRA 0x([0-9a-f]+)\s*", text)
        begin = at[int(jump[1], 16)] if jump else i
        if begin < i:
            body = "\n".join(text for _, text in lines[begin : i + 1])
            if body.count("HGMMA") == n_products:
                bodies.append(body)
    return bodies
