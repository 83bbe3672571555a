"""What an engine holds beside states, as numbers only: physics is handed these and never asks which engine it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineNumbers:
    """Elements and bytes an element; 0 switches a term off. The defaults are those of a run without an engine.

    Gradients: `keep_ways` of each gradient stay where it was made, one share of so many (1: all of it, 0: nothing);
    `keep_width`: bytes of an element of that share, 0 for those of the gradient itself. `partition_width`: bytes of an
    element of a buffer for the own share of all gradients, made when the first arrives (split `partition_ways` ways).

    Reduction: a gradient is copied into one of `buckets` buffers of `bucket_elements` x `bucket_width` and dies; one
    larger than the bucket waits for the next gradient. `bucket_stays`: the buffers live always, not only in backward.
    `copy_when`: reducing makes a copy of what is in the bucket "never", when it "spans-ranks", or when it is "uneven"
    (several tensors, or one that the ranks do not divide). `ranks`: how many. `reduce_late`: nothing is reduced before
    backward has ended. `norm_width`: bytes of an element of a copy that a reduced gradient's norm is taken of.

    Gathering: parameters are split, and whole only around their use, by "module" or by "block" ("" for never).
    `collective_copy`: the collective's buffer lives beside the parameters. By module: `prefetch_elements` ahead at
    every module, `live_elements` at most, kept when used again within `reuse_elements`; up to `persistent_elements` are
    never split. By block: `root_stays` between forward and backward; `scatter_width`: bytes of an element of a block's
    input to the reduction, which lives until the next block's.

    Step: `step_copy_widths` are bytes an element of copies of the own gradients made for the optimizer, of at most
    `step_elements` at a time (0: of a part). Load: `load_copies`: the parameters that learn exist once more.
    """

    keep_ways: int = 1
    keep_width: int = 0
    partition_ways: int = 0
    partition_width: int = 0
    bucket_elements: int = 0
    bucket_width: int = 0
    buckets: int = 0
    bucket_stays: bool = False
    copy_when: str = "never"
    reduce_late: bool = False
    norm_width: int = 0
    ranks: int = 1
    gather: str = ""
    collective_copy: bool = False
    prefetch_elements: int = 0
    live_elements: int = 0
    reuse_elements: int = 0
    persistent_elements: int = 0
    root_stays: bool = False
    scatter_width: int = 0
    step_copy_widths: tuple[int, ...] = ()
    step_elements: int = 0
    load_copies: int = 0
    gather_at_load: bool = False
    gather_at_save: bool = False
    largest_gradient_buffers: int = 0


ALONE = EngineNumbers()
