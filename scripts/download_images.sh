#!/usr/bin/env bash
# Fetches the images of COCO and Visual Genome from their official sites to images/, in the layout of docs/datasets.md:
#   scripts/download_images.sh [coco] [vg] [--yes] [--dry-run] [--keep]
#     coco vg     which; default both          --yes   don't ask          --dry-run   list, fetch nothing
#     --keep      keep the zip files           IMAGES, COCO_URL, VG_URL in the environment: other folder, mirrors
# What was begun is resumed, what is done is not fetched again (images/.downloads). CC3M, SBU: img2dataset, see docs/datasets.md.
set -euo pipefail
export LC_ALL=C
cd "$(dirname "${BASH_SOURCE[0]}")/.."

IMAGES=${IMAGES:-images}
COCO_URL=${COCO_URL:-http://images.cocodataset.org/zips}
VG_URL=${VG_URL:-https://cs.stanford.edu/people/rak248/VG_100K_2}
# set, name, URL, size in GB of the zip and of the images in it, folder
FILES="coco train2014 $COCO_URL/train2014.zip 13 coco/train2014
coco val2014 $COCO_URL/val2014.zip 7 coco/val2014
coco test2015 $COCO_URL/test2015.zip 13 coco/test2015
vg vg_part1 $VG_URL/images.zip 10 vg
vg vg_part2 $VG_URL/images2.zip 6 vg"

fail() {
    echo "scripts/download_images.sh: $1" >&2
    exit "${2:-1}"
}

fetch() { # URL FILE: goes on where FILE ends
    if command -v curl >/dev/null; then
        curl --fail --location --retry 5 --continue-at - --output "$2" "$1"
    else
        wget --continue --tries=5 --output-document="$2" "$1"
    fi
}

get() { # NAME URL FOLDER
    zip=$downloads/$1.zip
    if ! unzip -tqq "$zip" >/dev/null 2>&1; then
        echo "$1: $2"
        fetch "$2" "$zip" || fail "$2 could not be fetched; the same command goes on where it stopped"
        unzip -tqq "$zip" >/dev/null 2>&1 || fail "$zip is damaged: remove it and give the same command again"
    fi
    mkdir -p "$IMAGES/$3"
    unzip -jqqo "$zip" '*.jpg' -d "$IMAGES/$3" # without the folders in the zip: nothing lands elsewhere
    touch "$downloads/$1.done"
    [ "$keep" = yes ] || rm "$zip"
    echo "$1: $IMAGES/$3 has $(find "$IMAGES/$3" -name '*.jpg' | wc -l | tr -d ' ') images"
}

sets='' yes=no dry=no keep=no
for argument in "$@"; do
    case $argument in
    coco | vg) sets="$sets $argument" ;;
    --yes) yes=yes ;;
    --dry-run) dry=yes ;;
    --keep) keep=yes ;;
    *) fail "unknown argument $argument; usage: scripts/download_images.sh [coco] [vg] [--yes] [--dry-run] [--keep]" 2 ;;
    esac
done
sets=${sets:-coco vg}
downloads=$IMAGES/.downloads

todo='' total=0 largest=0
while read -r set name url size folder; do
    case " $sets " in *" $set "*) ;; *) continue ;; esac
    if [ -f "$downloads/$name.done" ]; then
        printf '%-10s done       %s\n' "$name" "$IMAGES/$folder"
        continue
    fi
    printf '%-10s %3d GB     %s  <-  %s\n' "$name" "$size" "$IMAGES/$folder" "$url"
    todo="$todo$name $url $folder
"
    total=$((total + size))
    [ "$size" -le "$largest" ] || largest=$size
done <<<"$FILES"
[ -n "$todo" ] || exit 0

existing=$IMAGES
while [ ! -e "$existing" ]; do existing=$(dirname "$existing"); done
free=$(($(df -Pk "$existing" | awk 'NR == 2 {print $4}') / 1000000))
need=$((total + largest)) # a zip is removed once its images are there
[ "$keep" = no ] || need=$((2 * total))
cat <<EOF

To fetch: $total GB. Disk space needed: $need GB; free in $existing: $free GB.
Licences: the images of COCO are under Flickr's terms of use, each under its own licence
(https://cocodataset.org/#termsofuse); Visual Genome is CC BY 4.0, its images come from Flickr too, by way of YFCC100M
and COCO (https://homes.cs.washington.edu/~ranjay/visualgenome).
EOF
[ "$dry" = no ] || exit 0
[ "$free" -ge "$need" ] || fail "$need GB are needed and $free GB are free in $existing: make room, or fetch one set only"
command -v unzip >/dev/null || fail "unzip is needed: install it"
command -v curl >/dev/null || command -v wget >/dev/null || fail "curl or wget is needed: install one"
if [ "$yes" = no ]; then
    printf 'Fetch? [y/N] '
    read -r answer || fail "no answer: give --yes to fetch without being asked" 2
    case $answer in y | Y | yes) ;; *) exit 1 ;; esac
fi
mkdir -p "$downloads"
while read -r name url folder; do
    [ -z "$name" ] || get "$name" "$url" "$folder" </dev/null
done <<<"$todo"
