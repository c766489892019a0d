"""Track runs in MLflow: recorded on disk first, sent by a thread, never blocking the work.

Jobs use ``tracker``; ``results`` logs a result folder; ``sender.flush`` sends what was left behind.
"""
