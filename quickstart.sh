#!/usr/bin/env bash
# From nothing to a trained GPT and text that it wrote, on whatever this machine has:
#
#     ./quickstart.sh                      on Tiny Shakespeare, or on Python's own manual where that cannot be downloaded
#     ./quickstart.sh FILE_OR_FOLDER       on your own text
#     ./quickstart.sh FILE --max_iters=500 --key=value goes to train.py
#     ./quickstart.sh --install            only make .venv and install requirements.txt
#
# Run it again and it goes on where it was stopped, or says that it is done.
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }

input= install_only= train_arguments=()
for argument in "$@"; do
    case $argument in
        --install) install_only=yes ;;
        --*=*) train_arguments+=("$argument") ;;
        -*) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;;
        *) [ -e "$argument" ] || fail "there is no file or folder $argument"
           if [ -d "$argument" ]; then input=$(cd "$argument" && pwd)
           else input=$(cd "$(dirname "$argument")" && pwd)/$(basename "$argument"); fi ;;
    esac
done
cd "$(dirname "$0")"

# --- install, unless requirements.txt is installed already ---
venv=.venv
if ! cmp -s requirements.txt $venv/installed.txt; then
    python=
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then python=$candidate; break; fi
    done
    [ "$python" ] || fail "SAMgpt needs Python 3.10 or later: install it, then run this again"
    echo "== installing requirements.txt into $venv, once ($("$python" --version))"
    $venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear $venv || fail "cannot make $venv; on Debian and Ubuntu: apt install python3-venv"
    $venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt || fail "pip could not install requirements.txt, see above"
    cp requirements.txt $venv/installed.txt
fi
[ -z "$install_only" ] || exit 0
python=$venv/bin/python

# --- text ---
if [ "$input" ]; then
    name=$(basename "$input"); name=${name%.*}; name=${name#.}
    [ "$name" ] && [ "$name" != / ] || fail "$input has no name that a data set could take: copy the text to one"
    dataset=text/$name
    echo "== preparing $input"
    $python data/text/prepare.py --input="$input" --name="$name"
else
    dataset=shakespeare_char
    if [ ! -e data/$dataset/meta.json ]; then
        echo "== preparing Tiny Shakespeare"
        if ! $python data/$dataset/prepare.py; then
            dataset=python_docs_char
            echo "== going on with text that is here already: Python's manual and docstrings"
            [ -e data/$dataset/meta.json ] || $python data/$dataset/prepare.py
        fi
    fi
fi

# --- train, sample, plot ---
out=out-quickstart-$(basename "$dataset")
init_from=scratch
fingerprint=$(cat config/quickstart.py "data/$dataset/"{train.bin,val.bin,meta.json} | cksum)
if [ -e "$out/ckpt.pt" ] && [ "$(cat "$out/data.cksum" 2>/dev/null)" = "$fingerprint" ]; then init_from=resume; fi
mkdir -p "$out" && echo "$fingerprint" > "$out/data.cksum"  # resume on the same text, and by the same recipe, only
echo "== training on data/$dataset, into $out"
$python train.py config/quickstart.py --dataset="$dataset" --out_dir="$out" --init_from=$init_from ${train_arguments[@]+"${train_arguments[@]}"}
echo "== samples"
$python sample.py --out_dir="$out" --ckpt=ckpt_best.pt --num_samples=3 --max_new_tokens=300
$python tools/plot.py --runs="$out" --output="$out/loss.png" --title="SAMgpt on $(basename "$dataset")"
echo "== done. More text from this model:"
echo "   $python sample.py --out_dir='$out' --ckpt=ckpt_best.pt --start='Once '"
