"""What tuning sessions found: read it with ``importlib.resources.files("convt_tvm.tuning_logs")``."""
