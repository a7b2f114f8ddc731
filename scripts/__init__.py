"""The verbs beside train.py and test.py, each run as `python3 -m scripts.NAME`."""
