#!/bin/sh
# The recipe of docs/ci.md, where streamgauge is installed already.
pytest --pyargs streamgauge.invariants laws --model checkpoint --report report --junitxml junit.xml -o junit_duration_report=call
