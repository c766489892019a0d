"""Segmentation metrics. Workers sum additive counts first; ratios are taken once, at the end.

* ``statistics``: all counts of an evaluation, and their summary. Start here.
* ``names``: labels of the metrics, and which direction is better. List new metrics here.
* ``confusion``: confusion matrix; IoU, accuracy, precision per class; their means, mIoU(S), mIoU(U), hIoU.
* ``boundary``: IoU of the pixels near the contours.
* ``calibration``: how well the confidence predicts correctness.
* ``foreground``: one prompt, one probability map: IoU at thresholds, average precision, as in CLIPSeg.
* ``breakdown``: the same for groups of prompts, such as objects of similar size.
* ``pixels``, ``ratios``: shared counting and division.
"""
