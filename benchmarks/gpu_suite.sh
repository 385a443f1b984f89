#!/usr/bin/env bash
# All evidence from one GPU: builds, tests, measures, reports. See gpu_suite.py; PYTHON names another interpreter.
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_suite.py" "$@"
