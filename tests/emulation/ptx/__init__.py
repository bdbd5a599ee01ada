"""A PTX interpreter in numpy, for the sm_80 artefacts that Triton and nvcc emit.

The compiled kernel itself runs, all threads of many thread blocks (CTAs) at once, one numpy vector a register, so that
layouts, masks, cp.async waits, barriers and addresses are tested on a machine without a GPU.

Modelled, and raised when wrong (:mod:`ptx.faults`):

- global memory: one segment a tensor argument; out-of-bounds, misaligned and wild addresses of lanes whose predicate
  is on; bytes of the storage that the argument's view does not cover; a byte that two CTAs of a launch share with a
  store in between;
- shared memory: bounds, alignment, reads of what was never written or of a cp.async destination before its group is
  waited for, and accesses of two warps to the same bytes without a barrier between them;
- control flow: lanes that branch apart run one after the other and meet again at the immediate post-dominator; a
  barrier or a warp-wide instruction that not all of its lanes reach raises.

Not modelled: timing, caches, memory ordering weaker than program order, the last bits of approximate functions
(``ex2.approx`` and the like are numpy's), the tensor cores' internal rounding (products and sums are fp32), atomics,
calls, local memory, and everything of sm_90 and later. An opcode outside the tables raises.

=============  =====================================================================================
``parser``       text to instructions
``formats``      PTX types as numpy arrays
``control_flow`` where lanes meet again, live registers; the graph is ``benchmarks.static.control_flow``'s
``memory``       global memory; ``shared_memory`` shared memory and cp.async
``operands``     what an instruction reads and writes
``arithmetic``   the table of opcodes that compute lane by lane
``instructions`` binding: loads, stores, moves, barriers
``warp``         shuffles, ldmatrix, mma
``machine``      runs waves of lanes
``launch``       runs what ``benchmarks.static.fake_driver`` captured of Triton's kernels
``nvcc``         compiles csrc/cuda; ``cuda_backend`` runs its kernels
=============  =====================================================================================
"""
