"""What a segmentation is worth. Statistics that any number of workers sum first, ratios once at the end.

* ``statistics``: everything that one evaluation counts, bundled; its summary. Start here.
* ``confusion``: confusion matrix; IoU, accuracy, precision per class; their means, mIoU(S), mIoU(U), hIoU.
* ``boundary``: IoU of the pixels near the contours.
* ``calibration``: how far the confidence can be believed.
* ``foreground``: one prompt, one probability map: IoU at thresholds, average precision, as CLIPSeg has them.
* ``breakdown``: the same for groups of prompts, such as objects of one size.
* ``pixels``, ``ratios``: the counting and the division that the others share.
"""
