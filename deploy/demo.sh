#!/usr/bin/env bash
# Runs "All of it on one machine" of docs/deploy.md to the letter, and then takes all down.
#
#   deploy/demo.sh [FOLDER]      default: runs/deploy-demo, made anew
set -euo pipefail
page=$(realpath "$(dirname "$0")/../docs/deploy.md")
folder=${1:-runs/deploy-demo}
marker=.sonofed-demo
commands=$(sed -n '/^## All of it on one machine$/,/^```$/{/^sonofed-/p}' "$page")

if [ -z "$commands" ]; then
  echo "error: $page has no commands for one machine" >&2
  exit 20
fi

take_down() { grep -E '^sonofed-[a-z]+ down' <<< "$commands" | bash; }

if [ -e "$folder" ] && [ ! -e "$folder/$marker" ]; then
  echo "error: $folder is not of an earlier run of this demo; name another folder" >&2
  exit 20
elif [ -e "$folder" ]; then
  (cd "$folder" && take_down) > /dev/null 2>&1 || true
  rm -rf "$folder"
fi
mkdir -p "$folder"
cd "$folder"
touch "$marker"
trap 'take_down > /dev/null 2>&1 || true' EXIT
bash -euxo pipefail <<< "$commands"
echo "report: $PWD/report.txt"
