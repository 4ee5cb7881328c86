# Sourced by scripts that make many runs: some at a time, none twice, and stopped at the first that fails.
#   PYTHON; JOBS=2 runs at a time; output: folder of the results; more: options of all runs

once() { # FOLDER COMMAND ...: python's COMMAND, whose results are in FOLDER, unless it was done there (of these $inputs)
    local folder=$1 asked
    shift
    asked="$*${inputs:+ $inputs}"
    if [ "$(cat "$folder/done" 2>/dev/null)" = "$asked" ]; then
        return
    fi
    mkdir -p "$folder"
    if ! "$PYTHON" "$@" >>"$folder/log" 2>&1; then
        tr '\r' '\n' <"$folder/log" | tail -n 3 >&2
        exit 255 # xargs begins no other
    fi
    echo "$asked" >"$folder/done"
    echo "${folder#"$output/"}: done in $SECONDS s"
}

turns() { # FUNCTION: with the words of each line that is read
    xargs -r -P "${JOBS:-2}" -L 1 bash -c "set -euo pipefail; $1"' "$@"' bash || {
        echo "$0: stopped, see the logs in $output; the same command goes on from here" >&2
        exit 1
    }
}

known() { # WORD KNOWN ...: refuses a WORD that is none of them
    local word=$1
    shift
    if [[ " $* " != *" $word "* ]]; then
        echo "$0: there is no $word; there are: $*" >&2
        exit 2
    fi
}

export -f once
