"""Runs in MLflow: recorded on disk first, sent by a thread, never in the way of the work.

``tracker`` is what jobs use; ``results`` files a result folder; ``flush`` sends what is left over.
"""
