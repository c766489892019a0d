"""Measures of a segmentation. Any number of workers sum statistics first; ratios are taken once, at the end.

* ``statistics``: everything that one evaluation counts, bundled; its summary. Start here.
* ``names``: what metrics are called, and which way is better. A new metric is listed here.
* ``confusion``: confusion matrix; IoU, accuracy, precision per class; their means, mIoU(S), mIoU(U), hIoU.
* ``boundary``: IoU of the pixels near the contours.
* ``calibration``: how well the confidence predicts what is correct.
* ``foreground``: one prompt, one probability map: IoU at thresholds, average precision, as in CLIPSeg.
* ``breakdown``: the same for groups of prompts, such as objects of one size.
* ``pixels``, ``ratios``: the counting and the division that the others share.
"""
