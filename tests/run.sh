#!/usr/bin/env bash
# Run every test of the workspace; what failed, and the first lines of why, stands at the end once more.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p build
log=build/test.log
"${CARGO:-cargo}" test --release --workspace --no-fail-fast 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
if [ "$status" -ne 0 ]; then
    echo
    echo "What failed (all of it is in $log):"
    # Stories say why after their name; the test harness of Rust says so before, where a thread panicked.
    grep -aE -A 6 '^test .* \.\.\. FAILED|^thread .* panicked at|^error(\[|:)' "$log" \
        | cut -c 1-300 | tail -n 60
fi
exit "$status"
