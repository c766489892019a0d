"""Everything that only a GPU can show, unattended in under ten minutes.

    python -m benchmarks.gpu --output results.md [--only forward labels] [--retrain] [--toy]

Each item runs in a process of its own with its own time limit, so that one that fails, hangs or breaks the
driver's state loses no other. What was measured so far is in the output file at any time (Markdown, and the
same rows as JSON beside it). One table is printed at the end. Speeds are medians of repeats on random inputs
after a warm-up, most of them next to a bare loop in the same process. No network is needed: weights are
random, or bundled. ``--toy`` runs the same code with tiny models, on a CPU too, to test this script.

What reading the code for CUDA left to be measured, in this order:

1. ``waits``: how often the host waits for the GPU. Expected: once per image in ``label_map`` (which classes
   can win), twice per image for the results; per training step once in the checks of MaskCLIP+'s labels
   (twice if truth is known) and once in its drift alarm (self-training), once in CLIPSeg's search for equal
   images. If the label map's wait shows in ``job`` (GPU busy well below 1), read the ranges of a whole batch
   at once.
2. ``correctness``: cuDNN computes fp32 convolutions in TF32 by default, matrix products not. If "fp32" is a
   hundred times worse than "fp32, no TF32", decide what ``--precision fp32`` means on a GPU.
3. ``labels``: ``label_map`` against a compiled kernel. It moves every class score through memory some six
   times; a fused kernel needs one pass.
4. ``forward``: whether ``torch.compile`` pays for its start-up in a job of an hour.
5. ``job``: where it saturates. ``Decode`` and ``Write`` need CPU cores; results are copied from the GPU image
   by image into pageable memory.
6. ``training``: ``cudnn.benchmark`` and channels_last are on. Counting guesses adds to few cells from all
   pixels (``confidence_counts``), which atomics may slow down. fp16 waits for the loss scaler in every step.
7. A ResNet CLIP runs in the default memory layout in labelling, and ``cudnn.benchmark`` is off there, because
   images have many sizes.
"""
