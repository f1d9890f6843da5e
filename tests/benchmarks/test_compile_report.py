"""What is read of compilers' output."""

from __future__ import annotations

from benchmarks.compile_report import parse, spills_in_loops


def test_compile_report_reads_what_ptxas_prints():
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1kIfEvPf' for 'sm_90'
ptxas info    : Function properties for _Z1kIfEvPf
    24 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 9216 bytes smem, 128 bytes cmem[0]
"""
    (kernel,) = parse(log, "k.cu", "sm_90", {"_Z1kIfEvPf": [2, 5]})
    assert kernel.pop("kernel") in ("k<float>", "_Z1kIfEvPf")
    assert kernel == {
        "file": "k.cu", "architecture": "sm_90", "registers": 40, "shared_bytes": 9216,
        "stack_bytes": 24, "spill_bytes": 48, "spills_in_loops": [2, 5],
    }  # fmt: skip


def test_compile_report_counts_spills_in_loops():
    """What stands before and behind the loop does not count, nor the last jump, to itself."""
    sass = """
    Function : _Z1kv
        /*0000*/                   STL [R1], R7 ;                    /* 0x0000 */
        /*0010*/              @!P0 BRA 0x0060 ;                      /* 0x0000 */
        /*0020*/                   LDL.64 R2, [R1+0x8] ;             /* 0x0000 */
        /*0030*/                   FFMA R2, R3, R4, R2 ;             /* 0x0000 */
        /*0040*/               @P1 STL [R1+0x10], R2 ;               /* 0x0000 */
        /*0050*/               @P2 BRA 0x20 ;                        /* 0x0000 */
        /*0060*/                   LDL R7, [R1] ;                    /* 0x0000 */
        /*0070*/                   EXIT ;                            /* 0x0000 */
        /*0080*/                   BRA 0x80;                         /* 0x0000 */
    Function : straight
        /*0000*/                   EXIT ;                            /* 0x0000 */
"""
    assert spills_in_loops(sass) == {"_Z1kv": [2, 4], "straight": [0, 0]}
