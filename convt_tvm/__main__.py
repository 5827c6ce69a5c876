"""``python -m convt_tvm`` is the command ``convt-tvm``."""

from convt_tvm.cli import main

if __name__ == "__main__":
    main()
