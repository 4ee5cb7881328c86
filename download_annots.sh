#!/usr/bin/env bash
# Fetches the annotation files of the MULTIFLOW repository (its public Google Drive folder) and unpacks them to data/:
#   ./download_annots.sh [--yes] [--dry-run]         --yes: don't ask        --dry-run: list, fetch and unpack nothing
# Fetching needs gdown (pip install gdown). Without it: fetch the .tar.gz files of the folder with a browser, put them
# next to this script, and run it again. Only files below data/ are unpacked, nothing over what the repository brings.
set -euo pipefail
export LC_ALL=C
cd "$(dirname "${BASH_SOURCE[0]}")"

URL=${ANNOTATIONS_URL:-https://drive.google.com/drive/folders/1-9rgEtZfMwMpfdqaREewX32pRzCXu57D}
ARCHIVES=data/.archives

fail() {
    echo "download_annots.sh: $1" >&2
    exit "${2:-1}"
}

archives() {
    for archive in ./*.tar.gz $ARCHIVES/*.tar.gz; do
        if [ -f "$archive" ]; then echo "$archive"; fi
    done
}

gigabytes() { # of bytes, rounded up
    echo $((($1 + 999999999) / 1000000000))
}

free_bytes() {
    echo $(($(df -Pk . | awk 'NR == 2 {print $4}') * 1024))
}

refusal() { # ARCHIVE: why it must not be unpacked; nothing where it may
    names=$(tar -tzf "$1" 2>/dev/null) && kinds=$(tar -tvzf "$1" 2>/dev/null) || {
        echo "damaged or not complete: remove it and fetch it again"
        return
    }
    if bad=$(grep -m1 -E '^/|(^|/)\.\.(/|$)' <<<"$names"); then
        echo "has the path $bad, which leads out of this folder"
    elif bad=$(grep -m1 -v '^[-d]' <<<"$kinds"); then
        echo "has something that is neither a file nor a folder: $bad"
    elif bad=$(grep -m1 -vE '^(\./)*(data(/.*)?)?$' <<<"$names"); then
        echo "has $bad, which is not below data/"
    elif bad=$(grep -m1 -E '^(\./)*data/(bundled|vocab|[a-z]+_mini)' <<<"$names"); then
        echo "has $bad, which the repository brings itself"
    elif [ "$(gzip -dc "$1" | wc -c)" -ge "$(free_bytes)" ]; then
        echo "needs more than the $(gigabytes "$(free_bytes)") GB that are free on this disk"
    fi
}

unpack() { # ARCHIVE: files appear whole, even where an earlier run was stopped
    work=$(mktemp -d data/.unpack.XXXXXX)
    tar -xzf "$1" -C "$work" --no-same-owner || fail "$1 could not be unpacked"
    (cd "$work" && find . -type f ! -name '._*') | while IFS= read -r file; do
        mkdir -p "$(dirname "$file")"
        mv -f "$work/$file" "$file"
    done
    rm -rf "$work"
    work=
}

yes=no dry=no work=
for argument in "$@"; do
    case $argument in
    --yes) yes=yes ;;
    --dry-run) dry=yes ;;
    *) fail "unknown argument $argument; usage: ./download_annots.sh [--yes] [--dry-run]" 2 ;;
    esac
done
trap '[ -z "$work" ] || rm -rf "$work"' EXIT

cat <<EOF
From: $URL
To:   $ARCHIVES, unpacked to data/ (Google Drive shows the sizes; free on this disk: $(gigabytes "$(free_bytes)") GB)
Licences: those of the data sets. COCO, Visual Genome and VQA v2 are CC BY 4.0; for Conceptual Captions, SBU, ImageNet
and Flowers102 see their sites.
EOF
found=$(archives)
[ -z "$found" ] || printf 'There already:\n%s\n' "$found"
if ! command -v gdown >/dev/null; then
    echo "gdown is not installed: pip install gdown, or fetch the .tar.gz files with a browser to $PWD"
    [ -n "$found" ] || [ "$dry" = yes ] || fail "nothing to unpack; fetch the files, then run ./download_annots.sh again"
fi
[ "$dry" = no ] || exit 0
if [ "$yes" = no ]; then
    printf 'Fetch and unpack? [y/N] '
    read -r answer || fail "no answer: give --yes to go on without being asked" 2
    case $answer in y | Y | yes) ;; *) exit 1 ;; esac
fi
mkdir -p $ARCHIVES
if command -v gdown >/dev/null; then
    option= # newer versions see for themselves that it is a folder
    if gdown --help | grep -q -- --folder; then option=--folder; fi
    gdown $option --continue "$URL" -O $ARCHIVES || fail "$URL could not be fetched; the same command goes on with it"
fi
status=0
while IFS= read -r archive; do
    [ -n "$archive" ] || fail "no .tar.gz file in $ARCHIVES or $PWD"
    reason=$(refusal "$archive")
    if [ -n "$reason" ]; then
        echo "download_annots.sh: $archive: $reason; left as it is" >&2
        status=1
    else
        unpack "$archive"
        echo "$archive: unpacked; it can be removed"
    fi
done <<<"$(archives)"
exit $status
