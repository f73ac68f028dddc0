#!/usr/bin/env bash
# From nothing to a trained GPT and samples of its text, on whatever this machine has:
#
#     ./quickstart.sh                      on Tiny Shakespeare, or on Python's own manual where that cannot be downloaded
#     ./quickstart.sh FILE_OR_FOLDER       on your own text
#     ./quickstart.sh FILE --max_iters=500 --key=value goes to train.py
#     ./quickstart.sh --install            only make .venv and install requirements.txt, in the releases of requirements-lock.txt
#
# Run it again: it continues where it was stopped, or says that it is done.
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }

input= install_only= train_arguments=()
for argument in "$@"; do
    case $argument in
        --install) install_only=yes ;;
        -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
        --*=*) train_arguments+=("$argument") ;;
        -*) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;;
        *) [ -e "$argument" ] || fail "there is no file or folder $argument"
           if [ -d "$argument" ]; then input=$(cd "$argument" && pwd)
           else input=$(cd "$(dirname "$argument")" && pwd)/$(basename "$argument"); fi ;;
    esac
done
cd "$(dirname "$0")"

# --- install, unless that is done already ---
venv=.venv
has_torch() { $venv/bin/python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))' 2>/dev/null; }
if ! cat requirements.txt requirements-lock.txt | cmp -s - $venv/installed.txt || ! has_torch; then
    python=
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then python=$candidate; break; fi
    done
    [ "$python" ] || fail "SAMgpt needs Python 3.10 or later: install it, then run this again"
    echo "== installing requirements.txt into $venv, once ($("$python" --version))"
    $venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear $venv || fail "cannot make $venv; on Debian and Ubuntu: apt install python3-venv"

    # a torch 2.6 or later that $python has, such as your CUDA build, is used: $venv looks into its folder, and pip keeps its version
    site=$($venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') version=
    cp requirements-lock.txt $venv/lock.txt
    if ! [ -d "$site/torch" ] && theirs=$("$python" -c '
import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' 2>/dev/null || cat "$site/torch.pth" 2>/dev/null); then
        version=$(PYTHONPATH=$theirs $venv/bin/python -c '
import importlib.metadata, torch; version = importlib.metadata.version("torch")
print(version if [int(number) for number in version.split(".")[:2]] >= [2, 6] else "")' 2>/dev/null) || version=
    fi
    if [ "$version" ]; then
        echo "== using torch $version from $theirs"
        echo "$theirs" > "$site/torch.pth"
        sed "s/^torch==.*/torch==$version/" requirements-lock.txt > $venv/lock.txt
    fi
    $venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt -c $venv/lock.txt || fail "pip could not install requirements.txt, see above"
    cat requirements.txt requirements-lock.txt > $venv/installed.txt
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
    if [ ! -e data/$dataset/meta.json ] && [ -e data/python_docs_char/meta.json ]; then
        dataset=python_docs_char  # as the last time
    elif [ ! -e data/$dataset/meta.json ]; then
        echo "== preparing Tiny Shakespeare"
        if ! $python data/$dataset/prepare.py; then
            dataset=python_docs_char
            echo "== continuing with text that is here already: Python's manual and docstrings"
            $python data/$dataset/prepare.py
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
