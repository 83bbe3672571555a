"""What a step really takes: live storages on CPU ranks, the allocator's own counters on GPUs, phase by phase."""
